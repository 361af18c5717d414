"""A copy of everything that a training step changes, to which a run can go back."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.data.random_streams import random_states, set_random_states


def take_copy(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Return a copy of weights, buffers, optimizers, schedulers, the GradScaler and random states.

    Without ``"random"``, a checkpoint may hold it: the rest consists of tensors, numbers, strings, lists and dicts, as
    far as the schedulers' own states do. Tensors stay on their devices.

    Args:
        trainer: The trainer, between two steps.
        pl_module: Its module.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in _tensors(pl_module)},
        "optimizers": [_copy_of(optimizer) for optimizer in trainer.optimizers],
        "schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "scaler": {} if scaler is None else dict(scaler.state_dict()),
        "random": random_states(),
        "epochs": [],
    }


def epoch_begins(taken: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that belongs to this epoch, after its loader has drawn its order.

    Random states from before would repeat that order in the next epoch.

    Args:
        taken: The copy.
    """
    return {**taken, "random": random_states()}


def epoch_ends(trainer: pl.Trainer, taken: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that knows that the schedulers have ended this epoch. They do so again after going back.

    Args:
        trainer: The trainer, after the last step of an epoch.
        taken: The copy.
    """
    return {**taken, "epochs": [*taken["epochs"], trainer.current_epoch]}


@torch.no_grad()
def go_back(trainer: pl.Trainer, pl_module: pl.LightningModule, taken: Mapping[str, Any]) -> None:
    """Restore in place what :func:`take_copy` copied; the copy can be used again.

    Schedulers that step once per epoch step again for the epochs that have ended since, because epochs keep counting.

    Args:
        trainer: The trainer, between two steps.
        pl_module: Its module.
        taken: The copy.
    """
    for name, tensor in _tensors(pl_module):
        if name in taken["tensors"]:
            tensor.detach().copy_(taken["tensors"][name])
    for optimizer, saved in zip(trainer.optimizers, taken["optimizers"], strict=True):
        _restore(optimizer, saved)
    for config, state in zip(trainer.lr_scheduler_configs, taken["schedulers"], strict=True):
        config.scheduler.load_state_dict(copy.deepcopy(state))
    for epoch in taken["epochs"]:
        _end_epoch(trainer, pl_module, epoch)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        scaler.load_state_dict(dict(taken["scaler"]))
    if "random" in taken:
        set_random_states(taken["random"])


def _end_epoch(trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
    """Step the schedulers that Lightning steps before the end of an epoch; those on a plateau need its metrics."""
    for config in trainer.lr_scheduler_configs:
        if config.interval == "epoch" and not config.reduce_on_plateau and (epoch + 1) % config.frequency == 0:
            pl_module.lr_scheduler_step(config.scheduler, None)


def _tensors(pl_module: pl.LightningModule) -> Iterator[tuple[str, Tensor]]:
    yield from pl_module.named_parameters()
    yield from pl_module.named_buffers()


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _copy_of(optimizer: Optimizer) -> dict[str, Any]:
    states = [optimizer.state.get(parameter) for parameter in _parameters(optimizer)]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in _groups(optimizer)]
    states = [None if state is None else _copied(state) for state in states]
    return {"states": states, "groups": _copied(groups), "shared": _copied(_shared(optimizer))}


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the groups of an optimizer, and those of its parts, which may keep a state there."""
    parts = getattr(optimizer, "parts", ())
    return [group for each in (optimizer, *parts) for group in each.param_groups]


def _shared(optimizer: Optimizer) -> dict[str, Any]:
    """Return the entries of an optimizer's state that belong to no parameter, such as a count of all steps."""
    state: Mapping[Any, Any] = optimizer.state
    return {key: value for key, value in state.items() if isinstance(key, str)}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):  # a checkpoint loads no tuples by default
        return [_copied(child) for child in value]
    return copy.deepcopy(value)


def _restore(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    for parameter, state in zip(_parameters(optimizer), saved["states"], strict=True):
        if state is None:
            optimizer.state.pop(parameter, None)
        else:
            _put_back(optimizer.state[parameter], state)
    for key in _shared(optimizer).keys() - saved["shared"].keys():
        del optimizer.state[key]
    optimizer.state.update(_copied(saved["shared"]))
    for group, values in zip(_groups(optimizer), saved["groups"], strict=True):
        _put_back(group, values, keep=("params",))


def _put_back(held: dict[Any, Any], saved: Mapping[Any, Any], keep: tuple[str, ...] = ()) -> None:
    """Write saved values into a dictionary; tensors in place, because others may hold them."""
    for key in [key for key in held if key not in saved and key not in keep]:
        del held[key]
    for key, value in saved.items():
        own = held.get(key)
        if isinstance(own, Tensor) and isinstance(value, Tensor) and own.shape == value.shape:
            own.detach().copy_(value)
        else:
            held[key] = tuple(value) if isinstance(own, tuple) else _copied(value)
