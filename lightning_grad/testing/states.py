"""The state after a run, and a bitwise comparison of two states."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def state_of(trainer: Any, module: Any) -> dict[str, Any]:
    """Return the state after a run that must be bitwise reproducible."""
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return {"module": dict(module.state_dict()), "optimizers": optimizers, "random": torch.get_rng_state()}


def assert_identical(a: Any, b: Any, where: str = "") -> None:
    """Raise unless two nested containers are equal, with tensors bitwise equal; lists and tuples count as one type.

    Args:
        a: First container, tensor or value.
        b: Second container, tensor or value.
        where: Path of both, at the start of the error message.

    Raises:
        AssertionError: With the path of the first difference. Objects without an ``==`` of their own are compared by their
            attributes.

    Example:
        >>> assert_identical({"w": [1, torch.ones(2)]}, {"w": (1, torch.ones(2))})
        >>> assert_identical({"w": torch.zeros(2)}, {"w": torch.tensor([0.0, 0.5])}, "module")
        Traceback (most recent call last):
        AssertionError: module/w differs by 0.5
    """
    if type(a) is not type(b) and not {type(a), type(b)} <= {list, tuple}:
        raise AssertionError(f"{where}: {type(a).__name__} is not {type(b).__name__}")
    own_equality = any("__eq__" in vars(cls) for cls in type(a).__mro__[:-1])
    if not own_equality and hasattr(a, "__dict__") and not callable(a):
        a, b = vars(a), vars(b)
    if isinstance(a, Tensor):
        _assert_same_tensor(a, b, where)
    elif isinstance(a, dict):
        if a.keys() != b.keys():
            raise AssertionError(f"{where}: only one side has {sorted(map(str, a.keys() ^ b.keys()))}")
        for key in a:
            assert_identical(a[key], b[key], _below(where, key))
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            raise AssertionError(f"{where}: {_other_entries(a, b)}")
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_identical(left, right, _below(where, index))
    elif not (_all(a == b) or (_all(a != a) and _all(b != b))):  # two NaN count as equal
        raise AssertionError(f"{where}: {a} is not {b}")


def _all(equal: Any) -> bool:
    """Return one truth value, also for the array that a comparison of NumPy arrays gives."""
    return bool(equal.all() if hasattr(equal, "all") else equal)


def _below(where: str, key: Any) -> str:
    return f"{where}{key}" if not where or where.endswith(" ") else f"{where}/{key}"


def _other_entries(a: Sequence[Any], b: Sequence[Any]) -> str:
    if all(isinstance(entry, str) for entry in (*a, *b)) and set(a) != set(b):
        return f"only one side has {sorted(set(a) ^ set(b))}"
    return f"{len(a)} entries are not {len(b)}"


def _assert_same_tensor(a: Tensor, b: Tensor, where: str) -> None:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        raise AssertionError(f"{where}: {a.dtype} {tuple(a.shape)} is not {b.dtype} {tuple(b.shape)}")
    if not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
        distance = (a.to(torch.complex128) - b.to(torch.complex128)).abs().max()  # works for all dtypes
        raise AssertionError(f"{where} differs by {float(distance):.3g}")
