"""Weights of few bits: training with rounded weights, rounding after the training, and an exported file.

The trained project, ``plain_project``, does not use lightning-grad. Each arm is one line in :data:`TRAINED`,
:data:`ROUNDED` or :data:`SMALLER`; everything else here measures. No claim says that one quantizer beats another one at
4 or 2 bits, except the one that tests what the papers say.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from plain_project import Digits, VisionTransformer
from typing_extensions import override

from lightning_grad.callbacks import LearnedRounding, NMSparsity, QuantizationAwareTraining
from lightning_grad.utilities import (
    apply_activation_quantization,
    export_onnx_int8,
    quantization_report,
    sparsity_report,
)
from studies import claim as base
from studies.claim import Claim, Paper, Run
from studies.common import Follow, finish_loggers

IN_THE_DEMO = """\
Smaller files (half a minute). The vision transformer trains once more: dense, with
weights of 8 bits, and with weights that are also 2:4 sparse. Then it is exported:

    Trainer(callbacks=[NMSparsity("2:4"), QuantizationAwareTraining(8)])
    export_onnx_int8(module, quantization_report(module), "model.onnx")
"""

# The callbacks of each arm, by the bits of a weight, and those of an activation or None.
Line = Callable[[int, int | None], list[Callback]]
TRAINED: Mapping[str, Line] = {
    "dense": lambda bits, inputs: [],
    "ste": lambda bits, inputs: [QuantizationAwareTraining(bits, inputs)],
    "quest": lambda bits, inputs: [QuantizationAwareTraining(bits, inputs, "quest")],
    "quest plain": lambda bits, inputs: [QuantizationAwareTraining(bits, inputs, "quest", hadamard=False)],
    "quest own inputs": lambda bits, inputs: [
        QuantizationAwareTraining(bits, inputs, "quest", activation_quantizer="quest")
    ],
    "statsq": lambda bits, inputs: [QuantizationAwareTraining(bits, inputs, "statsq")],
}
ROUNDED: Mapping[str, Line] = {
    "dense": lambda bits, inputs: [],
    "nearest": lambda bits, inputs: [LearnedRounding(bits, steps=0)],
    "learned": lambda bits, inputs: [LearnedRounding(bits)],
    "nearest outliers": lambda bits, inputs: [LearnedRounding(bits, steps=0, outliers=0.01)],
    "learned outliers": lambda bits, inputs: [LearnedRounding(bits, outliers=0.01)],
}
SMALLER: Mapping[str, Callable[[], list[Callback]]] = {
    "dense": list,
    "8 bits": lambda: [QuantizationAwareTraining(8, include=["net.*"])],
    "sparse 8 bits": lambda: [
        NMSparsity("2:4", "sr-ste", figure=False),
        QuantizationAwareTraining(8, include=["net.*"]),
    ],
}


@dataclass(frozen=True)
class Result(base.Result):
    """The result of one training.

    Args:
        validation_accuracy: Accuracy on the validation images at the end.
        test_accuracy: Accuracy on the test images, 0 to 1.
        levels: Largest number of levels in an output channel of a weight that lies on a grid; nan if none does.
    """

    validation_accuracy: float
    test_accuracy: float
    levels: float


@dataclass(frozen=True, kw_only=True)
class Quantization(Claim[Result]):
    """Training with rounded weights against dense training, each arm with its own learning rate.

    Args:
        bits: Bits of a weight.
        activation_bits: Bits of the inputs of the same layers; ``None`` rounds no inputs.
        epochs: Epochs of each training.
        limit_batches: Number of batches in an epoch, for a quick look.
    """

    result = Result
    arms: Sequence[str] = ("dense", "ste", "quest", "statsq")
    reference: str = "dense"
    metric: str = "test_accuracy"
    margin: float = -0.01
    scale: float = 100
    unit: str = "%"
    rates: Sequence[float] = (1e-3, 3e-3, 1e-2)
    chosen_by: str = "validation_accuracy"
    budget: float = 6
    bits: int
    activation_bits: int | None = None
    epochs: int = 16
    limit_batches: int | None = None

    @property
    @override
    def known(self) -> list[str]:
        return list(self.lines)

    @property
    def lines(self) -> Mapping[str, Line]:
        """The callbacks of each possible arm."""
        return TRAINED

    @override
    def train(self, run: Run) -> Result:
        """Run one training, and test the module that remains."""
        data, module = Digits(seed=run.seed), build_module(run)
        limits: dict[str, Any] = dict.fromkeys(("limit_train_batches", "limit_val_batches"), self.limit_batches)
        line = self.lines[run.arm](self.bits, self.activation_bits)
        trainer = self.trainer(run, [Follow(run.show), *line], max_epochs=self.epochs, **limits)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*activations that are not rounded")  # the test below rounds them
            trainer.fit(module, data)
        validation = trainer.callback_metrics["val_acc"].item()
        for callback in line if self.activation_bits else []:
            assert isinstance(callback, QuantizationAwareTraining)
            apply_activation_quantization(module, callback.activation_formats)  # the module itself rounds only weights
        accuracy = trainer.test(module, data, verbose=False)[0]["test_acc"]
        finish_loggers(trainer)
        return Result(run.arm, run.seed, run.rate, validation, accuracy, most_levels(module))


@dataclass(frozen=True, kw_only=True)
class Rounding(Quantization):
    """Rounding at the end of the training: learned, nearest, and with outliers that keep their values."""

    arms: Sequence[str] = tuple(ROUNDED)
    reference: str = "nearest"
    margin: float = 0.0
    rates: Sequence[float] = ()
    budget: float = 10

    @property
    @override
    def lines(self) -> Mapping[str, Line]:
        return ROUNDED

    @override
    def comparisons(self) -> list[tuple[str, str]]:
        """Compare learned with nearest rounding; the dense network is there for scale."""
        pairs = [("learned", "nearest"), ("learned outliers", "nearest outliers")]
        return [pair for pair in pairs if set(pair) <= set(self.arms)]


def build_module(run: Run) -> VisionTransformer:
    """Return a new module of the plain project."""
    return VisionTransformer() if run.rate is None else VisionTransformer(lr=run.rate)


def most_levels(module: LightningModule) -> float:
    """Return the largest number of levels in an output channel of a weight that lies on a grid."""
    report = quantization_report(module, verbose=False)
    return max((float(row.levels) for row in report if row.quantized is not None), default=math.nan)


@dataclass(frozen=True)
class ExportedResult(base.Result):
    """The result of one training and its export.

    Args:
        validation_accuracy: Accuracy on the validation images at the end.
        test_accuracy: Accuracy of the module on the test images, 0 to 1.
        file_accuracy: The same of the exported file in onnxruntime; nan without onnx, or for the dense network.
        size: Bytes of the exported file; nan without onnx, or for the dense network.
        zipped: The same, compressed.
        float_size: Bytes of the same file with float weights.
        difference: Largest difference between the outputs of the file and of the module.
        zeros: Share of zeros in the quantized weights.
    """

    validation_accuracy: float
    test_accuracy: float
    file_accuracy: float
    size: float
    zipped: float
    float_size: float
    difference: float
    zeros: float


@dataclass(frozen=True, kw_only=True)
class SmallerFiles(Claim[ExportedResult]):
    """A network that is sparse and quantized, exported to ONNX.

    Args:
        epochs: Epochs of each training.
    """

    result = ExportedResult
    name: str = "smaller-files"
    text: str = (
        "A network that is 2:4 sparse with weights of 8 bits is at most one point less accurate than a dense one."
    )
    arms: Sequence[str] = tuple(SMALLER)
    reference: str = "dense"
    metric: str = "test_accuracy"
    margin: float = -0.01
    scale: float = 100
    unit: str = "%"
    rates: Sequence[float] = (1e-3, 3e-3, 1e-2)
    chosen_by: str = "validation_accuracy"
    budget: float = 5
    epochs: int = 16

    @override
    def train(self, run: Run) -> ExportedResult:
        """Run one training, export the module, and test both."""
        data, module, folder = Digits(seed=run.seed), build_module(run), self.folder(run)
        trainer = self.trainer(run, [Follow(run.show), *SMALLER[run.arm]()], max_epochs=self.epochs)
        trainer.fit(module, data)
        validation = trainer.callback_metrics["val_acc"].item()
        accuracy = trainer.test(module, data, verbose=False)[0]["test_acc"]
        finish_loggers(trainer)
        exported = export(module, data, folder) if run.arm != "dense" else (*[math.nan] * 5, 0.0)
        return ExportedResult(run.arm, run.seed, run.rate, validation, accuracy, *exported)


def export(module: LightningModule, data: Digits, folder: Path) -> tuple[float, ...]:
    """Export a network, and return the accuracy, the sizes, the difference and the zeros of the file."""
    rows = sparsity_report(module.cpu(), verbose=False)
    sizes = [math.prod(row.shape) for row in rows]
    zeros = sum(row.zeros * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
    if find_spec("onnxscript") is None or find_spec("onnxruntime") is None:
        return *[math.nan] * 5, zeros
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = map(torch.cat, zip(*data.test_dataloader(), strict=True))
    grids = quantization_report(module, verbose=False)
    file = export_onnx_int8(module, grids, folder / "model.onnx", inputs=images[:2])
    accuracy = (run_file(file.path, images).argmax(1) == labels).float().mean().item()
    zipped = len(zlib.compress(file.path.read_bytes()))
    assert file.difference is not None, "onnxruntime is installed"
    return accuracy, float(file.size), float(zipped), float(file.float_size), file.difference, zeros


def run_file(path: Path, images: torch.Tensor) -> torch.Tensor:
    """Return the logits of an ONNX file."""
    from onnxruntime import InferenceSession

    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(logits)


_QUEST = Paper(
    "QuantizationAwareTraining",
    "quantization",
    "Training with 4 bits is optimal for the size of the model, and stable down to 1 bit",
    "QuEST (2502.05003)",
)
_ADAROUND = Paper(
    "LearnedRounding",
    "quantization",
    "Rounding that is learned layer by layer keeps more accuracy than rounding to the nearest value",
    "AdaRound (2004.10568)",
)


def _trained(bits: int, text: str, **settings: Any) -> Quantization:
    return Quantization(name=f"quantization-w{bits}", text=text, bits=bits, paper=_QUEST, **settings)


CLAIMS = (
    _trained(8, "With weights of 8 bits, a network is at most one point less accurate than a dense one."),
    _trained(4, "With weights of 4 bits, a network is at most one point less accurate than a dense one."),
    _trained(
        2, "With weights of 2 bits, a network is at most two points less accurate than a dense one.", margin=-0.02
    ),
    _trained(
        1,
        "With weights of 1 bit, a network is at most five points less accurate than a dense one.",
        arms=("dense", "quest", "quest plain", "statsq"),
        margin=-0.05,
    ),
    Quantization(
        name="quantizers-w2",
        text="With weights of 2 bits, QuEST and StatsQ end with a higher accuracy than plain rounding (ste).",
        paper=_QUEST,
        arms=("ste", "quest", "quest plain", "statsq"),
        reference="ste",
        margin=0.0,
        bits=2,
    ),
    Quantization(
        name="quantization-w4a4",
        text="With weights and inputs of 4 bits, a network is at most two points less accurate than a dense one.",
        paper=_QUEST,
        arms=("dense", "ste", "quest", "quest own inputs", "statsq"),
        margin=-0.02,
        bits=4,
        activation_bits=4,
    ),
    Rounding(
        name="rounding-3",
        text="Rounded to 3 bits after the training, a network is more accurate with learned than with nearest rounding.",
        paper=_ADAROUND,
        bits=3,
    ),
    Rounding(
        name="rounding-2",
        text="Rounded to 2 bits after the training, a network is more accurate with learned than with nearest rounding.",
        paper=_ADAROUND,
        bits=2,
    ),
    SmallerFiles(about=("NMSparsity", "QuantizationAwareTraining")),
)
