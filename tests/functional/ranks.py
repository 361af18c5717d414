"""Two ranks with a device mesh, for functions that take DTensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from lightning_grad.testing import on_ranks


def on_two_ranks(check: Callable[[int, Any], None]) -> None:
    """Run ``check(rank, mesh)`` on two ranks; an error on either is raised here."""
    on_ranks(2, _with_mesh, check)


def _with_mesh(check: Callable[[int, Any], None]) -> None:
    # torch 2.6 warns whenever a tensor is spread over CPUs.
    warnings.filterwarnings("ignore", "DTensor random operators may not have complete support", UserWarning)
    check(dist.get_rank(), dist.init_device_mesh("cpu", (2,)))
