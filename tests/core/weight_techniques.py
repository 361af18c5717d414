"""Techniques that act on weights, as an author outside the package writes them: from public names of the core only."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_grad.core import FoundWeight, Stage, ViewedWeight, WeightCallback


class NoisyWeight(ViewedWeight):
    """A weight times 1 + std * noise while its layer trains; validation and checkpoints use the weight itself."""

    def __init__(self, found: FoundWeight, std: float, seed: int) -> None:
        super().__init__(found)
        self.std = std
        self.generator = torch.Generator(self.parameter.device)
        self.generator.manual_seed(seed + zlib.crc32(self.name.encode()))  # the same on every rank
        self.step()

    def step(self) -> None:
        like = self.parameter
        self.drawn_from = self.generator.get_state()
        noise = torch.randn(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)
        self.factor = 1 + self.std * noise

    def value(self, weight: Tensor) -> Tensor:
        return weight * self.factor if self.module.training else weight

    def state_dict(self) -> dict[str, Any]:
        return {"drawn_from": self.drawn_from}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["drawn_from"])
        self.step()


class WeightNoise(WeightCallback[NoisyWeight]):
    """Multiply weights by Gaussian noise in every training step, drawn again after each optimizer step.

    Args:
        std: Standard deviation of the noise, relative to the weight; 0 changes nothing.
        seed: Seed of the noise.
        include: Names or wildcards of parameters or modules that get noise.
        exclude: Names or wildcards of parameters or modules to skip.
        name: Name of this instance, needed if two are used.
    """

    namespace: ClassVar[str] = "noise"
    stage: ClassVar[Stage] = Stage.NOISE
    effect: ClassVar[str] = "noisy"

    def __init__(
        self,
        std: float = 0.1,
        seed: int = 0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        if std < 0:
            raise ValueError(f"std must be at least 0; got {std}.")
        self.std, self.seed = std, seed

    def view(self, found: FoundWeight) -> NoisyWeight:
        return NoisyWeight(found, self.std, self.seed)


class RoundedWeight(ViewedWeight):
    """A weight on a grid; no gradient passes where it lies beyond the grid's ends."""

    def __init__(self, found: FoundWeight, step_size: float, limit: float) -> None:
        super().__init__(found)
        self.step_size, self.limit = step_size, limit
        self.shown = self.inside = torch.empty(0)

    def stored(self, weight: Tensor) -> Tensor:
        return (weight / self.step_size).round().mul(self.step_size).clamp(-self.limit, self.limit)

    def refresh(self) -> None:
        incoming = self.incoming
        self.shown, self.inside = self.stored(incoming), (incoming.abs() <= self.limit).to(incoming.dtype)

    def value(self, weight: Tensor) -> Tensor:
        return _Shown.apply(weight, self.shown, self.inside)


class _Shown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, shown: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return shown.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.saved_tensors[0], None, None


class Rounding(WeightCallback[RoundedWeight]):
    """Round weights to a grid."""

    namespace: ClassVar[str] = "rounding"
    stage: ClassVar[Stage] = Stage.QUANTIZATION
    effect: ClassVar[str] = "round"

    def __init__(
        self, step_size: float = 0.05, limit: float = 0.2, include: Sequence[str] | None = None, name: str | None = None
    ) -> None:
        super().__init__(include, name=name)
        self.step_size, self.limit = step_size, limit

    def view(self, found: FoundWeight) -> RoundedWeight:
        return RoundedWeight(found, self.step_size, self.limit)
