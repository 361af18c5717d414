"""Freeze moments of an Adam-like optimizer while its weights keep training."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

SECOND_MOMENTS = {"exp_avg_sq": 1, "max_exp_avg_sq": 1}


class FrozenMoments:
    r"""Freezes bias-corrected moments of an optimizer, by default the second moments.

    After a step the moment :math:`v_t` becomes :math:`v_{t-1} (1 - \beta_2^t) / (1 -
    \beta_2^{t-1})`, so that :math:`\hat v = v_t / (1 - \beta_2^t)` never changes. Each step still
    includes its own gradient, with weight :math:`1 - \beta_2` (usually a thousandth), but gradients
    do not accumulate in the moments. Nothing extra is saved: the moments in a checkpoint are the
    frozen ones.

    Weights with almost no gradient so far have almost no variance, and their first larger gradient
    would cause a huge step. So the optimizer's eps is added to :math:`\hat v`, under the root, when
    it is frozen.

    Args:
        optimizer: Adam-like optimizer that has made at least one step.
        resumed: Whether the moments come from a checkpoint and are already frozen; eps is not added
            again.
        moments: Keys of its state, each with the index of the beta that it decays by. Parameters
            without the first key are not frozen.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.Adam([weight])
        >>> def step(gradient):
        ...     weight.grad = torch.full((1,), gradient)
        ...     optimizer.step()
        ...     state = optimizer.state[weight]
        ...     return round((state["exp_avg_sq"] / (1 - 0.999 ** state["step"])).item(), 3)
        >>> step(1.0)
        1.0
        >>> frozen = FrozenMoments(optimizer)
        >>> _ = step(5.0)
        >>> frozen.put_back()
        >>> state = optimizer.state[weight]
        >>> round((state["exp_avg_sq"] / (1 - 0.999 ** state["step"])).item(), 3)
        1.0
    """

    def __init__(
        self, optimizer: Optimizer, resumed: bool = False, moments: Mapping[str, int] = SECOND_MOMENTS
    ) -> None:
        self._optimizer = optimizer
        self._betas = dict(moments)
        if not resumed:
            self._add_floor()
        first = next(iter(self._betas))
        self._frozen: dict[Tensor, dict[str, Tensor]] = {
            parameter: {key: state[key].clone() for key in self._betas if key in state}
            for parameter, state in optimizer.state.items()
            if first in state
        }
        self._steps = {parameter: _step(optimizer.state[parameter]) for parameter in self._frozen}

    def __len__(self) -> int:
        """Return the number of parameters whose moments are frozen."""
        return len(self._frozen)

    def _add_floor(self) -> None:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                for key, beta in self._betas.items():
                    if key in state:
                        state[key] += group["eps"] * (1 - group["betas"][beta] ** _step(state))

    def put_back(self) -> None:
        """Undo the last step's changes to the moments."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._frozen:
                    self._put_back(parameter, group["betas"])

    def _put_back(self, parameter: Tensor, betas: tuple[float, ...]) -> None:
        state = self._optimizer.state[parameter]
        before, now = self._steps[parameter], _step(state)
        self._steps[parameter] = now
        for key, frozen in self._frozen[parameter].items():
            beta = betas[self._betas[key]]
            growth = (1 - beta**now) / (1 - beta**before)
            state[key].copy_(frozen.mul_(growth))


def _step(state: dict[str, Any]) -> Tensor | float:
    step = state.get("step", math.inf)
    return step.double() if isinstance(step, Tensor) else float(step)
