"""G3: after a fit, an exception or Ctrl-C nothing of a technique is left on the module, the optimizers or the trainer."""

import copy
import io
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_grad.callbacks import NMSparsity
from lightning_grad.testing import PicklerOfNoRun, assert_identical, fit, make_classifier
from tests.contract.recorded import bare, end, ended_without, reused, run, watched
from tests.contract.settings import BROAD, build_together


@pytest.mark.parametrize("technique", BROAD, ids=str)
@pytest.mark.parametrize("how", ["success", "exception", "interrupt", "in on_fit_start"])
def test_nothing_is_left(technique, how):
    if how == "success":
        bare(technique).assert_nothing_is_left(bare(None))
    elif how == "exception":
        reused(technique).broken.assert_nothing_is_left(reused(None).broken)
    else:
        end([technique.build()], how).assert_nothing_is_left(ended_without(how))


@pytest.mark.parametrize("how", ["success", "exception", "interrupt", "in on_fit_start"])
def test_nothing_is_left_of_several_together(how):
    techniques = build_together()
    before = [set(vars(technique)) for technique in techniques]
    plain = bare(None) if how == "success" else ended_without(how)
    (run(techniques) if how == "success" else end(techniques, how)).assert_nothing_is_left(plain)
    for technique, attributes in zip(techniques, before, strict=True):
        assert "on_before_optimizer_step" not in set(vars(technique)) - attributes


@pytest.mark.parametrize("technique", BROAD, ids=str)
@pytest.mark.parametrize("after", ["after_an_exception", "after_a_validation"])
def test_another_fit_of_a_callback_equals_its_first(technique, after):
    """After a fit that broke off, and after a whole fit and a validation."""
    assert_identical(bare(technique).weights, getattr(reused(technique), after).weights)


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_callback_pickles_and_copies_before_and_after_a_fit(technique):
    for callback in (technique.build(), *bare(technique).callbacks):
        for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
            assert twin.settings == callback.settings
            assert twin.state_key == callback.state_key


class _PickleInFit(pl.Callback):
    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        PicklerOfNoRun(io.BytesIO()).dump(self.callback)


def test_frozen_variances_copied_in_mid_fit_leave_the_optimizer_behind():
    module, callback = make_classifier(), NMSparsity(recipe="step", dense_fraction=0.0, figure=False)
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters())
    fit([callback, _PickleInFit(callback)], module, max_epochs=1)


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_module_copied_in_mid_fit_is_plain_and_computes_the_same(technique):
    """The callback is copied in mid-fit there too, and leaves the run behind."""
    plain, watch = make_classifier().encoder, watched(technique).watch
    assert watch.copies
    for twin, expected in watch.copies:
        twin.eval()
        assert {type(child) for child in twin.modules()} == {type(child) for child in plain.modules()}
        with torch.no_grad():
            assert torch.equal(twin(watch.inputs), expected)
