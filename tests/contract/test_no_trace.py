"""G3: after a fit, an exception or Ctrl-C nothing of a technique is left on the module, the optimizers or the trainer."""

import copy
import io
import pickle
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_grad.callbacks import NMSparsity
from lightning_grad.testing import PicklerOfNoRun, StopAt, fit, make_classifier, traces, trainer_traces
from tests.contract.settings import BROAD, build_together


def _fit_and_end(callbacks: list[Any], how: str) -> tuple[Any, Any]:
    """Fit a fresh module and end as asked; return the trainer and the module."""
    module, trainers = make_classifier(), []
    stop = StopAt(8 if how != "in on_fit_start" else -1, KeyboardInterrupt if how == "interrupt" else RuntimeError)
    stop.setup = lambda trainer, *_, **__: trainers.append(trainer)
    if how == "in on_fit_start":
        stop.on_fit_start = lambda trainer, *_: stop.on_train_batch_start(SimpleNamespace(global_step=-1))
    if how == "success":
        fit([*callbacks, pl.Callback()], module)
        return module.trainer, module
    with pytest.raises((RuntimeError, SystemExit)):
        fit([*callbacks, stop], module)
    return trainers[0], module


@pytest.mark.parametrize("technique", BROAD, ids=str)
@pytest.mark.parametrize("how", ["success", "exception", "interrupt", "in on_fit_start"])
def test_nothing_is_left(technique, how):
    plain_trainer, plain = _fit_and_end([], how)
    trainer, module = _fit_and_end([technique.build()], how)
    assert traces(module) == traces(plain)
    assert trainer_traces(trainer) == trainer_traces(plain_trainer)
    pickle.loads(pickle.dumps(module.encoder))
    pickle.loads(pickle.dumps(module.mix))


@pytest.mark.parametrize("how", ["success", "exception", "interrupt", "in on_fit_start"])
def test_nothing_is_left_of_several_together(how):
    plain_trainer, plain = _fit_and_end([], how)
    techniques = build_together()
    before = [set(vars(technique)) for technique in techniques]
    trainer, module = _fit_and_end(techniques, how)
    assert traces(module) == traces(plain)
    assert trainer_traces(trainer) == trainer_traces(plain_trainer)
    for technique, attributes in zip(techniques, before, strict=True):
        assert "on_before_optimizer_step" not in set(vars(technique)) - attributes


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_second_fit_with_the_same_objects_works(technique):
    callback, module = technique.build(), make_classifier()
    first, _ = fit([callback], module)
    expected = {key: value.clone() for key, value in module.state_dict().items()}
    again = make_classifier()
    fit([callback], again)
    for key, value in again.state_dict().items():
        assert torch.equal(value, expected[key]), key
    del first


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_fit_after_an_exception_equals_a_fresh_fit(technique):
    callback = technique.build()
    with pytest.raises(RuntimeError):
        fit([callback, StopAt(8)])
    _, after = fit([callback])
    _, fresh = fit([technique.build()])
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, after.state_dict()[key]), key


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_callback_pickles_and_copies_before_and_after_a_fit(technique):
    callback = technique.build()
    for _ in range(2):
        for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
            assert twin.settings == callback.settings
            assert twin.state_key == callback.state_key
        fit([callback])


class _PickleInFit(pl.Callback):
    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        PicklerOfNoRun(io.BytesIO()).dump(self.callback)


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_callback_copied_in_mid_fit_leaves_the_run_behind(technique):
    callback = technique.build()
    fit([callback, _PickleInFit(callback)], max_epochs=2)


def test_frozen_variances_copied_in_mid_fit_leave_the_optimizer_behind():
    module, callback = make_classifier(), NMSparsity(recipe="step", dense_fraction=0.0, figure=False)
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters())
    fit([callback, _PickleInFit(callback)], module, max_epochs=1)


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_module_copied_in_mid_fit_is_plain_and_computes_the_same(technique):
    copies: list[tuple[nn.Module, torch.Tensor]] = []
    x = torch.randn(3, 4, 16)

    class CopyInValidation(pl.Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            with torch.inference_mode(False), torch.no_grad():
                for twin in (copy.deepcopy(pl_module.encoder), pickle.loads(pickle.dumps(pl_module.encoder))):
                    copies.append((twin, pl_module.encoder(x).clone()))

    plain = make_classifier().encoder
    fit([technique.build(), CopyInValidation()])
    assert copies
    for twin, expected in copies:
        twin.eval()
        assert {type(child) for child in twin.modules()} == {type(child) for child in plain.modules()}
        with torch.no_grad():
            assert torch.equal(twin(x), expected)
