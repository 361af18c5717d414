"""Files of adapters: small, checked against the module, and merged to the weights of the checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_grad.callbacks import LoRA
from lightning_grad.testing import assert_identical, fit, make_classifier
from lightning_grad.utilities import load_adapters, save_adapters


def trained(folder: Path, *loras: LoRA, **arguments: Any) -> Path:
    """Train, and return the checkpoint of the last epoch."""
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, **arguments)
    fit([*loras, saving], max_epochs=2)
    return folder / "epoch=1.ckpt"


def weights_in(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True)["state_dict"])


@pytest.mark.parametrize("init", ["default", "ga"])
def test_the_loaded_module_is_that_of_the_checkpoint(init: Any, tmp_path: Path) -> None:
    checkpoint = trained(tmp_path, LoRA(2, init=init, also_train=["head"]))
    save_adapters(checkpoint, tmp_path / "adapters.pt")
    module = make_classifier()
    load_adapters(module, tmp_path / "adapters.pt")
    loaded, expected = dict(module.state_dict()), weights_in(checkpoint)
    if init == "default":
        assert_identical(loaded, expected)
    else:  # the run trained on shifted weights
        adapted = {name for name, value in expected.items() if not torch.equal(value, loaded[name])}
        assert adapted
        assert all(torch.allclose(loaded[name], value, atol=1e-6) for name, value in expected.items())
        assert adapted == {name for name in adapted if "weight" in name and "head" not in name}, "all else bit for bit"
    moved = torch.load(tmp_path / "adapters.pt", weights_only=True)["others"]
    assert {"head.weight", "head.bias", "norm.running_mean", "norm.num_batches_tracked"} <= moved.keys()


def test_the_file_is_smaller_than_the_weights(tmp_path: Path) -> None:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(256, 256)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    saving = ModelCheckpoint(tmp_path, "all")
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[LoRA(2), saving], logger=False, accelerator="cpu", log_every_n_steps=1
    )
    trainer.fit(Module(), DataLoader(torch.randn(8, 256), 8))
    save_adapters(tmp_path / "all.ckpt", tmp_path / "adapters.pt")
    assert (tmp_path / "adapters.pt").stat().st_size < 0.1 * (tmp_path / "all.ckpt").stat().st_size


def test_adapters_of_two_instances(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path, LoRA(2, exclude=["head"]), LoRA(1, include=["head"], name="head"))
    save_adapters(torch.load(checkpoint, weights_only=True), tmp_path / "adapters.pt")
    module = make_classifier()
    load_adapters(module, tmp_path / "adapters.pt")
    assert_identical(dict(module.state_dict()), weights_in(checkpoint))


def test_a_resumed_run_knows_the_pretrained_weights(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path, LoRA(2))
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit([LoRA(2), saving], max_epochs=3, ckpt=checkpoint)
    save_adapters(tmp_path / "epoch=2.ckpt", tmp_path / "adapters.pt")
    module = make_classifier()
    load_adapters(module, tmp_path / "adapters.pt")
    assert_identical(dict(module.state_dict()), weights_in(tmp_path / "epoch=2.ckpt"))


def test_a_checkpoint_after_the_fit_has_adapters(tmp_path: Path) -> None:
    trainer, trained_module = fit([LoRA(2)])
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    save_adapters(tmp_path / "after.ckpt", tmp_path / "adapters.pt")
    module = make_classifier()
    load_adapters(module, tmp_path / "adapters.pt")
    assert_identical(dict(module.state_dict()), dict(trained_module.state_dict()))


def test_checkpoints_without_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no adapters\. .* without save_weights_only=True"):
        save_adapters(trained(tmp_path, LoRA(2), save_weights_only=True), tmp_path / "adapters.pt")
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapters(trained(tmp_path / "off", LoRA(0)), tmp_path / "adapters.pt")


def changed(module: Any, how: str) -> Any:
    if how == "weights":
        with torch.no_grad():
            module.hidden.weight[0, 0] += 1e-3
    elif how == "type":
        module.double()
    elif how == "name":
        module.concealed = module.hidden
        del module.hidden
    elif how == "shape":
        module.head = nn.Linear(32, 7)
    return module


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            "weights",
            r"'hidden\.weight' was trained on another weight than the one of the module \(torch.float32",
        ),
        ("type", "was trained on another weight"),
        ("name", r"has 'hidden\.weight', but .* has no such parameter or buffer"),
        ("shape", r"'head\.\w+' must have shape \(4.*\), as in the file; got \(7"),
    ],
)
def test_another_module_is_refused_and_unchanged(how: str, words: str, tmp_path: Path) -> None:
    save_adapters(trained(tmp_path, LoRA(2, also_train=["head"])), tmp_path / "adapters.pt")
    module = changed(make_classifier(), how)
    before = copy.deepcopy(dict(module.state_dict()))
    with pytest.raises(ValueError, match=words):
        load_adapters(module, tmp_path / "adapters.pt")
    assert_identical(dict(module.state_dict()), before)


def test_merging_twice_is_refused(tmp_path: Path) -> None:
    save_adapters(trained(tmp_path, LoRA(2)), tmp_path / "adapters.pt")
    module = make_classifier()
    load_adapters(module, tmp_path / "adapters.pt")
    with pytest.raises(ValueError, match="merge adapters only once"):
        load_adapters(module, tmp_path / "adapters.pt")


def test_adapters_of_weights_that_were_loaded_in_the_fit_belong_to_these(tmp_path: Path) -> None:
    half = {name: value / 2 for name, value in make_classifier().state_dict().items()}

    class Loads(LoRA):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.load_state_dict(half)

    save_adapters(trained(tmp_path, Loads(2)), tmp_path / "adapters.pt")
    with pytest.raises(ValueError, match="trained on another weight"):
        load_adapters(make_classifier(), tmp_path / "adapters.pt")
    module = make_classifier()
    module.load_state_dict(half)
    load_adapters(module, tmp_path / "adapters.pt")
    assert_identical(dict(module.state_dict()), weights_in(tmp_path / "epoch=1.ckpt"))


def test_a_checkpoint_is_no_file_of_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no adapters"):
        load_adapters(make_classifier(), trained(tmp_path, LoRA(2)))
