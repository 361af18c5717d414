"""AdaHessian and Sophia: optimizers that estimate the diagonal of the Hessian.

They are written here because the versions in libraries keep the graph of the gradients after the
step and draw from the global random stream, and because their learning rate of Sophia is not the
paper's.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_grad.functional.shuffling import hashed_seed
from lightning_grad.utilities.checks import check_above, check_at_least, check_count

_DETACHED = (
    "{} needs second derivatives, but no gradient has a graph. Compute gradients with automatic optimization or "
    "self.manual_backward(loss), and do not replace them by detached tensors."
)


class SecondOrderOptimizer(Optimizer):
    r"""Base of optimizers that use an estimate of the Hessian's diagonal, by Hutchinson's method.

    .. math::
        \hat{D} = z \odot H z

    H is the Hessian of the loss and z a random vector. Gradients need a graph in the steps that
    estimate it (:attr:`needs_graph`); afterwards they are detached, which frees the graph. z depends
    on the seed and the number of the step only, so a resumed run draws the same numbers.
    """

    gaussian: bool  # whether z is normal; otherwise its entries are -1 and 1

    def __init__(self, params: ParamsT, defaults: dict[str, Any], update_period: int, seed: int) -> None:
        check_at_least(defaults["lr"], 0.0, "lr")
        check_at_least(defaults["weight_decay"], 0.0, "weight_decay")
        check_count(update_period, 1, "update_period")
        super().__init__(params, {**defaults, "steps": 0})
        self.update_period = update_period
        self.seed = seed

    @property
    def needs_graph(self) -> bool:
        """Whether the next step estimates the Hessian, so its gradients need a graph."""
        return any(group["steps"] % self.update_period == 0 for group in self.param_groups)

    def update(self, weight: Tensor, gradient: Tensor, hessian: Tensor | None, group: dict[str, Any]) -> None:
        """Update one weight. Without a new estimate of the Hessian, ``hessian`` is ``None``."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step, and detach the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hessians = self._estimate() if self.needs_graph else {}
        for group in self.param_groups:
            group["steps"] += 1
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, weight.grad, hessians.get(weight), group)
        return loss

    def _weights(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"] if p.grad is not None)

    def _estimate(self) -> dict[Tensor, Tensor]:
        weights = list(self._weights())
        if not weights:
            return {}
        vectors = self._vectors(weights)
        products = self._products(weights, vectors)
        for weight in weights:
            weight.grad = _of(weight).detach()
        return dict(zip(weights, torch._foreach_mul(products, vectors), strict=True))

    def _vectors(self, weights: Sequence[Tensor]) -> list[Tensor]:
        seed = hashed_seed(self.seed, self.param_groups[0]["steps"])
        devices = {weight.device for weight in weights}
        generators = {device: torch.Generator(device).manual_seed(seed) for device in devices}
        draw = torch.randn if self.gaussian else _signs
        return [draw(w.shape, generator=generators[w.device], device=w.device, dtype=w.dtype) for w in weights]

    def _products(self, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return H z. A weight on which no gradient depends has zeros."""
        pairs = [(_of(w), z) for w, z in zip(weights, vectors, strict=True) if _of(w).requires_grad]
        if not pairs:
            raise RuntimeError(_DETACHED.format(type(self).__name__))
        gradients, outputs = zip(*pairs, strict=True)
        try:
            return list(torch.autograd.grad(gradients, weights, outputs, allow_unused=True, materialize_grads=True))
        except (RuntimeError, NotImplementedError) as error:
            raise RuntimeError(
                f"{type(self).__name__} needs second derivatives, and an operation of the module has none: {error}. "
                "Replace the operation, or use an optimizer of first order."
            ) from error


class AdaHessian(SecondOrderOptimizer):
    r"""Adam with the Hessian's diagonal in place of the second moment (2006.00719, algorithm 1).

    The diagonal is averaged over the positions of a convolution kernel, in absolute value as in the
    released code; the paper averages with signs.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay of the averages of gradient and squared diagonal.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        hessian_power: Exponent of the diagonal, in (0, 1].
        seed: Seed of the random vectors.
    """

    gaussian = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_at_least(eps, 0.0, "eps")
        check_above(hessian_power, 0.0, "hessian_power")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "hessian_power": hessian_power}
        super().__init__(params, defaults, update_period=1, seed=seed)

    def update(self, weight: Tensor, gradient: Tensor, hessian: Tensor | None, group: dict[str, Any]) -> None:
        """Update one weight."""
        assert hessian is not None  # update_period is 1
        beta1, beta2 = group["betas"]
        mean, squares = _averages(self.state[weight], weight, "exp_avg", "exp_hessian_sq")
        diagonal = _over_kernel(hessian)
        mean.lerp_(gradient, 1 - beta1)
        squares.mul_(beta2).addcmul_(diagonal, diagonal, value=1 - beta2)
        root = (squares / (1 - beta2 ** group["steps"])).pow_(group["hessian_power"] / 2).add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1 ** group["steps"]))


class Sophia(SecondOrderOptimizer):
    r"""Momentum divided by the Hessian's diagonal and clipped (2305.14342, algorithm 3, as Sophia-H).

    .. math::
        \theta \leftarrow \theta - \eta \lambda \theta
            - \eta \, \mathrm{clip}\left(\frac{m}{\max(\gamma h, \epsilon)}, 1\right)

    The learning rate is the paper's: no entry moves by more than it. Libraries clip m / h at gamma
    and so need a rate that is 1 / gamma times as large.

    Args:
        params: Parameters or groups.
        lr: Learning rate; about as large as AdamW's.
        betas: Decay of the averages of gradient and diagonal.
        gamma: Factor of the diagonal; smaller values clip more entries.
        eps: Smallest denominator.
        weight_decay: Decoupled weight decay.
        update_period: Estimate the Hessian every this many steps.
        seed: Seed of the random vectors.
    """

    gaussian = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        update_period: int = 10,
        seed: int = 0,
    ) -> None:
        check_above(gamma, 0.0, "gamma")
        check_above(eps, 0.0, "eps")
        defaults = {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, update_period, seed)

    def update(self, weight: Tensor, gradient: Tensor, hessian: Tensor | None, group: dict[str, Any]) -> None:
        """Update one weight."""
        beta1, beta2 = group["betas"]
        mean, diagonal = _averages(self.state[weight], weight, "exp_avg", "exp_hessian")
        mean.lerp_(gradient, 1 - beta1)
        if hessian is not None:
            diagonal.lerp_(hessian, 1 - beta2)
        update = mean / (diagonal * group["gamma"]).clamp_(min=group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update.clamp_(-1.0, 1.0), alpha=-group["lr"])


def _of(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def _averages(state: dict[str, Any], weight: Tensor, *names: str) -> tuple[Tensor, ...]:
    return tuple(
        state.setdefault(name, torch.zeros_like(weight)) if name not in state else state[name] for name in names
    )


def _over_kernel(hessian: Tensor) -> Tensor:
    if hessian.ndim < 3:
        return hessian
    return hessian.abs().mean(dim=tuple(range(2, hessian.ndim)), keepdim=True).expand_as(hessian)


def _signs(shape: torch.Size, **where: Any) -> Tensor:
    return torch.randint(0, 2, shape, **where).mul_(2).sub_(1)
