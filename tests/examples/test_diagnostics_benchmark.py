"""The benchmark of diagnostics runs, and watches and stops where it says. Nothing about speed."""

import json
import logging
from collections.abc import Iterator

import pytest
import torch

from benchmarks import diagnostics
from benchmarks.common import Clock, timed_fit
from lightning_grad.callbacks import TrainingDoctor

# What Lightning says about itself and about fits of a few steps.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]


@pytest.fixture(autouse=True)
def _lightnings_own_log_level() -> Iterator[None]:
    """Undo what the scripts set for the whole process."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_it_measures_everything(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(diagnostics, "STEPS", {diagnostics.SMALLEST: 8})
    diagnostics.main(["--quick", "--out", str(tmp_path / "speed.json")])
    assert "Budgets missed: nothing." in capsys.readouterr().out
    rows = json.loads((tmp_path / "speed.json").read_text())[diagnostics.SMALLEST]
    assert sum(row["name"] == "without, again" for row in rows) == 2
    assert all(row["milliseconds"] > 0 for row in rows)


def test_variants_watch_and_stop():
    timed = []
    for variant in (diagnostics.watching, diagnostics.stopped):
        callbacks = variant()
        timed_fit(*diagnostics.MODELS[diagnostics.SMALLEST](), 6, callbacks, Clock("cpu"))
        doctor = next(callback for callback in callbacks if isinstance(callback, TrainingDoctor))
        timed.append(sum(row["milliseconds"] > 0 for row in doctor.rows) > 0)
        assert (doctor.rows[0]["host_syncs"] is None) == (variant is diagnostics.watching)
    assert timed == [True, True]


def test_looks_are_compared_with_steps(monkeypatch):
    monkeypatch.setattr(diagnostics, "LOOKS_OF_A_ROUND", 1)
    rows = diagnostics.look_rows(1, Clock("cpu"), ["GradCAMLogger, 8 images"])
    assert [row.name for row in rows[2:]] == [f"{diagnostics.STEP}, again", "GradCAMLogger, 8 images"]
    assert rows[-1].baseline == diagnostics.EVALUATION
    assert all(row.milliseconds > 0 for row in rows)
