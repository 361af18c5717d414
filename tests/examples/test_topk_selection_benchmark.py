"""The benchmark of selectors runs, and its baseline selects what the exact selector does. Nothing about speed."""

import json

import pytest
import torch

from benchmarks import topk_selection
from benchmarks.common import Clock
from benchmarks.topk_selection import BUDGETS, SELECTORS, TOPK, magnitude_topk, selector_rows, vectors


@pytest.fixture(autouse=True)
def _threads_of_the_process():
    """Undo what the script sets for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_it_measures_everything(tmp_path, capsys):
    topk_selection.main(["--quick", "--out", str(tmp_path / "selection.json")], entries=20_000)
    printed = capsys.readouterr().out
    assert "The 20 largest of 20000 float32 entries, heavy tail" in printed
    assert "Budgets missed: " in printed
    tables = json.loads((tmp_path / "selection.json").read_text())
    for kind in vectors(100, "cpu"):
        assert [row["name"] for row in tables[kind]] == list(SELECTORS)
        budgets = {row["name"]: row["budget"] for row in tables[kind]}
        assert budgets["sampled"] == (None if kind == "constant" else 0.35)
        assert budgets["blocks"] == (None if kind == "constant" else 0.30)


def test_every_selector_selects_as_many_and_the_baseline_the_largest():
    values = vectors(5000, "cpu")["heavy tail"]
    largest = set(values.abs().argsort()[-50:].tolist())
    assert set(magnitude_topk(values, 50).tolist()) == largest
    for select in SELECTORS.values():
        assert len(select(values, 50)) == 50


def test_ratios_are_to_torch_and_only_what_is_held_has_a_budget():
    values = torch.randn(2000)
    for is_held in (True, False):
        rows = {row.name: row for row in selector_rows(values, 10, 2, Clock("cpu"), is_held)}
        assert rows[TOPK].ratio == 1.0
        assert rows["exact"].ratio == pytest.approx(rows["exact"].milliseconds / rows[TOPK].milliseconds)
        assert [name for name, row in rows.items() if row.budget is not None] == (list(BUDGETS) if is_held else [])
