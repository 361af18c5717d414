"""Fits of the small project under ``fully_shard`` (FSDP2) on CPU ranks, with Lightning's own strategy and its checkpoints.

Lightning refuses a CPU for FSDP1 only: ``ModelParallelStrategy`` trains with gloo and real DTensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor

from lightning_grad.functional.gradients.tensor_lists import whole
from lightning_grad.functional.torch_version import TORCH
from lightning_grad.testing import fit, make_classifier

_OWN_BUFFERS = {"broadcast_buffers" if TORCH < (2, 13) else "forward_sync_buffers": False}
on_cpus = pytest.mark.skipif(TORCH < (2, 7), reason="fully_shard works on CPUs from torch 2.7 on")


def sharded(module: Any, units: tuple[str, ...] = ("mix", "encoder", "hidden", "head"), **how: Any) -> Any:
    """Shard a module when the Trainer asks for it: some layers each on its own, and the root, which holds the rest.

    Args:
        module: A module that is not sharded yet.
        units: Names of the layers.
        **how: Arguments of ``fully_shard`` for the layers.
    """
    from torch.distributed.fsdp import fully_shard

    def configure_model() -> None:
        mesh = module.device_mesh["data_parallel"]
        for name in units:
            fully_shard(module.get_submodule(name), mesh=mesh, **how)
        fully_shard(module, mesh=mesh)

    module.configure_model = configure_model
    return module


def fit_sharded(callbacks: Any = (), module: Any = None, distributed: bool = True, **arguments: Any) -> Any:
    """Fit a sharded module, by default the small classifier, on this rank and its peers; return (trainer, module).

    Args:
        callbacks: The callbacks.
        module: The module, from :func:`sharded`.
        distributed: Whether checkpoints are folders to which each rank writes its shards.
        **arguments: Those of ``fit``.
    """
    module = sharded(make_classifier(optimizer="sgd")) if module is None else module
    ranks = dist.get_world_size()
    strategy = ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=distributed)
    return fit(list(callbacks), module, **{"strategy": strategy, "devices": ranks, "max_epochs": 2, **arguments})


def fit_replicated(callbacks: Any = (), module: Any = None, **arguments: Any) -> Any:
    """Fit the same module under DDP. Ranks keep their own running statistics, as under FSDP2."""
    module = make_classifier(optimizer="sgd") if module is None else module
    strategy = DDPStrategy(**_OWN_BUFFERS)
    ranks = dist.get_world_size()
    return fit(list(callbacks), module, **{"strategy": strategy, "devices": ranks, "max_epochs": 2, **arguments})


def weights_of(module: Any) -> dict[str, Tensor]:
    """Return the whole parameters of a module, sharded or not."""
    return {name: whole(parameter.detach()).clone() for name, parameter in module.named_parameters()}


def differences(module: Any, other: Any) -> dict[str, float]:
    """Return the largest difference of each parameter of two modules; of those that are equal, none."""
    pairs = zip(weights_of(module).items(), weights_of(other).values(), strict=True)
    found = {name: float((one - another).abs().max()) for (name, one), another in pairs}
    return {name: value for name, value in found.items() if value != 0.0}
