"""Arms as data: the line of ``Trainer(callbacks=[...])`` that a training gets, which is also what a reader sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback


@dataclass(frozen=True)
class Length:
    """The length of a training, on which options of an arm may depend.

    Args:
        steps: Optimizer steps.
        epochs: Epochs.
    """

    steps: int
    epochs: int


@dataclass(frozen=True)
class OfSteps:
    """An option that is a share of the optimizer steps, at least one of them."""

    share: float

    def value(self, length: Length) -> int:
        """Return the number of steps."""
        return max(1, round(self.share * length.steps))

    def __repr__(self) -> str:
        return f"{self.share:g} * steps"


@dataclass(frozen=True)
class OfEpochs:
    """An option that is a share of the epochs, at least one of them."""

    share: float

    def value(self, length: Length) -> int:
        """Return the number of epochs."""
        return max(1, round(self.share * length.epochs))

    def __repr__(self) -> str:
        return f"{self.share:g} * epochs"


class Use:
    """A callback and its arguments.

    Args:
        cls: Class of the callback.
        arguments: Its positional arguments.
        options: Its other arguments; one of :class:`OfSteps` or :class:`OfEpochs` depends on the training.

    Example:
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> use = Use(EarlyStopping, "val_loss", patience=OfEpochs(0.25))
        >>> str(use), use.build(Length(steps=80, epochs=8)).patience
        ("EarlyStopping('val_loss', patience=0.25 * epochs)", 2)
    """

    def __init__(self, cls: type[Callback], *arguments: Any, **options: Any) -> None:
        self.cls = cls
        self.arguments = arguments
        self.options = options

    def build(self, length: Length) -> Callback:
        """Return a new callback for a training."""
        given = [resolve(each, length) for each in self.arguments]
        return self.cls(*given, **{name: resolve(each, length) for name, each in self.options.items()})

    def __repr__(self) -> str:
        given = [repr(each) for each in self.arguments]
        named = [f"{name}={value!r}" for name, value in self.options.items()]
        return f"{self.cls.__name__}({', '.join([*given, *named])})"


def resolve(option: Any, length: Length) -> Any:
    """Return the value of an option for a training, also inside of a mapping."""
    if isinstance(option, Mapping):
        return {name: resolve(each, length) for name, each in option.items()}
    return option.value(length) if isinstance(option, OfSteps | OfEpochs) else option


@dataclass(frozen=True, init=False)
class Arm:
    """What one arm of a claim adds to the training of the task.

    Args:
        uses: The callbacks.
        longer: Factor of the length of the training, for comparisons at equal time.
        module: Arguments of the module that differ from those of the task.
        trainer: Arguments of the Trainer that differ from those of the task.

    Example:
        >>> str(Arm(longer=2.0, trainer={"gradient_clip_val": 1.0}))
        'no callback, Trainer(gradient_clip_val=1.0), 2 times as long'
    """

    uses: tuple[Use, ...] = ()
    longer: float = 1.0
    module: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        *uses: Use,
        longer: float = 1.0,
        module: Mapping[str, Any] | None = None,
        trainer: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("uses", uses), ("longer", longer), ("module", module or {}), ("trainer", trainer or {})):
            object.__setattr__(self, name, value)

    @property
    def classes(self) -> list[type[Callback]]:
        """The classes of the callbacks."""
        return [use.cls for use in self.uses]

    def build(self, length: Length) -> list[Callback]:
        """Return new callbacks for a training."""
        return [use.build(length) for use in self.uses]

    def __str__(self) -> str:
        parts = [", ".join(map(repr, self.uses)) or "no callback"]
        for name, options in (("Trainer", self.trainer), ("module", self.module)):
            if options:
                parts.append(f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})")
        if self.longer != 1.0:
            parts.append(f"{self.longer:g} times as long")
        return ", ".join(parts)


PLAIN = Arm()
