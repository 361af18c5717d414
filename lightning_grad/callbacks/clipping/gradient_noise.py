"""Gradient noise: the callback. The rule is :func:`lightning_grad.functional.add_gradient_noise_`."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_grad.core import GradientConditioner, GradientStep, Role
from lightning_grad.functional import add_gradient_noise_, noise_deviation
from lightning_grad.utilities.checks import check_finite_at_least


class GradientNoise(GradientConditioner):
    r"""Add Gaussian noise to all gradients; the noise decays during training.

    .. math::
        g_t \leftarrow g_t + \mathcal N(0, \sigma_t^2), \qquad \sigma_t^2 = \frac{\eta}{(1 + t)^\gamma}

    The noise comes from a generator seeded by seed and t, and is the same on every rank. A resumed
    run therefore draws the same noise as an uninterrupted one, and torch's own random state is not
    touched. Noise is added after clipping, as in the paper.

    Args:
        eta: Variance of the noise at the first step; 0 adds no noise.
            The paper tries 0.01, 0.3 and 1.
        decay: gamma, the exponent with which the variance decays (0.55 in the paper).
        seed: Seed of the noise.
        include: Names or wildcards of the parameters or modules that get noise. Default: all.
        exclude: Names or wildcards of the parameters or modules that get no noise.
        name: Name of this instance. Required if the Trainer has two of this class.

    Raises:
        ValueError: In the constructor if eta or decay is negative or infinite. Before the first
            batch with ``Trainer(gradient_clip_val=...)``, which would clip the noise, under FSDP1
            or DeepSpeed, with a fused optimizer in fp16, with sparse gradients, or if a name
            pattern matches nothing.

    **Hooks.** ``on_before_optimizer_step``, after gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/noise/``, at log steps: ``deviation`` (sigma).

    **State.** The step count t of each optimizer.

    **Cost.** One normal draw per entry. On a CPU the noise of a large gradient is drawn in pieces, so it
    needs little memory.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.GradientNoise
                  init_args:
                    eta: 0.01

    References:
        Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015,
        arXiv 1511.06807: decay 0.55, eta chosen from 0.01, 0.3 and 1.
    """

    namespace: ClassVar[str] = "grad/noise"
    trial: ClassVar[Mapping[str, Any]] = {"eta": 0.01}
    neutral: ClassVar[Mapping[str, Any] | str] = {"eta": 0.0}
    role: ClassVar[Role] = "noise"

    def __init__(
        self,
        eta: float = 0.01,
        decay: float = 0.55,
        seed: int = 0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        self.eta = check_finite_at_least(eta, 0.0, "eta")
        self.decay = check_finite_at_least(decay, 0.0, "decay")
        self.seed = seed

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        deviation = noise_deviation(step.step, self.eta, self.decay)
        if deviation > 0.0:
            add_gradient_noise_(step.gradients, deviation, _seed(self.seed, self.name, step.index, step.step))
        return {"deviation": deviation}


def _seed(*parts: object) -> int:
    """Return a seed of 62 bits that depends on every part; neighboring steps get unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 2
