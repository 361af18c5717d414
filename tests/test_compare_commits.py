"""The comparison of two commits finds a changed rule, and nothing where nothing changed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import compare_commits, trial_runs
from tests.compare_commits import PARTS, ROOT, compare, compare_runs, differences, main, table
from tests.trial_runs import fitting


def copy_tree(folder: Path) -> Path:
    for part in ("lightning_grad", "tests/contract"):
        # What is compiled is copied along, and is valid as long as its source is; files with a number are being written.
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.pyc.*"))
    (folder / "tests" / "__init__.py").touch()
    return folder


@pytest.fixture
def _this_tree_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare this tree, whose package is imported anyway, a process of its own."""
    start = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if options["env"]["PYTHONPATH"] != str(ROOT):
            return start(command, **options)
        trial_runs.main(*command[-2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.usefixtures("_this_tree_runs_here")
def test_a_changed_rule_is_found_and_what_was_only_copied_trains_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = copy_tree(tmp_path)
    rule = changed / "lightning_grad" / "functional" / "clipping" / "gradient_noise.py"
    rule.write_text(rule.read_text().replace("alpha=deviation", "alpha=2 * deviation"))
    assert main([str(changed), "--only", "GradientNoise", "GradientCentralization"]) == 1
    printed = capsys.readouterr().out
    assert "GradientCentralization  same" in printed
    assert "GradientNoise           DIFFERS\n    weights: mix.w: differs by up to " in printed


def test_an_unknown_technique_is_refused_with_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_commits, "run_tree", lambda *_: {"results": {}, "own": {"ZClip": {}}})
    with pytest.raises(SystemExit, match=r"No technique is called ZClap\. There are ZClip\."):
        main([str(ROOT), "--only", "ZClap"])


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), []),
        (torch.zeros(1), -torch.zeros(1), ["w: differs by up to 0"]),
        (torch.zeros(1), torch.zeros(1, dtype=torch.float64), ["w: torch.float32 (1,) is now torch.float64 (1,)"]),
        (torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex64), []),
        ({"a": 1}, {"b": 1}, ["w.a: gone", "w.b: new"]),
        ([1, 2], [1, 2, 3], ["w: 2 entries are now 3"]),
        ((1, [float("nan")]), [1, [float("nan")]], []),
        (1, True, ["w: 1 is now True"]),
    ],
)
def test_differences_are_found_bit_by_bit(old: Any, new: Any, found: list[str]) -> None:
    assert differences(old, new, "w") == found


def left(**changes: Any) -> dict[str, Any]:
    return {**{part: {"x": torch.ones(1)} for part in PARTS}, **changes}


def test_without_a_difference_it_ends_with_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = {"results": {"ZClip": {"entry": {}, "left": left()}}, "own": {"ZClip": {"name": "ZClip"}}}
    monkeypatch.setattr(compare_commits, "run_tree", lambda *_: ran)
    assert main([str(ROOT), "--only", "ZClip"]) == 0
    assert capsys.readouterr().out.split() == ["ZClip", "same"]


def test_a_failed_run_differs_and_each_rank_is_compared() -> None:
    assert compare_runs(left(), {"error": "ValueError: no\n"}, PARTS) == ["new failed: ValueError: no"]
    assert compare_runs({"error": "E"}, {"error": "E"}, PARTS) == ["old failed: E", "new failed: E"]
    ranks = {"ranks": [left(), left()]}, {"ranks": [left(), left(messages=["a"])]}
    assert len(compare_runs(*ranks, PARTS)) == 1
    assert compare_runs(*ranks, ("weights",)) == []


def test_a_technique_that_is_new_does_not_differ_and_one_that_is_gone_is_told() -> None:
    old = {"results": {}, "own": {"Old-variant": {"name": "Old"}}}
    new = {"results": {"New": {"left": left()}}, "own": {"New": {"name": "New"}}}
    assert compare(old, new, PARTS) == {"New": []}
    assert table(old, new, {"New": []}).splitlines() == ["New  new", "Old  gone"]


def test_a_setting_that_an_older_constructor_does_not_take_gives_way_to_its_own() -> None:
    own = {"ZClip-plain": {"package": "callbacks", "name": "ZClip", "arguments": {"alpha": 0.9}}}
    taken = {"package": "callbacks", "name": "ZClip", "arguments": {"alpha": 0.5}}
    assert fitting(taken, own) == taken
    assert fitting({**taken, "arguments": {"of_the_future": 1}}, own) == own["ZClip-plain"]
    assert fitting({**taken, "name": "OfTheFuture"}, own) is None
