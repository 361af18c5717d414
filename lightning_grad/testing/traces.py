"""Describe everything that a technique could leave on a module, its optimizers or the trainer, to compare two runs."""

import pickle
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

_HOOKS = [name for name in vars(nn.Linear(1, 1)) if name.endswith(("_hooks", "_hooks_with_kwargs", "_always_called"))]


def traces(module: nn.Module) -> dict[str, Any]:
    """Describe the classes, attributes, hooks and buffers of all submodules, which a technique could have changed.

    Example:
        >>> module = nn.Linear(2, 2)
        >>> before = traces(module)
        >>> handle = module.register_forward_hook(lambda *_: None)
        >>> traces(module) == before
        False
        >>> handle.remove()
        >>> traces(module) == before
        True
    """
    found: dict[str, Any] = {}
    for name, child in module.named_modules():
        hooks = {hook: len(getattr(child, hook)) for hook in _HOOKS}
        found[name] = (type(child), sorted(set(vars(child)) - {"_trainer"}), sorted(child._buffers), hooks)
    for name, parameter in module.named_parameters():
        found[name] = (type(parameter), bool(parameter._backward_hooks), sorted(parameter.__dict__))
    return found


def trainer_traces(trainer: Any) -> dict[str, Any]:
    """Describe the callables set on the strategy, and the step hooks of the optimizers."""
    own = {name for name in vars(trainer.strategy) if callable(vars(trainer.strategy)[name])}
    hooks = [
        (len(o._optimizer_step_pre_hooks), len(o._optimizer_step_post_hooks), "step" in vars(o))
        for o in trainer.optimizers
    ]
    return {"strategy": own, "hooks": hooks}


def optimizer_traces(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Describe the class, attributes, hooks and param groups (including learning rates) of an optimizer."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    hooks = [len(value) for name, value in vars(optimizer).items() if name.endswith("_hooks")]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved = len(optimizer.state_dict()["param_groups"])
    return [type(optimizer), sorted(vars(optimizer)), hooks, groups, sizes, saved]


class PicklerOfNoRun(pickle.Pickler):
    """A pickler that raises for a module, an optimizer or a trainer: a copy must not contain parts of a run.

    Example:
        >>> import io
        >>> PicklerOfNoRun(io.BytesIO()).dump({"kept": nn.Linear(1, 1)})
        Traceback (most recent call last):
        AssertionError: A copy holds a Linear, which belongs to a run.
    """

    def reducer_override(self, value: Any) -> Any:
        """Raise for parts of a run, and leave everything else to pickle."""
        if isinstance(value, (nn.Module, torch.optim.Optimizer, pl.Trainer)):
            raise AssertionError(f"A copy holds a {type(value).__name__}, which belongs to a run.")
        return NotImplemented
