"""Cases within one test: all run, and those that fail are named."""

import pytest

from tests.cases import cases


def test_all_cases_run_and_each_that_fails_is_named() -> None:
    seen = []

    @cases("b", [1, 2])
    @cases(("a", "c"), [(3, "x"), (4, "y"), pytest.param(5, "z", id="last")])
    def check(a: int, c: str, b: int) -> None:
        seen.append((a, c, b))
        with pytest.raises(ValueError, match="x"):
            raise ValueError(c)
        assert b == 1

    with pytest.raises(BaseExceptionGroup, match="2 of 2 cases failed") as found:
        check()
    assert len(seen) == 6
    first, second = found.value.exceptions
    assert (first.__notes__, second.__notes__) == (["Case: b=1"], ["Case: b=2"])
    assert [error.__notes__ for error in first.exceptions] == [["Case: a=4, c='y'"], ["Case: last"]]
    assert len(second.exceptions) == 3


@cases("a", [1, 2])
def test_fixtures_are_given_beside_the_cases(tmp_path, a: int) -> None:
    (tmp_path / str(a)).touch()
    assert len(list(tmp_path.iterdir())) == a


def test_no_case_is_refused() -> None:
    with pytest.raises(ValueError, match="a: no case"):
        cases("a", [])
