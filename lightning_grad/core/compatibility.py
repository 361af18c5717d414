"""What a technique works with: declared once on its class, refused from there, shown from there, tested from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from lightning_grad.utilities.checks import keeps
from lightning_grad.utilities.forward_order import is_compiled
from lightning_grad.utilities.precision import grad_scaler, gradients_are_scaled

Found = tuple[str, str] | None
"""What of a run matters: in words, and a part of it that the way out repeats."""


@dataclass(frozen=True)
class Answer:
    """Whether a technique works with one thing. Make one with :func:`yes`, :func:`stand_in`, :func:`no` or :func:`moot`.

    Args:
        works: ``"yes"``; ``"stand-in"``, if tests ran it only with a stand-in in one process; ``"no"``; or ``"-"``, if the
            question does not arise.
        note: One or more sentences. With ``"no"`` it is a clause that follows the name of the technique, where ``{}`` stands
            for what was found in the run.
        way_out: With ``"no"``, what to do instead: an imperative. ``{value}`` stands for a part of what was found.
    """

    works: Literal["yes", "stand-in", "no", "-"] = "yes"
    note: str = ""
    way_out: str = ""

    def given(self, setting: str) -> Answer:
        """Return the same refusal, said of one setting of the technique."""
        return replace(self, note=f"with {setting} {self.note}")

    @property
    def is_no(self) -> bool:
        """Whether the technique raises an error."""
        return self.works == "no"

    def error(self, label: str, words: str, value: str = "") -> ValueError:
        """Return the error for what was found in a run.

        Example:
            >>> print(no("needs whole weights, and {} shards them", "Use DDP").error("Rounding", "FSDP1"))
            Rounding needs whole weights, and FSDP1 shards them. Use DDP.
        """
        return ValueError(f"{label} {self.note.format(words)}. {self.way_out.format(value=value)}.")

    def explained(self, title: str) -> str:
        """Return the note as whole sentences, for the documentation; empty if there is none.

        Args:
            title: Name of the thing, in place of what a run would show.
        """
        return f"It {self.error('', title, '...')}".replace("  ", " ") if self.is_no else self.note


YES = Answer()


def yes(note: str = "") -> Answer:
    """Return the answer that it works, and that a test runs it."""
    return Answer("yes", note)


def stand_in(note: str) -> Answer:
    """Return the answer that it works in tests that have only a stand-in of the real thing."""
    return Answer("stand-in", note)


def no(reason: str, way_out: str) -> Answer:
    """Return the answer that it does not work, so that ``setup`` raises.

    Args:
        reason: A clause that follows the name of the technique; ``{}`` stands for what was found.
        way_out: What to do instead.
    """
    return Answer("no", reason, way_out)


def moot(note: str) -> Answer:
    """Return the answer that the question does not arise."""
    return Answer("-", note)


def manual(answer: Answer) -> dict[str, Answer]:
    """Return an answer for manual optimization, and for several optimizers, which Lightning allows there only."""
    return {"manual_optimization": answer, "several_optimizers": answer}


_IN_A_LIST = yes(
    "In a list: `Trainer(callbacks=[...])`. The command line of `pytorch_lightning` accepts only callbacks of its own "
    "namespace."
)
_UNSHARDED = stand_in(
    "Tests run it under stand-ins of FSDP2, FSDP1 and DeepSpeed in one process; none has run it on real shards."
)


@dataclass(frozen=True)
class Compatibility:
    """What a technique works with: one answer for each thing that a run may have.

    A class attribute ``compatibility`` holds it. Derive it from that of the base, and name what differs:

    Example:
        >>> from lightning_grad.core import WHOLE_WEIGHTS, GradCallback
        >>> class Rounding(GradCallback):
        ...     compatibility = GradCallback.compatibility.but(
        ...         **manual(no("rounds before backward, which {} hides", "Use automatic optimization")),
        ...         **WHOLE_WEIGHTS,
        ...     )
        >>> Rounding.compatibility.fsdp1.works
        'no'
        >>> print(Rounding.compatibility.manual_optimization.explained("manual optimization"))
        It rounds before backward, which manual optimization hides. Use automatic optimization.

    Args:
        accumulation: ``Trainer(accumulate_grad_batches=...)``.
        bf16: ``Trainer(precision="bf16-mixed")`` and ``"bf16-true"``.
        fp16: ``Trainer(precision="16-mixed")``, which has a GradScaler.
        fused_fp16: A fused optimizer together with a GradScaler.
        ddp: ``DDPStrategy``.
        fsdp2: ``ModelParallelStrategy``.
        fsdp1: ``FSDPStrategy``.
        deepspeed: ``DeepSpeedStrategy``.
        compiled: Compiled submodules.
        several_optimizers: More than one optimizer, which Lightning allows under manual optimization only.
        manual_optimization: A module that steps its optimizers itself.
        weight_averaging: ``WeightAveraging`` and ``EMAWeightAveraging``.
        pytorch_lightning: The Trainer of the other namespace.
        gradient_clip_val: ``Trainer(gradient_clip_val=...)``.
        late_gradients: A strategy whose gradients have accumulated over many steps.
        no_second_moment: Optimizers that keep no ``exp_avg_sq``, such as SGD.
        sparse_gradients: ``nn.Embedding(sparse=True)``.
        complex_parameters: Parameters of a complex type.
    """

    accumulation: Answer = YES
    bf16: Answer = YES
    fp16: Answer = YES
    fused_fp16: Answer = YES
    ddp: Answer = YES
    fsdp2: Answer = _UNSHARDED
    fsdp1: Answer = _UNSHARDED
    deepspeed: Answer = _UNSHARDED
    compiled: Answer = YES
    several_optimizers: Answer = YES
    manual_optimization: Answer = YES
    weight_averaging: Answer = YES
    pytorch_lightning: Answer = _IN_A_LIST
    gradient_clip_val: Answer = YES
    late_gradients: Answer = YES
    no_second_moment: Answer = YES
    sparse_gradients: Answer = YES
    complex_parameters: Answer = YES

    def but(self, **answers: Answer) -> Compatibility:
        """Return the same with other answers, by field."""
        return replace(self, **answers)

    @property
    def answers(self) -> Mapping[str, Answer]:
        """The answers by field."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def refuse(self, label: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise for what a run has and the technique does not work with, as far as ``setup`` can see it.

        Raises:
            ValueError: With what was found, why it does not work, and the way out.
        """
        self._refuse(label, _IN_A_RUN, trainer, pl_module)

    def refuse_optimizer(self, label: str, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Raise for an optimizer that the technique does not work with.

        Raises:
            ValueError: As :meth:`refuse`.
        """
        self._refuse(label, _IN_AN_OPTIMIZER, trainer, optimizer)

    def refuse_parameters(self, label: str, module: nn.Module, chosen: set[int] | None = None) -> None:
        """Raise for parameters that the technique does not work with.

        Args:
            label: The technique.
            module: Its modules and parameters are looked at.
            chosen: Identities of the parameters that the technique acts on. Default: all.

        Raises:
            ValueError: As :meth:`refuse`.
        """
        wanted = {id(parameter) for parameter in module.parameters()} if chosen is None else chosen
        self._refuse(label, _IN_PARAMETERS, module, wanted)

    def _refuse(self, label: str, finders: Mapping[str, Callable[..., Found]], *run: Any) -> None:
        for name, find in finders.items():
            answer: Answer = getattr(self, name)
            found = find(*run) if answer.is_no else None
            if found is not None:
                raise answer.error(label, *found)

    @property
    def in_words(self) -> str:
        """What it works with, in one line."""
        words = {"yes": "yes", "stand-in": "tested with a stand-in only", "no": "raises"}
        titles = {
            works: [TITLES[name] for name, answer in self.answers.items() if answer.works == works] for works in words
        }
        return " ".join(f"{', '.join(titles[works])}: {said}." for works, said in words.items() if titles[works])


TITLES: Mapping[str, str] = {
    "accumulation": "accumulation",
    "bf16": "bf16",
    "fp16": "fp16 with GradScaler",
    "fused_fp16": "a fused optimizer with GradScaler",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "fsdp1": "FSDP1",
    "deepspeed": "DeepSpeed",
    "compiled": "`torch.compile`",
    "several_optimizers": "several optimizers",
    "manual_optimization": "manual optimization",
    "weight_averaging": "EMA",
    "pytorch_lightning": "`pytorch_lightning`",
    "gradient_clip_val": "`gradient_clip_val`",
    "late_gradients": "a strategy that delays gradients",
    "no_second_moment": "an optimizer without `exp_avg_sq`",
    "sparse_gradients": "`Embedding(sparse=True)`",
    "complex_parameters": "complex parameters",
}
"""The name of each field in tables and sentences."""

WHOLE_WEIGHTS: Mapping[str, Answer] = dict.fromkeys(
    ("fsdp2", "fsdp1", "deepspeed"),
    no("needs whole weights, and {} shards them", "Train with strategy='ddp' or on one device"),
)
"""Answers of a technique that reads weights, or runs the module at a time of its own."""

AVERAGED = "It sees the weights that validation uses, which is the average."
SCALED = no(
    "reads gradients, and {} leaves them multiplied by the fp16 loss scale",
    "Use fused=False, or precision='bf16-mixed'",
)
"""The answer for a fused optimizer with a GradScaler of a technique that compares gradients with numbers."""
NO_ENGINE = no(
    "works on gradients, and under {} the engine owns them",
    "Train with strategy='ddp' or ModelParallelStrategy, or clip in DeepSpeed's own config",
)
"""The answer for DeepSpeed of a technique that reads or changes gradients."""


_STRATEGIES = {
    "DDPStrategy": "ddp",
    "ModelParallelStrategy": "fsdp2",
    "FSDPStrategy": "fsdp1",
    "DeepSpeedStrategy": "deepspeed",
}


def _in_strategy(name: str) -> Callable[[pl.Trainer, pl.LightningModule], Found]:
    # Asked by name along the class hierarchy, so that both namespaces of Lightning and derived strategies are met.
    def find(trainer: pl.Trainer, _: pl.LightningModule) -> Found:
        strategy = type(trainer.strategy)
        base = next((_STRATEGIES[cls] for cls in map(_name, strategy.__mro__) if cls in _STRATEGIES), None)
        return (f"{TITLES[name]} ({strategy.__name__})", "") if base == name else None

    return find


def _name(cls: type) -> str:
    return cls.__name__


def _accumulation(trainer: pl.Trainer, _: pl.LightningModule) -> Found:
    batches = trainer.accumulate_grad_batches
    return (f"Trainer(accumulate_grad_batches={batches})", str(batches)) if batches > 1 else None


def _bf16(trainer: pl.Trainer, _: pl.LightningModule) -> Found:
    return (f"precision={trainer.precision!r}", "") if str(trainer.precision).startswith("bf16") else None


def _fp16(trainer: pl.Trainer, _: pl.LightningModule) -> Found:
    return None if grad_scaler(trainer) is None else ("an fp16 GradScaler", "")


def _compiled(_: pl.Trainer, pl_module: pl.LightningModule) -> Found:
    return ("compiled modules", "") if any(map(is_compiled, pl_module.modules())) else None


def _manual(_: pl.Trainer, pl_module: pl.LightningModule) -> Found:
    return None if pl_module.automatic_optimization else ("manual optimization", "")


def _averaging(trainer: pl.Trainer, _: pl.LightningModule) -> Found:
    kinds = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return next(((kind.__name__, "") for kind in kinds if "WeightAveraging" in map(_name, kind.__mro__)), None)


def _other_namespace(trainer: pl.Trainer, _: pl.LightningModule) -> Found:
    return ("pytorch_lightning.Trainer", "") if type(trainer).__module__.startswith("pytorch_lightning") else None


def _clipping(trainer: pl.Trainer, _: pl.LightningModule) -> Found:
    value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    by_norm = algorithm is None or str(getattr(algorithm, "value", algorithm)) == "norm"
    return (f"Trainer(gradient_clip_val={value})", str(value) if by_norm else "...") if value else None


def _late(trainer: pl.Trainer, _: pl.LightningModule) -> Found:
    name = type(trainer.strategy).__name__
    return (name, name) if getattr(trainer.strategy, "gradient_is_compressed", False) else None


def _fused(trainer: pl.Trainer, optimizer: Optimizer) -> Found:
    return (f"the fused {type(optimizer).__name__}", "") if gradients_are_scaled(trainer, optimizer) else None


def _no_second_moment(_: pl.Trainer, optimizer: Optimizer) -> Found:
    return None if keeps(optimizer, "exp_avg_sq") else (type(optimizer).__name__, "")


def _sparse(module: nn.Module, chosen: set[int]) -> Found:
    for name, child in module.named_modules():
        if getattr(child, "sparse", False) is True and not chosen.isdisjoint(map(id, child.parameters(recurse=False))):
            return f"{type(child).__name__} {name!r}", repr(name)
    return None


def _complex(module: nn.Module, chosen: set[int]) -> Found:
    for name, parameter in module.named_parameters():
        if id(parameter) in chosen and parameter.is_complex():
            return repr(name), repr(name)
    return None


# Several optimizers are in none of these tables: Lightning itself allows them under manual optimization only.
_IN_A_RUN: Mapping[str, Callable[[pl.Trainer, pl.LightningModule], Found]] = {
    "accumulation": _accumulation,
    "bf16": _bf16,
    "fp16": _fp16,
    **{name: _in_strategy(name) for name in _STRATEGIES.values()},
    "compiled": _compiled,
    "manual_optimization": _manual,
    "weight_averaging": _averaging,
    "pytorch_lightning": _other_namespace,
    "gradient_clip_val": _clipping,
    "late_gradients": _late,
}
_IN_AN_OPTIMIZER: Mapping[str, Callable[[pl.Trainer, Optimizer], Found]] = {
    "fused_fp16": _fused,
    "no_second_moment": _no_second_moment,
}
_IN_PARAMETERS: Mapping[str, Callable[[nn.Module, set[int]], Found]] = {
    "sparse_gradients": _sparse,
    "complex_parameters": _complex,
}
