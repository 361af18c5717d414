"""Tensors of a class of their own, as physics libraries have them for labelled points: as inputs, losses, parameters."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import AccuracyGradientLR, GradientMonitor
from lightning_grad.functional.plain_tensors import PlainTensors
from lightning_grad.testing import assert_identical, make_trainer
from tests.contract.settings import CANONICAL

# What the module, Lightning, autograd and Adam need; the class refuses all else.
_KNOWN = (
    *("linear", "tanh", "square", "mean", "mul", "div", "true_divide", "add", "sub", "neg", "rsub", "sqrt"),
    *(
        "detach",
        "clone",
        "backward",
        "requires_grad_",
        "zero_",
        "add_",
        "mul_",
        "addcdiv_",
        "lerp_",
        "addcmul_",
        "zeros_like",
    ),
    *("to", "float", "item", "cpu", "squeeze", "size", "dim", "numel", "__get__", "__set__", "__len__", "is_complex"),
    *("register_hook", "is_floating_point", "_has_compatible_shallow_copy_type"),
)


class Labelled(torch.Tensor):
    """Carries a label for each column. An operation that its author did not think of raises."""

    labels: tuple[str, ...]

    @staticmethod
    def __new__(cls, tensor: Tensor, labels: tuple[str, ...]) -> "Labelled":
        return super().__new__(cls, tensor)

    def __init__(self, tensor: Tensor, labels: tuple[str, ...]) -> None:
        self.labels = labels

    def isfinite(self) -> Tensor:
        return self._unknown()

    def reshape(self, *shape: Any) -> Tensor:
        return self._unknown()

    def abs(self) -> Tensor:
        return self._unknown()

    def norm(self, *_: Any, **__: Any) -> Tensor:
        return self._unknown()

    def _unknown(self) -> Tensor:
        raise AttributeError("'Labelled' object knows no labels for this method")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in _KNOWN:
            raise AttributeError(f"'Labelled' object knows no labels for {name}")
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, cls) and name not in ("__get__", "__set__"):
            result.labels = next((arg.labels for arg in args if isinstance(arg, cls)), ())
        return result

    def extract(self, label: str) -> Tensor:
        return self[:, [self.labels.index(label)]]


class Plain(pl.LightningModule):
    """Fits a line through points; everything is a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(2, 8)
        self.outer = nn.Linear(8, 1)
        self.unknown = self.parameter(torch.tensor([[0.5, 0.25]]))

    def parameter(self, value: Tensor) -> nn.Parameter:
        return nn.Parameter(value)

    def points(self, x: Tensor) -> Tensor:
        return x

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        points = self.points(batch[0])
        return self.outer(torch.tanh(self.inner(points * self.unknown))).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05, foreach=False)


class LabelledInputs(Plain):
    """Its batches, its activations and its loss carry labels."""

    def points(self, x: Tensor) -> Tensor:
        return Labelled(x, ("x", "t"))


class LabelledParameter(Plain):
    """One parameter is a tensor of that class, and so are its moments."""

    def parameter(self, value: Tensor) -> nn.Parameter:
        return nn.Parameter(Labelled(value, ("x", "t")))


class Both(LabelledInputs, LabelledParameter):
    """Labels everywhere."""


def run(module: pl.LightningModule, *acting: Any, **arguments: Any) -> pl.Trainer:
    loader = DataLoader(TensorDataset(torch.randn(32, 2, generator=torch.Generator().manual_seed(1))), 8)
    trainer = make_trainer(callbacks=list(acting), **{"max_epochs": 2, "log_every_n_steps": 1, **arguments})
    trainer.fit(module, loader, loader)
    return trainer


def weights(module: pl.LightningModule) -> dict[str, Tensor]:
    with PlainTensors():
        return {name: parameter.detach().as_subclass(Tensor).clone() for name, parameter in module.named_parameters()}


FAMILIES = ("clipping", "diagnostics", "schedules", "batch_size")  # what they read are gradients, weights and metrics
OTHERS = ("GradCAMLogger", "InputGradientLogger", "ZLoss", "GhostBatchNorm")  # of classifiers, and of BatchNorm


@pytest.mark.parametrize("kind", [LabelledInputs, LabelledParameter, Both], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("technique", [t for t in CANONICAL if t.family in FAMILIES and t.name not in OTHERS], ids=str)
def test_a_technique_does_what_it_does_with_plain_tensors(technique, kind):
    trained = []
    for module in (Plain(), kind()):
        run(module, technique.kind(**technique.kind.trial))
        trained.append(weights(module))
    assert_identical(*trained)


def test_the_class_refuses_what_numbers_are_read_by():
    """Naive code fails on it."""
    tensor = Labelled(torch.ones(2, 2), ("x", "t"))
    for read in (lambda: torch.linalg.vector_norm(tensor), lambda: torch.stack([tensor]), tensor.isfinite):
        with pytest.raises(AttributeError, match="knows no labels"):
            read()


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2}], ids=["every batch", "accumulated"])
def test_the_monitor_sees_the_same_numbers(arguments, tmp_path):
    seen = []
    for module in (Plain(), Both()):
        logger = CSVLogger(tmp_path / type(module).__name__)
        trainer = run(module, GradientMonitor(slow_stats_every=1), logger=logger, **arguments)
        seen.append({key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("grad")})
        assert list((tmp_path / type(module).__name__).rglob("gradient_monitor.png"))
    assert seen[0] == pytest.approx(seen[1])
    assert {
        "grad/norm",
        "grad/cosine",
        "grad_layers/update_ratio/outer",
        "grad/zero_share",
        "grad/signal_to_noise",
    } <= set(seen[0])


def test_the_first_bad_step_is_named_with_labelled_losses(tmp_path):
    class Spoilt(Both):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 2 else loss

    with pytest.warns(UserWarning, match="not finite for the first time at step 2"):
        run(Spoilt(), GradientMonitor(figure=False), max_epochs=1)


def test_a_grad_scaler_changes_nothing_about_it():
    scaling = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    trainer = run(LabelledInputs(), GradientMonitor(logits=False), plugins=[scaling], max_epochs=1)
    assert trainer.callback_metrics["grad/norm"] > 0


def test_a_rate_follows_a_labelled_metric():
    trainer = run(Both(), AccuracyGradientLR(**AccuracyGradientLR.trial), max_epochs=4)
    assert trainer.callback_metrics["lr/scale"] < 1.0


def test_the_class_is_left_as_it_was():
    constructor = vars(Labelled)["__new__"]
    run(Both(), GradientMonitor(slow_stats_every=1), max_epochs=1)
    assert vars(Labelled)["__new__"] is constructor

    class Breaks(Both):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            super().training_step(batch, batch_idx)
            assert vars(Labelled)["__new__"] is not constructor, "it is replaced while the step is watched"
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        run(Breaks(), GradientMonitor(slow_stats_every=1), max_epochs=1)
    assert vars(Labelled)["__new__"] is constructor


class Bare(torch.Tensor):
    """Has no constructor of its own, so that nothing can be put around it."""


class MakesBare(Plain):
    """Makes such tensors in its step."""

    def points(self, x: Tensor) -> Tensor:
        return Bare(x * 1.0)


def test_a_class_that_cannot_be_made_while_logits_are_watched_has_a_way_out():
    with pytest.raises(RuntimeError, match="Creating a new Tensor subclass") as error:
        run(MakesBare(), GradientMonitor(), max_epochs=1)
    assert "Set GradientMonitor(logits=False)." in error.value.__notes__[0]
    trainer = run(MakesBare(), GradientMonitor(logits=False), max_epochs=1)
    assert trainer.callback_metrics["grad/norm"] > 0
