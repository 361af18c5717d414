"""Rows of benchmarks are judged by their budgets and by the noise of their own table, and survive their file."""

import pytest

from benchmarks.rows import MISSED, NOISE, OK, Results, Row, noise_of, table_of

PLAIN, AGAIN = Row("plain", 10.0, 1.0), Row("plain, again", 9.7, 0.97)


@pytest.mark.parametrize(
    ("ratio", "at_least", "verdict"),
    [
        (1.0, False, OK),
        (1.02, False, NOISE),
        (1.04, False, MISSED),
        (1.0, True, OK),
        (0.98, True, NOISE),
        (0.96, True, MISSED),
    ],
)
def test_a_budget_is_kept_on_its_own_side_and_missed_beyond_the_noise(ratio, at_least, verdict):
    row = Row("a", 1.0, ratio, 1.0, at_least)
    assert row.is_over == (verdict != OK)
    assert row.verdict(noise_of([PLAIN, AGAIN, row])) == verdict
    assert row.verdict(noise_of([PLAIN, row])) == (OK if verdict == OK else MISSED)


def test_rows_without_budget_or_ratio_have_no_verdict():
    for row in (Row("a", 1.0, 9.0), Row("a", None, None, 1.0)):
        assert row.verdict(0.0) == ""
        assert not row.is_over


def test_tables_show_only_columns_in_use_and_name_what_ratios_are_to():
    assert table_of([PLAIN, AGAIN]).splitlines()[0] == "| variant | median ms | ratio to plain |"
    two = [PLAIN, Row("b", 1.0, 2.0, 1.5, baseline="plain"), Row("c", 1.0, 0.5, baseline="b")]
    assert table_of(two).splitlines() == [
        "| variant | median ms | ratio | to | budget | verdict |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| plain | 10.00 | 1.000 |  |  |  |",
        "| b | 1.00 | 2.000 | plain | <= 1.50 | missed |",
        "| c | 1.00 | 0.500 | b |  |  |",
    ]
    sizes = [
        Row("a", None, 400.04, columns={"bytes": 1000}),
        Row("b", None, None, columns={"MB": 1.0, "bytes": "never"}),
    ]
    assert table_of(sizes).splitlines()[::2] == ["| variant | bytes | MB | ratio |", "| a | 1,000 |  | 400.0 |"]


def test_results_come_back_from_their_file(tmp_path):
    rows = [PLAIN, Row("b", None, 2.0, 1.5, True, "plain", {"bytes": 7, "MB": 1.5, "s": "never"})]
    written = Results("a machine", 3, {"a table": rows, "not here": []})
    written.write(tmp_path / "folder" / "a.json")
    found = Results.read(tmp_path / "folder" / "a.json")
    assert found == written
    assert table_of(found.tables["a table"]) == table_of(rows)
