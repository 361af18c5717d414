"""N:M sparsity: recipes against dense training of the same network.

The trained project, ``plain_project``, does not use lightning-grad. One line in :meth:`Sparsity.train` makes its weights
sparse; everything else here measures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from plain_project import CIFAR10, Digits, ResidualConvNet, VisionTransformer
from typing_extensions import override

from lightning_grad.callbacks import NMSparsity
from lightning_grad.functional import RECIPES
from lightning_grad.utilities import sparsity_report
from studies import claim as base
from studies.claim import Claim, Paper, Run
from studies.common import Follow, finish_loggers

IN_THE_DEMO = """\
Sparse weights (a minute). A small vision transformer learns handwritten digits:
first dense, then with one line that keeps 1 of every 8 weights of its encoder.
Each training runs with three seeds:

    Trainer(callbacks=[NMSparsity(pattern="1:8", recipe="mdgf-exponential")])
"""


@dataclass(frozen=True)
class Result(base.Result):
    """The result of one training; the arm is its recipe, or "dense".

    Args:
        validation_accuracy: Accuracy on the validation images at the end.
        test_accuracy: Accuracy on the test images, 0 to 1.
        exact_weights: Number of the selected weights that are exactly N:M.
        chosen_weights: Number of weights that the callback selected.
        step_ms: Median time of a training step, in milliseconds.
        step_quotient: Median of the step time divided by that of a fixed computation, see :class:`StepTimer`.
        loads_strictly: Whether a plain module with the last checkpoint returns exactly the same logits.
    """

    validation_accuracy: float
    test_accuracy: float
    exact_weights: int
    chosen_weights: int
    step_ms: float
    step_quotient: float
    loads_strictly: bool


@dataclass(frozen=True, kw_only=True)
class Sparsity(Claim[Result]):
    """Recipes of N:M sparsity against dense training.

    Args:
        pattern: Final N:M pattern of every sparse training.
        model: Module of plain_project to train.
        epochs: Epochs of each training.
        limit_batches: Number of batches in an epoch, for a quick look.
    """

    result = Result
    reads = "a folder with CIFAR-10"
    choices: ClassVar = {"model": ("VisionTransformer", "ResidualConvNet")}
    name: str = "sparsity"
    text: str = "Recipes that decay the pruned weights (MDGF, SDGF) end with a higher accuracy than SR-STE at 1:8."
    arms: Sequence[Any] = ("dense", "sr-ste", "mdgf-exponential", "sdgf-stepwise")
    reference: str = "sr-ste"
    metric: str = "test_accuracy"
    scale: float = 100
    unit: str = "%"
    rates: Sequence[float] = (1e-3, 3e-3, 1e-2)
    chosen_by: str = "validation_accuracy"
    budget: float = 5
    pattern: str = "1:8"
    model: str = "VisionTransformer"
    epochs: int = 16
    limit_batches: int | None = None

    @property
    @override
    def known(self) -> list[str]:
        return ["dense", *RECIPES]

    @override
    def train(self, run: Run) -> Result:
        """Run one training, then test the module, its weights and its last checkpoint."""
        data = CIFAR10(self.data) if self.data else Digits()
        module, folder = build_module(self, run.rate), self.folder(run)
        last = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
        timer = StepTimer()
        callbacks: list[Callback] = [timer, Follow(run.show), last]
        if run.arm != "dense":
            recipe: Any = run.arm
            callbacks.append(NMSparsity(self.pattern, recipe, save_masks=True))
        limits: dict[str, Any] = dict.fromkeys(("limit_train_batches", "limit_val_batches"), self.limit_batches)
        every = 1 if self.limit_batches else 10
        settings = {"max_epochs": self.epochs, "enable_checkpointing": True, "log_every_n_steps": every}
        trainer = self.trainer(run, callbacks, **settings, **limits)
        trainer.fit(module, data)
        validation = trainer.callback_metrics["val_acc"].item()
        accuracy = trainer.test(module, data, verbose=False)[0]["test_acc"]
        finish_loggers(trainer)
        exact, chosen = (0, 0) if run.arm == "dense" else count_exact(module, self.pattern, folder)
        loads = loads_strictly(self, module, folder / "last.ckpt", next(iter(data.test_dataloader()))[0])
        times = 1000 * statistics.median(timer.seconds), statistics.median(timer.quotients)
        return Result(run.arm, run.seed, run.rate, validation, accuracy, exact, chosen, *times, loads)

    @override
    def comparisons(self) -> list[tuple[str, str]]:
        """Compare recipes with each other; dense training is there for scale."""
        return [pair for pair in super().comparisons() if pair[0] != "dense"]


def build_module(claim: Sparsity, rate: float | None = None) -> LightningModule:
    """Return a new module of the plain project."""
    settings: dict[str, Any] = {} if rate is None else {"lr": rate}
    if claim.model == "ResidualConvNet":
        return ResidualConvNet(channels=3 if claim.data else 1, **settings)
    if claim.data:
        return VisionTransformer(image_size=32, patch_size=4, channels=3, width=128, depth=4, **settings)
    return VisionTransformer(**settings)


def count_exact(module: LightningModule, pattern: str, folder: Path) -> tuple[int, int]:
    """Return the number of selected weights that are exactly N:M, and the number of all selected weights."""
    chosen = torch.load(folder / "nm_sparsity_masks.pt")
    report = sparsity_report(module, pattern, include=list(chosen), verbose=False)
    return sum(row.exact for row in report), len(chosen)


@torch.no_grad()
def loads_strictly(claim: Sparsity, module: LightningModule, checkpoint: Path, images: torch.Tensor) -> bool:
    """Load a checkpoint into a plain module, and compare its logits with those of the trained module."""
    plain = build_module(claim)
    plain.load_state_dict(torch.load(checkpoint, map_location="cpu")["state_dict"], strict=True)
    return torch.equal(plain.eval()(images), module.cpu().eval()(images))


class StepTimer(Callback):
    """Time each training step. Must be the first callback, so the time includes all other callbacks.

    In every fourth step it also times a fixed computation. A busy machine slows down both, so their quotient can be
    compared between trainings that ran one after another.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.quotients: list[float] = []
        self._start = self._work = 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = now(pl_module.device)
        if batch_idx % 4 == 0:
            do_fixed_work(pl_module.device)
            end = now(pl_module.device)
            self._work, self._start = end - self._start, end

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seconds.append(now(pl_module.device) - self._start)
        self.quotients.append(self.seconds[-1] / self._work)


def now(device: torch.device) -> float:
    """Return the processor time of this thread, or on an accelerator the time after it has finished its work."""
    if device.type == "cpu":
        return time.thread_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def do_fixed_work(device: torch.device) -> None:
    """Run a few layers forward and backward."""
    start = x = torch.ones(1024, 64, device=device, requires_grad=True)
    weight = torch.full((64, 64), 1 / 64, device=device)
    for _ in range(8):
        x = F.gelu(x @ weight)
    torch.autograd.grad(x.sum(), start)


CLAIMS = (
    Sparsity(
        paper=Paper(
            "NMSparsity",
            "sparsity",
            "At high sparsity, recipes that decay the pruned weights are more accurate than SR-STE",
            "Progressive Gradient Flow (2402.04744)",
        )
    ),
    Sparsity(
        name="sparsity-2-4",
        text="At 2:4, a sparse network is at most one point less accurate than the dense one.",
        paper=Paper(
            "NMSparsity",
            "sparsity",
            "Trained from scratch, 2:4 networks are about as accurate as dense ones",
            "SR-STE (2102.04010)",
        ),
        arms=("dense", "sr-ste", "mdgf-exponential"),
        reference="dense",
        margin=-0.01,
        pattern="2:4",
        budget=4,
    ),
)
