"""Without matplotlib each technique that would draw says so once, when the fit begins, and runs as it did."""

import importlib.util
import logging
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_grad.testing import fit
from lightning_grad.utilities import reporting
from tests.contract.settings import CANONICAL

COMMAND = "pip install 'lightning-grad[plot]'"
DRAWS = [t for t in CANONICAL if t.name in ("NMSparsity", "GradientMonitor", "AccuracyGradientLR")]


@pytest.mark.parametrize("figure", [True, False])
@pytest.mark.parametrize("technique", DRAWS, ids=str)
def test_it_is_said_once_at_the_start(technique, figure, tmp_path, monkeypatch, caplog):
    def find_spec(name: str, *arguments: Any) -> Any:
        return None if name == "matplotlib" else importlib.util.find_spec(name, *arguments)

    monkeypatch.setattr(reporting, "find_spec", find_spec)
    caplog.set_level(logging.INFO)
    at_start: list[str] = []
    callback = technique.build(figure=figure)
    monkeypatch.setattr(
        callback, "on_train_start", lambda *_, inner=callback.on_train_start: (at_start.extend(told(caplog)), inner(*_))
    )
    fit([callback], logger=CSVLogger(tmp_path), max_epochs=2)
    assert told(caplog) == at_start
    assert len(at_start) == figure
    assert not list(tmp_path.rglob("*.png"))


def told(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if COMMAND in record.getMessage()]
