"""Holding still what an Adam-like optimizer remembers, while its weights go on."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

SECOND_MOMENTS = {"exp_avg_sq": 1, "max_exp_avg_sq": 1}


class FrozenMoments:
    r"""Keeps bias-corrected moments of an optimizer as they are, the second ones by default.

    After a step the moment :math:`v_t` becomes :math:`v_{t-1} (1 - \beta_2^t) / (1 - \beta_2^{t-1})`, so that
    :math:`\hat v = v_t / (1 - \beta_2^t)` never changes. One step still sees its own gradient, with weight
    :math:`1 - \beta_2` (a thousandth, usually); that gradients pile up in the moments cannot happen. Nothing needs saving: the
    moments in a checkpoint are the frozen ones.

    Weights that had next to no gradient before would keep next to no variance, and their first gradient would throw
    them out of bounds. So the optimizer's eps is added to :math:`\hat v` when it is frozen, which puts it under the root.

    Args:
        optimizer: An Adam-like optimizer that has stepped.
        resumed: Whether its moments come from a checkpoint and are frozen already, so that eps is not added again.
        moments: Keys of its state, each with the number of the beta that it decays by. A parameter that lacks the first has
            none to freeze.

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
        """Return of how many parameters the moments are frozen."""
        return len(self._frozen)

    def _add_floor(self) -> None:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                for key, beta in self._betas.items():
                    if key in state:
                        state[key] += group["eps"] * (1 - group["betas"][beta] ** _step(state))

    def put_back(self) -> None:
        """Undo what the last step did to the moments, of the parameters that it moved."""
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
