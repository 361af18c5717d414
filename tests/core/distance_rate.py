"""DoWG's rule around any SGD, as an author outside the package writes it."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core import OptimizerCallback, during_fit


class DistanceRate(OptimizerCallback):
    """Multiply the learning rate by DoWG's step size, which grows with the distance that the weights have come.

    Khaled et al., 2023, arXiv 2305.16284: r = max(r, |w - w0|), v = v + r^2 |g|^2, step size r^2 / sqrt(v).

    Args:
        first: Distance to begin with.
        power: What the step size is raised to; 0 leaves the rates as they are.
        name: Name of this instance.
    """

    namespace: ClassVar[str] = "lr/distance"

    _next = during_fit.of(dict[int, list[Tensor]])  # r and v after the step that is being made

    def __init__(self, first: float = 1e-4, power: float = 1.0, name: str | None = None) -> None:
        super().__init__(name)
        self.first, self.power = first, power

    @override
    def before_update(self, index: int, optimizer: Optimizer) -> None:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in weights if p.grad is not None]
        if self.power and gradients:
            memory = self.memory(index)
            start = memory.setdefault("start", [w.detach().clone() for w in weights])
            distance, total = memory.get("sums", [weights[0].new_tensor(self.first), weights[0].new_tensor(0.0)])
            moved = torch.stack(torch._foreach_norm(torch._foreach_sub(weights, start))).norm()
            distance = torch.maximum(distance, moved)
            total = total + distance**2 * torch.stack(torch._foreach_norm(gradients)).norm() ** 2
            self._next[index] = [distance, total]
            self.multiply_rates(index, (distance**2 / total.sqrt()) ** self.power)

    @override
    def after_step(self, index: int, optimizer: Optimizer) -> None:
        if index in self._next:
            self.memory(index)["sums"] = self._next.pop(index)
