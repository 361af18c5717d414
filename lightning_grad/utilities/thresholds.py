"""Thresholds as users write them: one number, one for each name pattern, or a key in a param group of the optimizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_grad.utilities.parameters import all_names, first_match, selects

Threshold = float | Mapping[str, float] | None


def as_threshold(value: Threshold, parameter: str, check: Callable[[float], object]) -> Any:
    """Return a threshold in plain types, each number checked.

    Args:
        value: A number, or one for each name pattern; ``None`` for no threshold.
        parameter: Name of the argument, for the error.
        check: Called with each number; raises for one that cannot be.

    Raises:
        TypeError: If it is neither a number nor a mapping of them.
        ValueError: If the mapping is empty.

    Example:
        >>> as_threshold({"encoder.*": 1, "*": 0.5}, "max_norm", lambda number: None)
        {'encoder.*': 1.0, '*': 0.5}
    """
    if value is None:
        return None
    numbers = list(value.values()) if isinstance(value, Mapping) else [value]
    if not numbers:
        raise ValueError(
            f"{parameter} is a number, or one for each name pattern; got an empty mapping. Write one, such as "
            "{'*': 1.0}."
        )
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):  # a param group may hold anything
            raise TypeError(f"{parameter} is a number, or one for each name pattern; got {value!r}.")
        check(number)
    if isinstance(value, Mapping):
        return {str(pattern): float(number) for pattern, number in value.items()}
    return float(value)


@dataclass
class Bucket:
    """Parameters of one optimizer that share a threshold.

    Args:
        name: Name pattern, or ``group<i>``, that sets it apart; empty where one threshold serves all.
        value: The threshold, unless ``group`` carries one.
        group: The param group whose ``key`` is the threshold, read at every step.
        key: Name of the threshold in ``group``.
        parameters: Those of the optimizer, in its order.
        names: Name of each.
    """

    name: str
    value: float | None = None
    group: Mapping[str, Any] | None = None
    key: str = ""
    parameters: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def threshold(self) -> float | None:
        """The threshold as it stands."""
        return self.value if self.group is None else self.group[self.key]


def choose_buckets(
    optimizer: Optimizer,
    module: nn.Module,
    threshold: Threshold = None,
    key: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> tuple[list[Bucket], list[str]]:
    """Sort the parameters of an optimizer by the threshold that holds for them.

    A param group that carries ``key`` comes first (unless it is an option of the optimizer itself), then the first pattern
    that matches. A tied parameter is matched by each of its names, and listed under the first.

    Args:
        optimizer: Whose parameters are sorted.
        module: Where their names come from.
        threshold: The number, or one for each name pattern; a parameter that no pattern matches is left out.
        key: Name under which a param group may carry its own.
        include: Name patterns of those that may be chosen; default all.
        exclude: Name patterns of those that are left out.

    Returns:
        tuple: Buckets that are not empty, and the names of what is left out.
    """
    known = all_names(module)
    buckets: dict[str, Bucket] = {}
    left_out = []
    for number, group in enumerate(optimizer.param_groups):
        has_own = key is not None and key in group and key not in optimizer.defaults
        for position, parameter in enumerate(group["params"]):
            names = known.get(id(parameter), [f"group{number}.{position}"])
            new = Bucket(f"group{number}", group=group, key=str(key)) if has_own else _bucket_of(names, threshold)
            if new is None or not selects(names, include, exclude):
                left_out.append(names[0])
                continue
            bucket = buckets.setdefault(new.name, new)
            bucket.parameters.append(parameter)
            bucket.names.append(names[0])
    return list(buckets.values()), left_out


def _bucket_of(names: Sequence[str], threshold: Threshold) -> Bucket | None:
    if not isinstance(threshold, Mapping):
        return Bucket("", threshold)
    pattern = first_match(names, threshold)
    return None if pattern is None else Bucket(pattern, threshold[pattern])
