"""Base of optimizers that take only matrices."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.functional.optimizers.projection_rank import rank_within
from lightning_grad.utilities.checks import check_finite_at_least
from lightning_grad.utilities.reporting import listed

_SHOWN = 8


class MatrixOptimizer(Optimizer):
    """Base of optimizers whose parameters are real matrices, and which have Adam's options.

    Derived classes define :meth:`step_group`, and :meth:`check_group` for their own options. State holds only tensors
    and numbers, so checkpoints load with ``weights_only=True``.

    Attributes:
        moments_of_entries: Whether each entry of a parameter has moments of its own, so other techniques can read them.
    """

    moments_of_entries: ClassVar[bool] = False

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise if an option of a new group is not valid.

        Raises:
            ValueError: With the option.
        """
        check_finite_at_least(group["lr"], 0.0, "lr")
        check_finite_at_least(group["weight_decay"], 0.0, "weight_decay")
        check_finite_at_least(group["eps"], 0.0, "eps")
        betas = tuple(group["betas"])
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be two numbers, each at least 0 and below 1; got {group['betas']}.")

    def name_lowered_ranks(self, group: Mapping[str, Any]) -> None:
        """Warn with the names of the matrices whose smaller side is below the ``rank`` of their group."""
        pairs = [(name_in(group, place), tuple(weight.shape)) for place, weight in enumerate(group["params"])]
        lowered = [f"{name} {shape}" for name, shape in pairs if rank_within(shape, group["rank"]) < group["rank"]]
        if lowered:
            count = f" ({len(lowered)} matrices)" if len(lowered) > _SHOWN else ""
            warnings.warn(
                f"{type(self).__name__} lowers rank={group['rank']} to the smaller side of {listed(lowered, _SHOWN)}{count}.",
                UserWarning,
                stacklevel=5,
            )

    def step_group(self, group: dict[str, Any]) -> None:
        """Update the parameters of a group that have a gradient."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of matrices.

        Raises:
            ValueError: If a parameter is not a real matrix, or an option is not valid.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for position, parameter in enumerate(group["params"]):
                self._check_parameter(parameter, name_in(group, position))
            self.check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_parameter(self, parameter: Tensor, name: str) -> None:
        if parameter.ndim == 2 and parameter.is_floating_point() and parameter.numel():
            return
        kind = "" if parameter.is_floating_point() else f" and type {parameter.dtype}"
        raise ValueError(
            f"{type(self).__name__} takes only real matrices; {name} has shape {tuple(parameter.shape)}{kind}. Give other "
            "parameters to another optimizer; OptimizerSwap does so by itself."
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Raises:
            RuntimeError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for position, parameter in enumerate(group["params"]):
                if parameter.grad is not None and parameter.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} does not take sparse gradients, and {name_in(group, position)} has one. "
                        "Use sparse=False."
                    )
            self.step_group(group)
        return loss


def name_in(group: Mapping[str, Any], position: int) -> str:
    """Return the name of a parameter if its group knows it, or its number."""
    names = group.get("param_names")
    return str(names[position]) if names else f"parameter {position} of a group"
