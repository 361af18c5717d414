"""Holding still the second moment of an Adam-like optimizer, which is what the recipe ``step`` adds to SR-STE."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_KEYS = ("exp_avg_sq", "max_exp_avg_sq")
NO_VARIANCE = (
    "freezes the variance (exp_avg_sq) of an Adam-like optimizer, and {} keeps none. Set recipe='sr-ste', or train with "
    "Adam or AdamW."
)


class FrozenVariance:
    r"""Keeps the bias-corrected second moments of an optimizer as they are.

    After a step the moment :math:`v_t` becomes :math:`v_{t-1} (1 - \beta_2^t) / (1 - \beta_2^{t-1})`, so that
    :math:`\hat v = v_t / (1 - \beta_2^t)` never changes. One step still sees its own gradient, with weight
    :math:`1 - \beta_2` (a thousandth, usually); that masked gradients pile up in the variance, which is what the remedy is
    against, cannot happen. Nothing needs saving: the moments in a checkpoint are the frozen ones.

    Weights that had next to no gradient before would have next to no variance for ever, and their first gradient would throw
    them out of bounds. So the optimizer's eps is added to :math:`\hat v` when it is frozen, which puts it under the root.

    Args:
        optimizer: An Adam-like optimizer that has stepped.
        resumed: Whether its moments come from a checkpoint and are frozen already.
        needed_by: Who asks, for the error.

    Raises:
        ValueError: If it keeps no ``exp_avg_sq``.

    References:
        Lu et al., "STEP: Learning N:M Structured Sparsity Masks from Scratch with Precondition", 2023, arXiv 2302.01172,
        algorithm 1.
    """

    def __init__(self, optimizer: Optimizer, resumed: bool = False, needed_by: str = "FrozenVariance") -> None:
        self._optimizer = optimizer
        if not resumed:
            self._add_floor()
        self._frozen: dict[Tensor, dict[str, Tensor]] = {
            parameter: {key: state[key].clone() for key in _KEYS if key in state}
            for parameter, state in optimizer.state.items()
            if _KEYS[0] in state
        }
        self._steps = {parameter: _step(optimizer.state[parameter]) for parameter in self._frozen}
        if not self._frozen:
            raise ValueError(f"{needed_by} {NO_VARIANCE.format(type(optimizer).__name__)}")

    def _add_floor(self) -> None:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                for key in _KEYS:
                    if key in state:
                        state[key] += group["eps"] * (1 - group["betas"][1] ** _step(state))

    def put_back(self) -> None:
        """Undo what the last step did to the second moments, of the parameters that it moved."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._frozen:
                    state = self._optimizer.state[parameter]
                    before, now = self._steps[parameter], _step(state)
                    beta2 = group["betas"][1]
                    growth = (1 - beta2**now) / (1 - beta2**before)
                    self._steps[parameter] = now
                    for key, frozen in self._frozen[parameter].items():
                        state[key].copy_(frozen.mul_(growth))


def _step(state: dict[str, Any]) -> Tensor | float:
    step = state.get("step", math.inf)
    return step.double() if isinstance(step, Tensor) else float(step)
