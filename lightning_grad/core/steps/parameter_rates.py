"""Learning rates of single parameters, without changing the groups that schedulers and other code see."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_RATES = ("params", "param_names", "lr")


class ParameterRates:
    """Factors on the learning rates of single parameters of an optimizer.

    An optimizer has one rate for a group. During each update, and only then, its groups are split by factor. The
    closure, hooks, schedulers and checkpoints see the groups of the user, so the lists of schedulers keep their
    length. An optimizer with ``parts`` has its parts split.

    Args:
        optimizer: The optimizer, or one that moves its parameters by several behind it.
        needed_by: Name of the technique, for errors.

    Attributes:
        factors: Factor of each parameter, by its ``id()``. Others have factor 1.

    Example:
        >>> import torch
        >>> first, last = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([first, last], lr=0.5)
        >>> rates = ParameterRates(optimizer)
        >>> rates.factors = {id(first): 0.5}
        >>> (first + last).sum().backward()
        >>> optimizer.step()
        >>> first.item(), last.item(), len(optimizer.param_groups)
        (0.75, 0.5, 1)
        >>> rates.stop()
    """

    def __init__(self, optimizer: Optimizer, needed_by: str = "ParameterRates") -> None:
        self.factors: Mapping[int, float] = {}
        self._splits = [_Split(part, self, needed_by) for part in getattr(optimizer, "parts", [optimizer])]

    def give_back(self) -> None:
        """Restore the groups, for an update that raised."""
        for split in self._splits:
            split.give_back()

    def stop(self) -> None:
        """Remove the hooks; it may be called more than once."""
        for split in self._splits:
            split.stop()


class _Split:
    """Splits the groups of one optimizer while it updates."""

    def __init__(self, optimizer: Optimizer, rates: ParameterRates, needed_by: str) -> None:
        self._optimizer, self._rates, self._needed_by = optimizer, rates, needed_by
        self._whole: list[dict[str, Any]] | None = None  # the user's groups, while they are split
        self._parts: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        self._depth = 0  # step() may call that of a base class, with hooks too
        self._takes_closure = len(inspect.signature(optimizer.step).parameters) > 0
        self._before = optimizer.register_step_pre_hook(self._enter)
        self._after = optimizer.register_step_post_hook(self._leave)

    def stop(self) -> None:
        self.give_back()
        self._before.remove()
        self._after.remove()

    def _enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self._depth += 1
        # Other hooks of the step see the user's groups: the closure runs after all hooks before the update, and the
        # groups are restored ahead of all hooks after it.
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(self._after.id, last=False)
        if not self._takes_closure:
            self._split()
            return args, kwargs
        own, *others = args
        closure = others[0] if others else kwargs.get("closure")
        kwargs = {key: value for key, value in kwargs.items() if key != "closure"}
        return (own, self._then_split(closure), *others[1:]), kwargs

    def _then_split(self, closure: Callable[[], Any] | None) -> Callable[[], Any]:
        def evaluate() -> Any:
            result = None if closure is None else closure()
            self._split()
            return result

        return evaluate

    def _split(self) -> None:
        if self._whole is not None:
            return
        groups: list[dict[str, Any]] = []
        self._whole = self._optimizer.param_groups
        for group in self._whole:
            by_factor: dict[float, list[Tensor]] = {}
            for parameter in group["params"]:
                by_factor.setdefault(self._rates.factors.get(id(parameter), 1.0), []).append(parameter)
            if by_factor.keys() <= {1.0}:
                groups.append(group)
                continue
            for factor, parameters in by_factor.items():
                given = {key: value for key, value in group.items() if key not in _RATES}
                part = {**given, "params": parameters, "lr": group["lr"] * factor if factor != 1.0 else group["lr"]}
                self._parts.append((group, given, part))
                groups.append(part)
        self._optimizer.param_groups = groups

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            changes = self._changes()
            self.give_back()
            for group, changed in changes:
                group.update(changed)

    def _changes(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return what the optimizer wrote into the parts of each group, such as a count of steps."""
        found: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        for group, given, part in self._parts:
            changed = {k: v for k, v in part.items() if k not in _RATES and not (k in given and given[k] is v)}
            _, known = found.setdefault(id(group), (group, changed))
            differing = [key for key in known.keys() | changed.keys() if not _same(known.get(key), changed.get(key))]
            if differing:
                kind = type(self._optimizer).__name__
                self.give_back()
                raise RuntimeError(
                    f"{self._needed_by} does not work with {kind}, which keeps {differing[0]!r} for a whole group, and it "
                    "would depend on the rate. Use another optimizer, such as AdamW or SGD."
                )
        return list(found.values())

    def give_back(self) -> None:
        """Restore the groups."""
        if self._whole is not None:
            self._optimizer.param_groups = self._whole
        self._whole, self._parts, self._depth = None, [], 0


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other  # comparing values would wait for the device
    return bool(one == other)
