"""What no scheme can compress: said before anything is built."""

from collections.abc import Mapping

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_grad.utilities.reporting import listed


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
