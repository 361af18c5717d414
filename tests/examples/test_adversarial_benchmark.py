"""The benchmark of the adversarial family runs, and each of its variants does what its name says. Nothing about speed."""

import json
import logging
from collections.abc import Iterator

import pytest
import torch
from plain_project import ResidualConvNet
from torch import nn

from benchmarks import adversarial
from benchmarks.adversarial import BY_HAND, CONVNET, FGSM, MANY_LAYERS, PLAIN, SMALL, TRANSFORMER, VALIDATION, Sizes
from benchmarks.common import Clock

TINY = Sizes(steps=2, small_steps=2, many_layers_steps=2, samples=4, epoch=8, width=2)

# What Lightning says about itself and about fits of few steps.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]


@pytest.fixture(autouse=True)
def _settings_of_the_process() -> Iterator[None]:
    """Undo what the script sets for the whole process."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """Make all networks tiny; return whether each call of one is a training step."""
    seen: list[bool] = []

    class Counted(ResidualConvNet):
        def training_step(self, batch, batch_idx):
            seen.append(True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            seen.append(False)
            return super().validation_step(batch, batch_idx)

    def build(channels, size):
        module = Counted(channels, 2, (1,), schedule="constant", optimizer="sgd", lr=0.01)
        return lambda *_: (module, adversarial.images(3, channels, size))

    monkeypatch.setitem(adversarial.SIZES, "cpu", TINY)
    monkeypatch.setattr(adversarial, "convnet", build(3, 8))
    monkeypatch.setattr(adversarial, "transformer", build(3, 8))
    monkeypatch.setattr(adversarial, "small_convnet", build(1, 8))
    monkeypatch.setattr(adversarial, "many_layers", build(3, 8))
    monkeypatch.setattr(adversarial, "EPOCHS", 3)
    return seen


def test_it_measures_everything(calls, tmp_path, capsys):
    adversarial.main(["--quick", "--out", str(tmp_path / "speed.json")])
    printed = capsys.readouterr().out
    tables = json.loads((tmp_path / "speed.json").read_text())
    titles = [
        *(f"A step of {name}" for name in (SMALL, CONVNET, TRANSFORMER, MANY_LAYERS)),
        "A validation pass",
        "An epoch",
    ]
    assert set(titles) <= set(tables)
    assert all(f"\n{title}\n" in printed for title in titles)
    assert all(row["ratio"] > 0 for title in titles for row in tables[title])
    budgets = {row["name"]: row["budget"] for row in tables[f"A step of {CONVNET}"]}
    names = [PLAIN, f"{PLAIN}, again", BY_HAND, FGSM, "PGD-2", "PGD-5", "PGD-10"]
    assert budgets == pytest.approx(dict(zip(names, [None, None, None, 1.95, 3.1, 6.1, 11.1], strict=True)))
    layers = tables[f"A step of {MANY_LAYERS}"]
    assert [(row["name"], row["baseline"]) for row in layers if row["budget"] is not None] == [(FGSM, BY_HAND)]
    compared = [(row["name"], row["baseline"]) for row in tables["A validation pass"] if row["budget"] is not None]
    assert compared == [(f"AdversarialEvaluation(steps={k})", f"by hand, steps={k}") for k in (1, 20)]
    assert "Budgets missed: " in printed


def test_steps_are_attacked_as_often_as_their_names_say(calls, monkeypatch):
    counted = {}

    def count(module, batch, steps, callbacks, clock):
        calls.clear()
        periods = timed_fit(module, batch, steps, callbacks, clock)
        counted[len(counted)] = len(calls) / (steps + 3)  # with warm steps and the last one
        return periods

    timed_fit = adversarial.timed_fit
    monkeypatch.setattr(adversarial, "timed_fit", count)
    rows = adversarial.step_rows(adversarial.convnet, 2, 1, Clock("cpu"))
    assert list(counted.values()) == [1, 1, 2, 2, 3, 6, 11]
    assert [row.name for row in rows][2:] == [BY_HAND, FGSM, "PGD-2", "PGD-5", "PGD-10"]


def test_a_validation_is_attacked_as_often_as_its_name_says(calls, monkeypatch):
    counted, forward = {}, [0]
    module, _ = adversarial.convnet()
    module.register_forward_hook(lambda *_: forward.__setitem__(0, forward[0] + 1))

    def count(functions, rounds, clock):
        for name, function in functions.items():
            calls.clear()
            forward[0] = 0
            function()
            counted[name] = forward[0] if name.startswith("by hand") else len(calls)
        return dict.fromkeys(functions, 1.0)

    monkeypatch.setattr(adversarial, "medians", count)
    adversarial.evaluation_rows(TINY, 1, Clock("cpu"))
    assert counted[VALIDATION] == counted[f"{VALIDATION}, again"] == 1
    found = [
        [counted[name.format(k)] for k in (1, 20)] for name in ("by hand, steps={}", "AdversarialEvaluation(steps={})")
    ]
    assert found == [[3, 22], [3, 22]]


def test_epochs_are_counted_without_the_first_and_the_last(calls):
    assert len(adversarial.epochs_with([], TINY, Clock("cpu"))) == adversarial.EPOCHS - 2
    assert calls.count(False) > 0


def test_the_small_network_is_small():
    module, (inputs, labels) = adversarial.small_convnet(TINY)
    assert sum(p.numel() for p in module.parameters()) < 1000
    assert inputs.shape == (64, 1, 8, 8)
    assert isinstance(module, nn.Module)
    assert labels.max() < 10
