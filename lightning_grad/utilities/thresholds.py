"""Thresholds set by users: one number, one per name pattern, or a key in a param group of the optimizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_grad.utilities.parameters import all_names, first_match, selects

Threshold = float | Mapping[str, float] | None


def as_threshold(value: Threshold, parameter: str, check: Callable[[float], object]) -> Any:
    """Check a threshold and convert it to plain types.

    Args:
        value: A number, or a mapping from name patterns to numbers; ``None`` for no threshold.
        parameter: Name of the argument for the error message.
        check: Function called with each number; it raises if the number is invalid.

    Raises:
        TypeError: If the value is neither a number nor a mapping to numbers.
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
            f"{parameter} must be a number, or a mapping from name patterns to numbers; got an empty mapping. Add an "
            "entry, such as {'*': 1.0}."
        )
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):  # a param group may hold anything
            raise TypeError(f"{parameter} must be a number, or a mapping from name patterns to numbers; got {value!r}.")
        check(number)
    if isinstance(value, Mapping):
        return {str(pattern): float(number) for pattern, number in value.items()}
    return float(value)


@dataclass
class Bucket:
    """Parameters of one optimizer that share a threshold.

    Args:
        name: Name pattern or ``group<i>`` of the bucket; empty if there is one threshold for all.
        value: The threshold, unless ``group`` has one.
        group: Param group whose entry ``key`` is the threshold, read at every step.
        key: Key of the threshold in ``group``.
        parameters: Parameters in the order of the optimizer.
        names: Name of each parameter.
    """

    name: str
    value: float | None = None
    group: Mapping[str, Any] | None = None
    key: str = ""
    parameters: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def threshold(self) -> float | None:
        """The current threshold."""
        return self.value if self.group is None else self.group[self.key]


def choose_buckets(
    optimizer: Optimizer,
    module: nn.Module,
    threshold: Threshold = None,
    key: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> tuple[list[Bucket], list[str]]:
    """Group the parameters of an optimizer by their threshold.

    An entry ``key`` of the param group has priority (unless the optimizer has an option of that name), then the first
    matching pattern applies. A tied parameter is matched by all of its names, and listed under the first.

    Args:
        optimizer: The optimizer whose parameters are grouped.
        module: The module that provides their names.
        threshold: A number, or one per name pattern; parameters that no pattern matches are skipped.
        key: Key of a param group that may contain its own threshold.
        include: Name patterns of the parameters to use; ``None`` uses all.
        exclude: Name patterns of the parameters to skip.

    Returns:
        tuple: Buckets that are not empty, and the names of the parameters skipped.
    """
    known = all_names(module)
    buckets: dict[str, Bucket] = {}
    skipped = []
    for number, group in enumerate(optimizer.param_groups):
        has_own = key is not None and key in group and key not in optimizer.defaults
        for position, parameter in enumerate(group["params"]):
            names = known.get(id(parameter), [f"group{number}.{position}"])
            new = Bucket(f"group{number}", group=group, key=str(key)) if has_own else _bucket_of(names, threshold)
            if new is None or not selects(names, include, exclude):
                skipped.append(names[0])
                continue
            bucket = buckets.setdefault(new.name, new)
            bucket.parameters.append(parameter)
            bucket.names.append(names[0])
    return list(buckets.values()), skipped


def _bucket_of(names: Sequence[str], threshold: Threshold) -> Bucket | None:
    if not isinstance(threshold, Mapping):
        return Bucket("", threshold)
    pattern = first_match(names, threshold)
    return None if pattern is None else Bucket(pattern, threshold[pattern])
