"""Report what each optimizer of a trainer moves, with rates, decays and the memory of its state."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.utilities.parameters import clean_name
from lightning_grad.utilities.reporting import format_table

_HEADER = ("optimizer", "group", "parameters", "entries", "learning rate", "weight decay", "state")


@dataclass(frozen=True)
class MovedGroup:
    """One parameter group of an optimizer, from :func:`optimizer_report`.

    Args:
        optimizer: Class of the optimizer, with its index. An optimizer with parts has a row for each.
        group: Index of the group, or its name if it has one.
        parameters: Names of the parameters.
        entries: Number of entries of all parameters.
        lr: Current learning rate, if the optimizer has one.
        weight_decay: Current weight decay, if the optimizer has one.
        state_bytes: Bytes of all tensors in the optimizer's state of these parameters.
    """

    optimizer: str
    group: str
    parameters: tuple[str, ...]
    entries: int
    lr: float | None
    weight_decay: float | None
    state_bytes: int

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of a table."""
        numbers = ["-" if value is None else f"{value:g}" for value in (self.lr, self.weight_decay)]
        first = self.parameters[0] if self.parameters else "none"
        more = f" and {len(self.parameters) - 1} more" if len(self.parameters) > 1 else ""
        return self.optimizer, self.group, first + more, f"{self.entries:,}", *numbers, _in_bytes(self.state_bytes)


@dataclass(frozen=True)
class OptimizerReport:
    """What the optimizers of a trainer move. ``print(report)`` shows a table.

    Args:
        rows: One row for each parameter group, or for each rate in it.
        unmoved: Names of trainable parameters that no optimizer holds.
        notes: Sentences of optimizers about their run, such as the number of decompositions of GaLore.
    """

    rows: tuple[MovedGroup, ...]
    unmoved: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def state_bytes(self) -> int:
        """Bytes of all states."""
        return sum(row.state_bytes for row in self.rows)

    def __str__(self) -> str:
        return format_table([row.cells for row in self.rows], _HEADER) + self._words()

    def markdown(self) -> str:
        """Return the table for a page."""
        lines = [_HEADER, ("---",) * len(_HEADER), *(row.cells for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + self._words()

    def _words(self) -> str:
        unmoved = [f"No optimizer moves {', '.join(self.unmoved)}."] if self.unmoved else []
        return "".join(f"\n\n{sentence}" for sentence in (*unmoved, *self.notes))


def optimizer_report(trainer: pl.Trainer) -> OptimizerReport:
    """Report what each optimizer moves, with rates, decays and bytes of state.

    Call it during a fit or afterwards. Before the first step, most optimizers have no state. It
    waits for the device if learning rates are tensors.

    Args:
        trainer: A trainer that is fitting, or has fitted, a module.

    Returns:
        OptimizerReport: One row for each parameter group; it prints as a table. A group has several rows if a callback
        such as :class:`lightning_grad.callbacks.LayerwiseLearningRateDecay` gives parameters rates of their own.

    Raises:
        ValueError: If the trainer has no optimizers yet.

    Example:
        >>> from lightning_grad.testing import fit
        >>> trainer, module = fit([], max_epochs=1)
        >>> print(optimizer_report(trainer))
        optimizer  group  parameters         entries  learning rate  weight decay  state
        0: AdamW   0      mix.w and 18 more  3,220    0.00853553     0.01          25.8 kB
    """
    if not trainer.optimizers:
        raise ValueError(
            "The trainer has no optimizers yet. Call optimizer_report during a fit or after it, for example in "
            "on_train_end."
        )
    named: dict[Tensor, str] = {
        parameter: clean_name(name) for name, parameter in trainer.lightning_module.named_parameters()
    }
    rows = tuple(
        _row(f"{index}: {type(part).__name__}", name, part, group, named)
        for index, optimizer in enumerate(trainer.optimizers)
        for part, name, whole in _groups_of(optimizer)
        for group in _by_rate(whole, _factors(trainer, index), named)
    )
    moved = {name for row in rows for name in row.parameters}
    left = [name for parameter, name in named.items() if parameter.requires_grad and name not in moved]
    parts = [part for optimizer in trainer.optimizers for part in getattr(optimizer, "parts", [optimizer])]
    notes = [note for part in parts if hasattr(part, "notes") for note in part.notes()]
    return OptimizerReport(rows, tuple(left), tuple(notes))


def _groups_of(optimizer: Any) -> Iterator[tuple[Optimizer, str, Mapping[str, Any]]]:
    """Yield groups with their names and their optimizers, which are the parts of an optimizer that has some."""
    if not hasattr(optimizer, "parts"):  # a PartedOptimizer, which this layer does not import
        yield from ((optimizer, _name(group, number), group) for number, group in enumerate(optimizer.param_groups))
        return
    optimizer.follow()  # a scheduler may have changed the rates since the last step
    for part in optimizer.parts:
        for index, group in enumerate(part.param_groups):
            number = optimizer.group_of(part, index)
            yield part, _name(optimizer.param_groups[number], number), group


def _factors(trainer: Any, index: int) -> dict[str, float]:
    """Return factors on the rates of parameters, from callbacks that have a method ``rate_factors``."""
    product: dict[str, float] = {}
    for callback in trainer.callbacks:
        for name, factor in getattr(callback, "rate_factors", lambda _: {})(index).items():
            product[name] = product.get(name, 1.0) * factor
    return product


def _by_rate(
    group: Mapping[str, Any], factors: Mapping[str, float], named: Mapping[Tensor, str]
) -> Iterator[Mapping[str, Any]]:
    """Yield a group, or its parts if a callback gives parameters rates of their own."""
    parts: dict[float, list[Tensor]] = {}
    for parameter in group["params"]:
        parts.setdefault(factors.get(named.get(parameter, ""), 1.0), []).append(parameter)
    if parts.keys() <= {1.0}:
        yield group
        return
    for factor, parameters in parts.items():
        yield {**group, "params": parameters, "lr": group["lr"] * factor}


def _name(group: Mapping[str, Any], number: int) -> str:
    return str(group.get("name", number))


def _row(optimizer: str, name: str, of: Optimizer, group: Mapping[str, Any], named: Mapping[Tensor, str]) -> MovedGroup:
    parameters = group["params"]
    return MovedGroup(
        optimizer,
        name,
        tuple(named.get(parameter, "a parameter outside the module") for parameter in parameters),
        sum(parameter.numel() for parameter in parameters),
        _number(group.get("lr")),
        _number(group.get("weight_decay")),
        sum(_bytes(of.state[parameter]) for parameter in parameters if parameter in of.state),
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float, Tensor)) else None


def _bytes(value: Any) -> int:
    """Return the bytes of all tensors in a state, which may hold lists and dictionaries of them."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _in_bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
