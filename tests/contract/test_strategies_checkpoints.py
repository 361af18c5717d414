"""G4 of strategies: the checkpoint is DDP's own, goes to plain runs and comes back from them."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_grad.testing import assert_identical, fit, loaders, make_classifier, on_ranks
from tests.contract.strategy_settings import CANONICAL, SCHEMES, Scheme
from tests.strategies.fits import finish, train_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

MANIFEST = "lightning_grad_ranks"


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


class RememberLogits(pl.Callback):
    """Keeps the logits of every validation by the step at which it ran."""

    def __init__(self) -> None:
        self.by_step: dict[int, list[torch.Tensor]] = {}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.by_step[trainer.global_step] = list(pl_module.validated)


def _every_epoch(folder: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_top_k=-1, monitor="val_loss")


class _WeightsSaver(ModelCheckpoint):
    """Saves weights alone; Lightning tells it by its name from one that saves everything."""


def _save(scheme: Scheme, folder: Path) -> dict[int, list[torch.Tensor]]:
    remembered = RememberLogits()
    weights = _WeightsSaver(folder / "True", save_top_k=-1, monitor="val_loss", save_weights_only=True)
    train_on_ranks(scheme.build(), [remembered, _every_epoch(folder / "False"), weights], scheme.module())
    return remembered.by_step


ALL, EACH = ([(scheme,) for scheme in schemes] for schemes in (SCHEMES, CANONICAL))


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoint_loads_strictly_into_the_plain_module_and_computes_what_was_validated(case, weights_only, together):
    (validated,), folder = together(_save, ALL, case, 1)
    paths = sorted(folder.glob(f"{weights_only}/*.ckpt"))
    assert len(paths) == 3
    for path in paths:
        assert_computes_what_was_validated(path, validated)
        assert (MANIFEST in torch.load(path, weights_only=True)) != weights_only
        assert path.with_name(path.name + ".ranks").exists() != weights_only


def _two_more_epochs_of_ddp(scheme: Scheme, folder: Path) -> int:
    train_on_ranks(scheme.build(), [_every_epoch(folder)], scheme.module())
    dist.barrier()
    path = max(folder.glob("*.ckpt"), key=lambda path: path.name)
    trainer, module = train_on_ranks("ddp", (), scheme.module(), ckpt=path, max_epochs=5)
    assert all(value.isfinite().all() for value in module.state_dict().values())
    return trainer.current_epoch


@pytest.mark.parametrize("case", EACH)
def test_checkpoint_goes_on_under_ddp_and_on_one_device(case, together):
    epochs, folder = together(_two_more_epochs_of_ddp, EACH, case)
    assert epochs == [5, 5]
    path, scheme = max(folder.glob("*.ckpt"), key=lambda path: path.name), case[0]
    trainer, module = fit([], scheme.module(), resumable=True, ckpt=path, max_epochs=5)
    assert trainer.current_epoch == 5
    assert not any(name.startswith("comm") for name in trainer.callback_metrics)
    plain = make_classifier()
    plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    assert_identical([*plain.state_dict()], [*module.state_dict()])


def test_ranks_that_lightning_forks_write_what_another_run_resumes(tmp_path):
    scheme = SCHEMES[0]
    saving = _every_epoch(tmp_path)
    fit([saving], scheme.module(), strategy=scheme.build(start_method="fork"), devices=2, max_epochs=3)
    path = max(tmp_path.glob("*.ckpt"), key=lambda path: path.name)
    assert {file.name for file in path.with_name(path.name + ".ranks").rglob("*.pt")} == {"0.pt", "1.pt"}
    module = scheme.module()
    trainer, _ = fit([], module, strategy="ddp_fork", devices=2, ckpt=path, max_epochs=4)
    assert trainer.callback_metrics["val_loss"].isfinite()


def _which_momentum_is_saved(scheme: Scheme, folder: Any) -> None:
    strategy = scheme.build()
    trainer, module = train_on_ranks(strategy, [], scheme.module(), max_epochs=1)
    trainer.save_checkpoint(folder / "dgc.ckpt")
    states = torch.load(folder / "dgc.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    names = [name for name, _ in module.named_parameters()]
    saved = {names[index] for index, state in states.items() if state.get("momentum_buffer") is not None}
    assert saved == set(names) - set(strategy.memory)


def test_the_checkpoint_of_dgc_holds_the_momentum_of_dense_parameters_only(tmp_path):
    """That of compressed ones differs by rank and stays in the rank files: a run that goes on under DDP begins it anew."""
    on_ranks(2, _which_momentum_is_saved, SCHEMES[0], tmp_path)


def test_momentum_goes_from_ddp_to_dgc(tmp_path):
    on_ranks(2, _from_ddp, SCHEMES[0], tmp_path)


_EVERYTHING = {"ratio": 0.9999999, "min_numel": 1, "momentum_masking": False, "warmup": None}


def _from_ddp(scheme: Scheme, folder: Any) -> None:
    trainer, _ = train_on_ranks("ddp", [], scheme.module(), max_epochs=2)
    trainer.save_checkpoint(folder / "plain.ckpt")
    expected = finish("ddp", module=scheme.module(), ckpt=folder / "plain.ckpt", max_epochs=5)
    strategy = scheme.build(**_EVERYTHING)
    trainer, module = train_on_ranks(strategy, [], scheme.module(), ckpt=folder / "plain.ckpt", max_epochs=5)
    assert strategy.memory, "nothing went the compressed way"
    for name, value in expected["module"].items():
        assert torch.allclose(value.double(), module.state_dict()[name].double(), rtol=1e-6, atol=1e-6), name


def _compare_kinds(scheme: Scheme, folder: Path) -> None:
    train_on_ranks("ddp", [_every_epoch(folder / "plain")], scheme.module())
    train_on_ranks(scheme.build(), [_every_epoch(folder / "ours")], scheme.module())
    for plain, ours in zip(*(sorted(folder.glob(f"{name}/*.ckpt")) for name in ("plain", "ours")), strict=True):
        a, b = (torch.load(path, weights_only=True) for path in (plain, ours))
        assert set(b) - set(a) == {MANIFEST}
        assert [*a["state_dict"]] == [*b["state_dict"]]
        for left, right in zip(a["optimizer_states"], b["optimizer_states"], strict=True):
            assert_identical(left["param_groups"], right["param_groups"])


@pytest.mark.parametrize("case", EACH)
def test_checkpoint_differs_from_ddps_by_its_manifest_only(case, together):
    together(_compare_kinds, EACH, case, 1)
