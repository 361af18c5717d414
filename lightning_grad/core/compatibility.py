"""What a technique works with, declared once on its class.

``setup`` refuses runs by this declaration, the documentation shows it, and the contract tests check
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, get_type_hints

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from lightning_grad.utilities.checks import lacking
from lightning_grad.utilities.forward_order import is_compiled
from lightning_grad.utilities.precision import grad_scaler, gradients_are_scaled

Found = tuple[str, str] | None
"""The finding in a run, in words, and the part of it that the advice repeats."""


@dataclass(frozen=True)
class Answer:
    """Whether a technique works with one feature: created by :func:`yes`, :func:`stand_in`, :func:`no` or :func:`moot`.

    Args:
        works: ``"yes"``; ``"stand-in"`` if tests ran it only with a stand-in in one process;
            ``"no"``; ``"-"`` if the question does not apply.
        note: One or more sentences. With ``"no"``, a clause that follows the technique's name, in
            which ``{}`` stands for the finding in the run.
        way_out: With ``"no"``, what to do instead, as an imperative. ``{value}`` stands for a part
            of the finding.
    """

    works: Literal["yes", "stand-in", "no", "-"] = "yes"
    note: str = ""
    way_out: str = ""

    def given(self, setting: str) -> Answer:
        """Return the same refusal, limited to one setting of the technique."""
        return replace(self, note=f"with {setting} {self.note}")

    @property
    def is_no(self) -> bool:
        """Whether the technique raises an error."""
        return self.works == "no"

    def error(self, display_name: str, words: str, value: str = "") -> ValueError:
        """Return the error for a finding in a run.

        Example:
            >>> print(no("needs whole weights, and {} shards them", "Use DDP").error("Rounding", "FSDP1"))
            Rounding needs whole weights, and FSDP1 shards them. Use DDP.
        """
        return ValueError(f"{display_name} {self.note.format(words)}. {self.way_out.format(value=value)}.")

    def explained(self, title: str, value: str = "...") -> str:
        """Return the note as whole sentences for the documentation; empty if there is none.

        Args:
            title: Name of the feature, used instead of the finding in a run.
            value: Placeholder for the part that the advice repeats.
        """
        return f"It{self.error('', title, value)}" if self.is_no else self.note


YES = Answer()


def yes(note: str = "") -> Answer:
    """Return the answer that it works and a test runs it."""
    return Answer("yes", note)


def stand_in(note: str) -> Answer:
    """Return the answer that a technique works in tests with a stand-in for the real strategy."""
    return Answer("stand-in", note)


def no(reason: str, way_out: str) -> Answer:
    """Return the answer that it does not work: ``setup`` raises an error.

    Args:
        reason: A clause that follows the technique's name; ``{}`` stands for the finding in the run.
        way_out: What to do instead, as an imperative without full stop.
    """
    return Answer("no", reason, way_out)


def moot(note: str) -> Answer:
    """Return the answer that the question does not apply."""
    return Answer("-", note)


def manual(answer: Answer) -> dict[str, Answer]:
    """Return one answer for manual optimization and for several optimizers, which Lightning allows only there."""
    return {"manual_optimization": answer, "several_optimizers": answer}


_IN_A_LIST = yes(
    "Pass it in a list: `Trainer(callbacks=[...])`. The command line of `pytorch_lightning` accepts only callbacks "
    "from its own namespace."
)
_UNSHARDED = stand_in("Tests run it with stand-ins of FSDP1 and DeepSpeed in one process, not on real shards.")
_ON_CPUS = yes("Tests compare fits under `fully_shard` on two CPU ranks with fits under DDP. None ran on GPUs.")


@dataclass(frozen=True)
class Compatibility:
    """What a technique works with: one answer for each feature of a run.

    It is the class attribute ``compatibility``. Derive it from the base's and name what differs:

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
        fused_fp16: A fused optimizer with a GradScaler.
        ddp: ``DDPStrategy``.
        fsdp2: ``ModelParallelStrategy``.
        fsdp1: ``FSDPStrategy``.
        deepspeed: ``DeepSpeedStrategy``.
        compiled: Compiled submodules.
        several_optimizers: More than one optimizer, which Lightning allows under manual
            optimization only.
        manual_optimization: A module that steps its optimizers itself.
        weight_averaging: ``WeightAveraging`` and ``EMAWeightAveraging``.
        pytorch_lightning: ``pytorch_lightning.Trainer``.
        gradient_clip_val: ``Trainer(gradient_clip_val=...)``.
        late_gradients: A strategy that exchanges what gradients accumulated over many steps.
        local_steps: A strategy whose ranks train apart and exchange weights once in a while.
        no_second_moment: Optimizers without ``exp_avg_sq``, such as SGD.
        sparse_gradients: ``nn.Embedding(sparse=True)``.
        complex_parameters: Parameters of a complex type.
    """

    accumulation: Annotated[Answer, "accumulation"] = YES
    bf16: Annotated[Answer, "bf16"] = YES
    fp16: Annotated[Answer, "fp16 with GradScaler"] = YES
    fused_fp16: Annotated[Answer, "a fused optimizer with GradScaler"] = YES
    ddp: Annotated[Answer, "DDP"] = YES
    fsdp2: Annotated[Answer, "FSDP2"] = _ON_CPUS
    fsdp1: Annotated[Answer, "FSDP1"] = _UNSHARDED
    deepspeed: Annotated[Answer, "DeepSpeed"] = _UNSHARDED
    compiled: Annotated[Answer, "`torch.compile`"] = YES
    several_optimizers: Annotated[Answer, "several optimizers"] = YES
    manual_optimization: Annotated[Answer, "manual optimization"] = YES
    weight_averaging: Annotated[Answer, "EMA"] = YES
    pytorch_lightning: Annotated[Answer, "`pytorch_lightning`"] = _IN_A_LIST
    gradient_clip_val: Annotated[Answer, "`gradient_clip_val`"] = YES
    late_gradients: Annotated[Answer, "a strategy that delays gradients"] = YES
    local_steps: Annotated[Answer, "a strategy with local steps"] = YES
    no_second_moment: Annotated[Answer, "an optimizer without `exp_avg_sq`"] = YES
    sparse_gradients: Annotated[Answer, "`Embedding(sparse=True)`"] = YES
    complex_parameters: Annotated[Answer, "complex parameters"] = YES

    def but(self, **answers: Answer) -> Compatibility:
        """Return a copy with other answers for the given fields."""
        return replace(self, **answers)

    @property
    def answers(self) -> Mapping[str, Answer]:
        """The answers by field."""
        return {name: getattr(self, name) for name in TITLES}

    def refuse(self, display_name: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if the run has a feature that the technique does not work with, as far as ``setup`` can see.

        Raises:
            ValueError: Names the finding, why it does not work, and what to do.
        """
        self._refuse(display_name, _IN_A_RUN, trainer, pl_module)

    def refuse_optimizer(self, display_name: str, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Raise if the technique does not work with this optimizer.

        Raises:
            ValueError: Like :meth:`refuse`.
        """
        self._refuse(display_name, _IN_AN_OPTIMIZER, trainer, optimizer)

    def refuse_parameters(self, display_name: str, module: nn.Module, chosen: set[int] | None = None) -> None:
        """Raise if the technique does not work with these parameters.

        Args:
            display_name: Name of the technique, for the error.
            module: Module that holds the parameters.
            chosen: ``id()`` of the parameters that the technique acts on. Default: all.

        Raises:
            ValueError: Like :meth:`refuse`.
        """
        wanted = {id(parameter) for parameter in module.parameters()} if chosen is None else chosen
        self._refuse(display_name, _IN_PARAMETERS, module, wanted)

    def _refuse(self, display_name: str, finders: _Finders, *run: Any) -> None:
        for name, find in finders.items():
            answer: Answer = getattr(self, name)
            found = find(*run) if answer.is_no else None
            if found is not None:
                raise answer.error(display_name, *found)


TITLES: Mapping[str, str] = {
    name: kind.__metadata__[0] for name, kind in get_type_hints(Compatibility, include_extras=True).items()
}
"""Name of each field in tables and sentences."""

WHOLE_WEIGHTS: Mapping[str, Answer] = dict.fromkeys(
    ("fsdp2", "fsdp1", "deepspeed"),
    no("needs whole weights, and {} shards them", "Train with strategy='ddp' or on one device"),
)
"""Answers of a technique that reads whole weights, or runs the module outside the training step."""

AVERAGED = "It sees the averaged weights, like validation."
SCALED = no(
    "reads gradients, and {} leaves them multiplied by the fp16 loss scale",
    "Use fused=False, or precision='bf16-mixed'",
)
"""Answer for a fused optimizer with a GradScaler, if the technique compares gradients with numbers."""
NO_ENGINE = no(
    "works on gradients, and under {} the engine owns them",
    "Train with strategy='ddp' or ModelParallelStrategy, or clip in DeepSpeed's own config",
)
"""Answer for DeepSpeed, if the technique reads or changes gradients."""


def _if(condition: bool, words: str, value: str = "") -> Found:
    return (words, value) if condition else None


def _names(thing: object) -> list[str]:
    # Class names, because both namespaces of Lightning and derived classes must be recognized.
    return [cls.__name__ for cls in type(thing).__mro__]


def _strategy(base: str, words: str, trainer: pl.Trainer, _: pl.LightningModule) -> Found:
    names = _names(trainer.strategy)
    nearest = next((name for name in names if name in STRATEGIES), None)  # Lightning's DeepSpeed derives from DDP
    return _if(nearest == base, f"{words} ({names[0]})")


def _clipping(trainer: pl.Trainer, _: pl.LightningModule) -> Found:
    value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    by_norm = algorithm is None or str(getattr(algorithm, "value", algorithm)) == "norm"
    return _if(bool(value), f"Trainer(gradient_clip_val={value})", str(value) if by_norm else "...")


def _strategy_with(attribute: str, trainer: pl.Trainer, _: pl.LightningModule) -> Found:
    name = type(trainer.strategy).__name__
    return _if(getattr(trainer.strategy, attribute, False), name, name)


def _sparse(module: nn.Module, chosen: set[int]) -> Found:
    for name, child in module.named_modules():
        if getattr(child, "sparse", False) is True and not chosen.isdisjoint(map(id, child.parameters(recurse=False))):
            return f"{type(child).__name__} {name!r}", repr(name)
    return None


def _complex(module: nn.Module, chosen: set[int]) -> Found:
    named = module.named_parameters()
    return next(((repr(name), repr(name)) for name, p in named if id(p) in chosen and p.is_complex()), None)


_Finders = Mapping[str, Callable[[Any, Any], Found]]

STRATEGIES = {
    "DDPStrategy": "ddp",
    "ModelParallelStrategy": "fsdp2",
    "FSDPStrategy": "fsdp1",
    "DeepSpeedStrategy": "deepspeed",
}
"""Field of each strategy of Lightning, by the name of its class."""

# Several optimizers are in none of these tables: Lightning itself allows them only with manual
# optimization.
_IN_A_RUN: _Finders = {
    "accumulation": lambda trainer, _: _if(
        trainer.accumulate_grad_batches > 1, f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches})"
    ),
    "bf16": lambda trainer, _: _if(str(trainer.precision).startswith("bf16"), f"precision={trainer.precision!r}"),
    "fp16": lambda trainer, _: _if(grad_scaler(trainer) is not None, "an fp16 GradScaler"),
    **{name: partial(_strategy, base, TITLES[name]) for base, name in STRATEGIES.items()},
    "compiled": lambda _, module: _if(any(map(is_compiled, module.modules())), "compiled modules"),
    "manual_optimization": lambda _, module: _if(not module.automatic_optimization, "manual optimization"),
    "weight_averaging": lambda trainer, _: _if(
        any("WeightAveraging" in _names(callback) for callback in trainer.callbacks), "weight averaging"
    ),
    "pytorch_lightning": lambda trainer, _: _if(
        type(trainer).__module__.startswith("pytorch_lightning"), "pytorch_lightning.Trainer"
    ),
    "gradient_clip_val": _clipping,
    "late_gradients": partial(_strategy_with, "gradient_is_compressed"),
    "local_steps": partial(_strategy_with, "has_local_steps"),
}
_IN_AN_OPTIMIZER: _Finders = {
    "fused_fp16": lambda trainer, optimizer: _if(
        gradients_are_scaled(trainer, optimizer), f"the fused {type(optimizer).__name__}"
    ),
    "no_second_moment": lambda _, optimizer: _if(bool(kind := lacking(optimizer, "exp_avg_sq")), kind),
}
_IN_PARAMETERS: _Finders = {"sparse_gradients": _sparse, "complex_parameters": _complex}
