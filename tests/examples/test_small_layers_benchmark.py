"""The benchmark of many small layers runs with every callback, and nothing grows faster than the number of layers."""

import gc
import json
from collections.abc import Callable
from cProfile import Profile
from types import CodeType
from typing import Any

import pytest
from lightning.pytorch import Callback

from benchmarks import small_layers
from benchmarks.common import Clock
from benchmarks.passes import _COUNTED
from benchmarks.small_layers import AGAIN, MEASURED, PLAIN, Times, growth_rows, timed_fit, variants

# What Lightning says about itself, and about fits of a few steps.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*the run stopped at 50 % of its schedule.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_layers, "STEPS", 2)


def test_it_measures_every_callback(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(small_layers, "LAYERS", dict.fromkeys(small_layers.LAYERS, (3, 8)))
    monkeypatch.setattr(small_layers, "STEP_BUDGETS", {})
    small_layers.main(["--quick", "--out", str(tmp_path / "speed.json")])
    assert "Budgets missed:" in capsys.readouterr().out
    tables = json.loads((tmp_path / "speed.json").read_text())
    for name in small_layers.LAYERS:
        assert [row["name"] for row in tables[name]] == [PLAIN, *MEASURED, AGAIN]
        assert all(row["milliseconds"] > 0 for row in tables[name])


def test_growth_counts_what_a_callback_adds():
    few = {PLAIN: Times(10.0, 1000.0), AGAIN: Times(10.0, 1000.0), "A": Times(12.0, 1500.0)}
    many = {PLAIN: Times(40.0, 4000.0), AGAIN: Times(40.0, 4000.0), "A": Times(48.0, 12000.0)}
    step, start = growth_rows(few, many)
    assert (step.ratio, start.ratio) == (4.0, 16.0)
    assert growth_rows({**few, "A": Times(10.1, 1001.0)}, many) == []


def calls_of_a_fit(with_callbacks: Callable[[], list[Callback]], layers: int) -> int:
    """Count the calls of functions in this package and in torch, and what these call that is not written in Python."""
    profile = Profile()
    gc.disable()  # what it finds depends on the tests before
    profile.enable()
    try:
        timed_fit((layers, 8), with_callbacks, Clock("cpu"), lambda: None)
    finally:
        profile.disable()
        gc.enable()
    counted = [
        entry
        for entry in profile.getstats()
        if isinstance(entry.code, CodeType) and entry.code.co_filename.startswith(_COUNTED)
    ]
    called = [call for entry in counted for call in entry.calls or () if isinstance(call.code, str)]
    return sum(entry.callcount for entry in [*counted, *called])


def is_linear(with_callbacks: Callable[[], list[Callback]]) -> bool:
    timed_fit((3, 8), with_callbacks, Clock("cpu"), lambda: None)  # imports
    small, middle, large = (calls_of_a_fit(with_callbacks, layers) for layers in (6, 12, 18))
    return large - middle == pytest.approx(middle - small, rel=0.04)


# They run the network again: LearnedRounding for each layer at the end of the fit; the probes as often as it
# takes to be sure of what they find. How many layers LowRankFinetuning and SparseUpdate train depends on the weights.
NOT_LINEAR = ("LearnedRounding", "HessianSpectrum", "GradientDiversity", "LowRankFinetuning", "SparseUpdate")


@pytest.mark.parametrize("name", [name for name in MEASURED if name not in NOT_LINEAR])
def test_calls_grow_in_proportion_to_the_layers(name: str) -> None:
    assert is_linear(variants([name])[name])


def test_a_list_of_all_parameters_for_each_of_them_does_not() -> None:
    class Naive(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            for parameter in pl_module.parameters():
                [other for other in pl_module.parameters() if other is not parameter]

    assert not is_linear(lambda: [Naive()])
