"""Looking at weights that are tested or validated after a fit: whether they have the pattern of the run.

Used by :class:`lightning_grad.callbacks.NMSparsity` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from torch import nn

from lightning_grad.functional import NMPattern, is_nm
from lightning_grad.utilities.parameters import clean_name
from lightning_grad.utilities.reporting import listed


def lacking(module: nn.Module, chosen: Mapping[str, Sequence[str | int]]) -> list[str]:
    """Return the names of the weights of a module that do not have their pattern."""
    present = {clean_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}
    found = []
    for name, (text, dim) in chosen.items():
        weight, pattern = present.get(clean_name(name)), NMPattern.parse(str(text))
        if weight is not None and not is_nm(weight.detach(), pattern.n, pattern.m, int(dim)):
            found.append(clean_name(name))
    return found


def describe(trainer: pl.Trainer, names: Sequence[str], total: int) -> str:
    """Return what is wrong with weights that lack their pattern, as the rest of a sentence."""
    path = trainer.ckpt_path
    whose = f"the checkpoint {path}" if path else "the module"
    return (
        f"{len(names)} of its {total} weights are not sparse in {whose} ({listed(names, 3)}), so this result is not "
        "that of the final pattern. Use a checkpoint from after the final pattern began, or the module as the fit left it"
    )
