"""G4: every checkpoint loads strictly into the plain module and computes what was validated."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint

from lightning_grad.testing import StopAt, fit, loaders, make_classifier
from tests.contract.settings import BROAD, CANONICAL, TECHNIQUES

# These runs monitor val_loss from the first epoch on, which the technique may rightly warn about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the best checkpoint"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


class RememberLogits(pl.Callback):
    """Keeps the logits of every validation by the step at which it ran."""

    def __init__(self) -> None:
        self.by_step: dict[int, list[torch.Tensor]] = {}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.by_step[trainer.global_step] = list(pl_module.validated)


def logits_of(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Load into a module on a machine without lightning-grad, and validate."""
    plain = make_classifier()
    plain.load_state_dict(state, strict=True)
    plain.eval()
    with torch.no_grad():
        return [plain(x) for x, _ in loaders()[1]]


def assert_computes_what_was_validated(path: Any, remembered: RememberLogits) -> None:
    checkpoint = torch.load(path, weights_only=True)
    for ours, theirs in zip(
        logits_of(checkpoint["state_dict"]), remembered.by_step[checkpoint["global_step"]], strict=True
    ):
        assert torch.equal(ours, theirs)


_ALL_AND_WEIGHTS_ONLY = [*((t, False) for t in TECHNIQUES), *((t, True) for t in CANONICAL)]


@pytest.mark.parametrize(("technique", "weights_only"), _ALL_AND_WEIGHTS_ONLY, ids=str)
def test_every_checkpoint_computes_what_was_validated(technique, weights_only, tmp_path):
    remembered = RememberLogits()
    saving = ModelCheckpoint(
        tmp_path, save_top_k=-1, monitor="val_loss", save_last=True, save_weights_only=weights_only
    )
    fit([technique.build(), remembered, saving])
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 5
    for path in paths:
        assert_computes_what_was_validated(path, remembered)


@pytest.mark.parametrize("technique", BROAD, ids=str)
@pytest.mark.parametrize("ema_first", [False, True])
def test_beside_weight_averaging_in_either_order(technique, ema_first, tmp_path):
    remembered = RememberLogits()
    pair = [technique.build(), EMAWeightAveraging(decay=0.8)]
    fit(
        [
            *(reversed(pair) if ema_first else pair),
            remembered,
            ModelCheckpoint(tmp_path, save_top_k=-1, monitor="val_loss"),
        ]
    )
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 4
    for path in paths:
        assert_computes_what_was_validated(path, remembered)


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_order_beside_weight_averaging_makes_no_difference(technique):
    _, one = fit([technique.build(), EMAWeightAveraging(decay=0.8)])
    _, other = fit([EMAWeightAveraging(decay=0.8), technique.build()])
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize(
    ("technique", "weights_only"), [*((t, False) for t in BROAD), *((t, True) for t in CANONICAL)], ids=str
)
def test_checkpoint_on_exception_computes_what_a_validation_would_have(technique, weights_only, tmp_path):
    step = 14
    remembered = RememberLogits()
    every = ModelCheckpoint(tmp_path / "every", save_top_k=-1, every_n_train_steps=1, save_weights_only=weights_only)
    fit([technique.build(), remembered, every], limit_val_batches=1)
    on_exception = ModelCheckpoint(tmp_path / "stop", save_on_exception=True, save_weights_only=weights_only)
    with pytest.raises(RuntimeError):
        fit([technique.build(), StopAt(step), on_exception], limit_val_batches=1)
    saved = [torch.load(p, weights_only=True) for p in (tmp_path / "stop").glob("*.ckpt")]
    expected = [torch.load(p, weights_only=True) for p in (tmp_path / "every").glob("*.ckpt")]
    saved_state = next(c["state_dict"] for c in saved if c["global_step"] == step)
    expected_state = next(c["state_dict"] for c in expected if c["global_step"] == step)
    for key, value in expected_state.items():
        assert torch.equal(value, saved_state[key]), key


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_on_exception_checkpoint_and_one_saved_by_hand_hold_the_same(technique, tmp_path):
    trainers: list[Any] = []
    stop = StopAt(14)
    stop.setup = lambda trainer, *_, **__: trainers.append(trainer)
    with pytest.raises(RuntimeError):
        fit([technique.build(), stop, OnExceptionCheckpoint(tmp_path)])
    trainers[0].save_checkpoint(tmp_path / "by_hand.ckpt")
    first = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["state_dict"]
    second = torch.load(tmp_path / "by_hand.ckpt", weights_only=True)["state_dict"]
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_state_dict_in_mid_fit_has_the_plain_keys_in_the_plain_order(technique):
    seen: list[list[str]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append([*pl_module.state_dict(), *dict(pl_module.named_parameters())])

    fit([technique.build(), Look()])
    plain = make_classifier()
    assert seen == [[*plain.state_dict(), *dict(plain.named_parameters())]] * len(seen)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_callback_state_is_made_of_plain_types(technique, tmp_path):
    def check(value: Any) -> None:
        assert isinstance(value, (torch.Tensor, int, float, str, bool, list, dict, type(None))), type(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(item)

    fit([technique.build(), ModelCheckpoint(tmp_path)])
    checkpoint = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)
    callback = technique.build()
    if callback.state_dict():
        check(checkpoint["callbacks"][callback.state_key])
