"""What no scheme can compress: said before anything is built."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_grad.utilities.checks import refuse_manual_optimization
from lightning_grad.utilities.precision import grad_scaler
from lightning_grad.utilities.reporting import listed


def refuse_run(trainer: pl.Trainer, label: str) -> None:
    """Raise for a trainer or module that cannot work.

    Raises:
        ValueError: For manual optimization, an fp16 GradScaler, sparse and complex gradients.
    """
    module = trainer.lightning_module
    why = "a backward pass must end in one optimizer step. Use strategy='ddp', or automatic optimization."
    refuse_manual_optimization(module, label, why)
    if grad_scaler(trainer) is not None:
        raise ValueError(
            f"{label} adds up gradients over steps, and an fp16 GradScaler changes their scale between steps. Use "
            "precision='bf16-mixed', or strategy='ddp'."
        )
    for name, child in module.named_modules():
        if getattr(child, "sparse", False) is True and any(True for _ in child.parameters(recurse=False)):
            raise ValueError(
                f"{label} needs dense gradients, and {type(child).__name__} {name!r} makes sparse ones. Build it with "
                "sparse=False, or use strategy='ddp'."
            )
    for name, parameter in module.named_parameters():
        if parameter.is_complex():
            raise ValueError(f"{label} compresses real gradients, and {name!r} is complex. Use strategy='ddp'.")


def refuse_optimizers(optimizers: list[Optimizer], module: pl.LightningModule, label: str) -> None:
    """Raise for optimizers that cannot work.

    Raises:
        ValueError: Unless there is one, and it needs one backward pass a step.
    """
    if len(optimizers) != 1:
        raise ValueError(
            f"{label} works with one optimizer, and {type(module).__name__}.configure_optimizers returned {len(optimizers)}. "
            "Put their parameters into groups of one optimizer, or use strategy='ddp'."
        )
    if isinstance(optimizers[0], LBFGS):
        raise ValueError(
            f"{label} needs one backward pass a step, and LBFGS makes several. Use another, or strategy='ddp'."
        )


def explain_unused_parameters(error: BaseException, label: str, parameters: Mapping[str, Tensor]) -> None:
    """Replace what Lightning says of parameters that got no gradient, which would lead away from the strategy.

    Args:
        error: Its message is changed, if it is that one.
        label: Whose run it is.
        parameters: Of the module, by name, with the gradients of the step that was broken off.
    """
    if not any("parameters that were not used in producing the loss" in str(part) for part in error.args):
        return
    unused = [name for name, parameter in parameters.items() if parameter.requires_grad and parameter.grad is None]
    named = f" ({listed(unused)})" if unused else ""
    text = (
        f"{label}: some parameters{named} got no gradient in a step. If that is intended, set "
        f"{label}(find_unused_parameters=True). If they are never used, freeze them with requires_grad_(False)."
    )
    error.args = (text,)
