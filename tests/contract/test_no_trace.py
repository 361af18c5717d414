"""G3: after a fit nothing of several techniques together is left; copies have the settings, and leave the run behind."""

import copy
import io
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_grad.callbacks import NMSparsity
from lightning_grad.testing import PicklerOfNoRun, fit, make_classifier
from lightning_grad.testing.checks.g3_no_trace import assert_nothing_is_left
from tests.contract.recorded import PLAIN, bare, broken, run
from tests.contract.settings import BROAD, build_together


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_copies_have_the_settings_of_the_original(technique: Any) -> None:
    for callback in (technique.build(), *bare(technique).callbacks):
        for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
            assert twin.settings == callback.settings


@pytest.mark.parametrize("how", ["success", "exception", "interrupt", "in on_fit_start"])
def test_nothing_is_left_of_several_together(how: str) -> None:
    techniques = build_together()
    before = [set(vars(technique)) for technique in techniques]
    if how == "success":
        assert_nothing_is_left(run(techniques), bare(None))
    else:
        assert_nothing_is_left(PLAIN.break_off(techniques, how), broken(None, how))
    for technique, attributes in zip(techniques, before, strict=True):
        assert "on_before_optimizer_step" not in set(vars(technique)) - attributes


class _PickleInFit(pl.Callback):
    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        PicklerOfNoRun(io.BytesIO()).dump(self.callback)


def test_frozen_variances_copied_in_mid_fit_leave_the_optimizer_behind() -> None:
    module, callback = make_classifier(), NMSparsity(recipe="step", dense_fraction=0.0, figure=False)
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters())
    fit([callback, _PickleInFit(callback)], module, max_epochs=1)
