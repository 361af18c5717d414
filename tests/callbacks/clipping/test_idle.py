"""A rule with an infinite threshold does nothing between log steps, and still logs at them."""

import pytest

from lightning_grad import callbacks
from lightning_grad.testing.reference import fit

RULES = ["NormClipping", "LayerwiseClipping", "AdaptiveGradientClipping", "ValueClipping", "SpikeClipping"]


@pytest.mark.parametrize("name", RULES)
def test_infinite_thresholds_log_and_act_only_at_log_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    technique = getattr(callbacks, name)
    callback, measured = technique(**{**technique.trial, **technique.neutral}), []
    condition = callback.condition

    def counted(step: object) -> object:
        values = condition(step)
        measured.append((step.measured, bool(values)))  # type: ignore[attr-defined]
        return values

    monkeypatch.setattr(callback, "condition", counted)
    trainer, _ = fit([callback], max_epochs=1, log_every_n_steps=3)
    assert measured == [(False, False), (False, False), (True, True)] * 2
    logged = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("grad/")}
    assert logged
    assert all(value == 0.0 for key, value in logged.items() if "clipped" in key)
