"""What only a GPU can show: run ``pytest -m needs_gpu -n 0`` on a machine with one.

Without a GPU these tests are skipped, and their code runs on the CPU for one technique, so that it stays right.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_grad.functional import nm_mask
from lightning_grad.testing import assert_identical, fit, make_classifier, on_ranks
from lightning_grad.utilities import export_semi_structured
from tests.contract import gpu_ranks
from tests.contract.settings import CANONICAL
from tests.contract.strategy_settings import CANONICAL as STRATEGIES


def on_gpu(count: int = 1) -> list[Any]:
    reason = "needs an NVIDIA GPU" if count == 1 else f"needs {count} NVIDIA GPUs"
    return [pytest.mark.needs_gpu, pytest.mark.skipif(torch.cuda.device_count() < count, reason=reason)]


ON_CPU = next(technique for technique in CANONICAL if technique.name == "NMSparsity")
EACH = pytest.mark.parametrize(
    ("technique", "device"),
    [pytest.param(ON_CPU, "cpu"), *(pytest.param(technique, "gpu", marks=on_gpu()) for technique in CANONICAL)],
    ids=str,
)


def train(technique: Any, device: str, module: Any = None, others: Any = (), **arguments: Any) -> Any:
    """Fit for two epochs, and return the weights, which must be finite and have moved."""
    module = make_classifier() if module is None else module
    start = {name: value.clone() for name, value in module.state_dict().items()}
    arguments = {"max_epochs": 2, "resumable": True, "accelerator": device, **arguments}
    fit([technique.build(), *others], module, **arguments)
    weights = {name: value.cpu() for name, value in module.state_dict().items()}
    assert all(value.isfinite().all() for value in weights.values())
    assert any(not torch.equal(value, start[name]) for name, value in weights.items())
    return weights


class Switch(pl.Callback):
    """Turns something on or off around a step that is neither the first nor the last of its epoch.

    Args:
        turn: What is called with the new mode.
        on: Whether this turns it on, before all other callbacks, or off, after them.
    """

    def __init__(self, turn: Callable[[str], Any], on: bool) -> None:
        self.turn, self.on = turn, on

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.on and batch_idx and not trainer.is_last_batch:
            self.turn("error")

    def on_train_batch_end(self, *_: Any) -> None:
        if not self.on:
            self.turn("default")


@EACH
def test_no_step_between_log_steps_waits_for_the_gpu(technique, device):
    if hasattr(technique.build(), "syncs_per_step"):
        return
    modes: list[str] = []
    turn = torch.cuda.set_sync_debug_mode if device == "gpu" else modes.append
    module = make_classifier()
    try:
        start = {name: value.clone() for name, value in module.state_dict().items()}
        callbacks = [Switch(turn, on=True), technique.build(), Switch(turn, on=False)]
        fit(callbacks, module, accelerator=device, log_every_n_steps=10_000)
    finally:
        turn("default")
    assert not torch.equal(start["head.weight"], module.head.weight.cpu())
    assert device == "gpu" or modes.count("error") == 16, "four of six steps of each of four epochs"


@EACH
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the scaler rightly skips its first steps
def test_fp16_with_a_grad_scaler(technique, device):
    scaler = torch.amp.GradScaler("cuda" if device == "gpu" else "cpu", init_scale=2.0**40)
    train(technique, device, plugins=[MixedPrecision("16-mixed", "cuda" if device == "gpu" else "cpu", scaler)])
    assert scaler.get_scale() < 2.0**40, "the run was meant to begin with an overflow"


def fused_classifier() -> Any:
    module = make_classifier()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
    return module


@EACH
def test_fused_optimizer(technique, device):
    train(technique, device, fused_classifier())
    if technique.works_with.fused_fp16.is_no and device == "gpu":
        with pytest.raises(ValueError, match="fused=False"):
            train(technique, device, fused_classifier(), precision="16-mixed")


@EACH
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_module(technique, device):
    module = make_classifier()
    torch._dynamo.reset()
    module.hidden.compile(backend="inductor" if device == "gpu" else "eager")
    train(technique, device, module)


@EACH
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
def test_resume_is_bitwise(technique, device, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    same: dict[str, Any] = {"max_epochs": 4, "deterministic": "warn"}
    try:
        whole = train(technique, device, others=[saving], **same)
        resumed = train(technique, device, ckpt=tmp_path / "epoch=1.ckpt", **same)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_identical(whole, resumed)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu())])
def test_export_of_semi_structured_weights(device):
    torch.manual_seed(0)
    layer = nn.Linear(128, 128, device=device, dtype=torch.float16 if device == "cuda" else torch.float32)
    layer.weight.data *= nm_mask(layer.weight.data, 2, 4)
    inputs = torch.randn(64, 128, device=device, dtype=layer.weight.dtype)
    expected = layer(inputs)
    (row,) = export_semi_structured(nn.Sequential(layer))
    capable = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    assert row.converted == capable, row.reason
    assert torch.allclose(layer(inputs), expected, atol=1e-2)


@pytest.mark.parametrize("scheme", STRATEGIES, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=on_gpu(2))])
@pytest.mark.filterwarnings("ignore:.*has nothing to compress and is plain DDP")  # at its neutral setting
def test_strategies_on_two_devices(scheme, device):
    if device == "cpu":
        on_ranks(2, gpu_ranks.check, scheme.name, "cpu")
        return
    launch = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        gpu_ranks.__name__,
        scheme.name,
        "gpu",
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", *launch], cwd=root, env=os.environ, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-4000:]
