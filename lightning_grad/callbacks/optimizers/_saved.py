"""What a checkpoint says about the optimizers whose state it holds.

Used only by :class:`lightning_grad.callbacks.OptimizerSwap`.
"""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_grad.utilities.arguments import plain
from lightning_grad.utilities.reporting import listed

WAY_OUT = "To continue from its weights alone, load them with load_from_checkpoint, and fit without ckpt_path."
_OWN = {"class": "the module's own optimizer", "options": {}}


def description(optimizer: Optimizer, **more: Any) -> dict[str, Any]:
    """Return the class and the options of a new optimizer, in types that a checkpoint can store.

    Args:
        optimizer: The optimizer.
        more: What else must be the same in a run that resumes: ``matrices``, the names of its parameters, and
            ``rest``, the class of the optimizer that moves the others.

    Example:
        >>> import torch
        >>> description(torch.optim.Adagrad([torch.zeros(1)]))["class"]
        'torch.optim.adagrad.Adagrad'
    """
    kind = type(optimizer)
    options = {name: value for name, value in optimizer.defaults.items() if name not in ("lr", "weight_decay")}
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "options": plain(options), **more}


def refuse_other_optimizers(display_name: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise if a checkpoint holds the state of other optimizers than a run has.

    Args:
        display_name: Name of the callback.
        saved: Descriptions in the checkpoint, by index.
        now: Descriptions in this run.

    Raises:
        ValueError: With the first difference.
    """
    for index in {**saved, **now}:
        was, given = saved.get(index, _OWN), now.get(index, _OWN)
        if was != given:
            raise ValueError(
                f"{display_name} cannot resume: in the checkpoint, optimizers[{index}] is {_words(was, given)}, but in "
                f"this run it is {_words(given, was)}. Use the same class and options. {WAY_OUT}"
            )


def _words(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Describe an optimizer; of two of one class, with the options or the matrices that differ."""
    name = str(one["class"]).rpartition(".")[2] if one is not _OWN else str(one["class"])
    if one["class"] != other["class"]:
        return name
    if one.get("matrices") != other.get("matrices"):
        only = [each for each in one.get("matrices", []) if each not in other.get("matrices", [])]
        count = len(one.get("matrices", []))
        return f"{name} of {count} matrices{f', with {listed(only)}' if only else ''}"
    if one.get("rest") != other.get("rest"):
        return f"{name} and {str(one.get('rest')).rpartition('.')[2]}"
    differing = [f"{key}={value!r}" for key, value in one["options"].items() if other["options"].get(key) != value]
    return f"{name}({', '.join(differing)})"
