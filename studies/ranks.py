"""What claims share that train on several ranks."""

from __future__ import annotations

import sys
from typing import Literal

import torch
from lightning.pytorch import LightningModule

StartMethod = Literal["fork", "spawn"]


def start_of_ranks(chosen: StartMethod | None) -> StartMethod:
    """Return the start method of ranks; by default fork, which is faster, on Linux without a GPU, else spawn."""
    is_safe = sys.platform == "linux" and not torch.cuda.is_available()
    return chosen or ("fork" if is_safe else "spawn")


def gradient_bytes(module: LightningModule) -> int:
    """Return the bytes of all gradients of a module."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
