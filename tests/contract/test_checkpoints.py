"""G4: every checkpoint loads strictly into the plain module and computes what was validated."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_grad.testing import assert_identical, fit, loaders, make_classifier
from tests.contract.recorded import STEP, Watch, reused, watched
from tests.contract.settings import BROAD, TECHNIQUES

# These runs monitor val_loss from the first epoch on, which the technique may rightly warn about.
pytestmark = pytest.mark.filterwarnings("ignore:.*the best checkpoint")


def logits_of(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Load into a module on a machine without lightning-grad, and validate."""
    plain = make_classifier()
    plain.load_state_dict(state, strict=True)
    plain.eval()
    with torch.no_grad():
        return [plain(x) for x, _ in loaders()[1]]


def assert_computes_what_was_validated(path: Any, logits: dict[int, list[torch.Tensor]]) -> None:
    checkpoint = torch.load(path, weights_only=True)
    for ours, theirs in zip(logits_of(checkpoint["state_dict"]), logits[checkpoint["global_step"]], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
@pytest.mark.parametrize("kind", ["epochs", "weights"])
def test_every_checkpoint_computes_what_was_validated(technique, kind):
    run = watched(technique)
    paths = sorted((run.folder / kind).glob("*.ckpt"))
    assert len(paths) == (5 if kind == "epochs" else 4)
    for path in paths:
        assert_computes_what_was_validated(path, run.watch.logits)


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_beside_weight_averaging_in_either_order(technique, tmp_path):
    ends = []
    for ema_first in (False, True):
        pair, folder = [technique.build(), EMAWeightAveraging(decay=0.8)], tmp_path / str(ema_first)
        watch = Watch(pair[0])
        saving = ModelCheckpoint(folder, save_top_k=-1, monitor="val_loss")
        _, module = fit([*(reversed(pair) if ema_first else pair), watch, saving])
        paths = sorted(folder.glob("*.ckpt"))
        assert len(paths) == 4
        for path in paths:
            assert_computes_what_was_validated(path, watch.logits)
        ends.append(dict(module.state_dict()))
    assert_identical(*ends)


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_checkpoint_on_exception_computes_what_a_validation_would_have(technique):
    """Whoever writes it, and with or without optimizers, it holds the weights that another checkpoint has there."""
    step = torch.load(watched(technique).saved("steps")[STEP], weights_only=True)
    saved = reused(technique).saved
    assert saved.keys() == {"on_exception", "full", "weights", "by_hand"}
    for who, checkpoint in saved.items():
        assert checkpoint["global_step"] == STEP
        assert_identical(dict(step["state_dict"]), dict(checkpoint["state_dict"]), who)


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_state_dict_in_mid_fit_has_the_plain_keys_in_the_plain_order(technique):
    plain, seen = make_classifier(), watched(technique).watch.keys
    assert seen == [[*plain.state_dict(), *dict(plain.named_parameters())]] * len(seen)
    assert seen


@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_callback_state_is_made_of_plain_types(technique):
    def check(value: Any) -> None:
        assert isinstance(value, (torch.Tensor, int, float, str, bool, list, dict, type(None))), type(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(item)

    callback = technique.build()
    for path in watched(technique).saved("epochs").values():
        checkpoint = torch.load(path, weights_only=True)
        if callback.state_dict():
            check(checkpoint["callbacks"][callback.state_key])
