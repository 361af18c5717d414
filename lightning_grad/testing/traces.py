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
        attributes = sorted(set(vars(child)) - {"_trainer"})
        named = {"class": _classes(child), "attributes": attributes, "buffers": sorted(child._buffers), **hooks}
        found[name or "module"] = {**named, "training": child.training}
    for name, parameter in module.named_parameters():
        hooked, attributes = bool(parameter._backward_hooks), sorted(parameter.__dict__)
        named = {"class": _classes(parameter), "attributes": attributes, "requires_grad": parameter.requires_grad}
        found[f"{name} "] = {**named, "hooks": hooked}  # a module may have the same name
    return found


def _classes(thing: object) -> list[str]:
    """Name the class and its bases: two modules whose class is defined in a function have different classes."""
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(thing).__mro__]


def trainer_traces(trainer: Any) -> dict[str, Any]:
    """Describe the attributes of the trainer, callables set on the strategy, the loader, and hooks of the optimizers."""
    loader = trainer.train_dataloader
    return {
        "trainer": sorted(vars(trainer)),
        "strategy": sorted(name for name, value in vars(trainer.strategy).items() if callable(value)),
        "loader": [_classes(part) for part in (loader, getattr(loader, "sampler", 0), getattr(loader, "dataset", 0))],
        "optimizers": [_optimizer_traces(optimizer) for optimizer in trainer.optimizers],
    }


def _optimizer_traces(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    hooks = {name: len(value) for name, value in vars(optimizer).items() if name.endswith("_hooks")}
    keys = [sorted(group) for group in optimizer.param_groups]
    return {"class": _classes(optimizer), "attributes": sorted(vars(optimizer)), "groups": keys, **hooks}


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
        AssertionError: A copy holds an object of type Linear, which belongs to a run.
    """

    def reducer_override(self, value: Any) -> Any:
        """Raise for parts of a run, and leave everything else to pickle."""
        if isinstance(value, (nn.Module, torch.optim.Optimizer, pl.Trainer)):
            raise AssertionError(f"A copy holds an object of type {type(value).__name__}, which belongs to a run.")
        return NotImplemented


def hooks_and_methods(module: nn.Module) -> list[tuple[str, Any]]:
    """Return (where, function) of every hook on a module or parameter, and of every function set on an instance."""
    found = []
    for name, child in module.named_modules():
        for attribute, value in vars(child).items():
            if attribute in _HOOKS:
                found += [(f"{name or 'module'}.{attribute}", hook) for hook in value.values() if callable(hook)]
            elif callable(value) and not isinstance(value, nn.Module):
                found.append((f"{name or 'module'}.{attribute}", value))
    for name, parameter in module.named_parameters():
        found += [(f"{name}._backward_hooks", hook) for hook in (parameter._backward_hooks or {}).values()]
    return found
