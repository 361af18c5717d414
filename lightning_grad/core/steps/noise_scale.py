"""The gradient noise scale of a run. Its small batches are micro-batches, or the batches of the ranks.

Used by ``GradientMonitor`` and ``AdaptiveBatchSize``; the estimate is :func:`lightning_grad.functional.noise_scale_terms`.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_grad.core.ranks import averaging_ranks
from lightning_grad.functional import noise_scale_terms
from lightning_grad.functional.diagnostics.gradient_statistics import average_noise_terms
from lightning_grad.functional.gradients.tensor_lists import joined_norm
from lightning_grad.functional.plain_tensors import on_plain_tensors, plain_tensor
from lightning_grad.utilities.precision import loss_scale
from lightning_grad.utilities.reporting import log_summary

_DECAY = 0.95  # of the averages of noise and signal, per measurement


class NoiseScale:
    """The running averages of noise and signal, which outlast a step.

    Args:
        warms_up: Average the first measurements equally. Otherwise the first one counts more than each later one.
    """

    def __init__(self, warms_up: bool = False) -> None:
        self._warms_up = warms_up
        self._averages: Tensor | None = None
        self.count = 0  # of the measurements

    def add(self, terms: Tensor) -> None:
        """Add the noise and the signal of one step, if they are finite."""
        decay = min(_DECAY, self.count / (self.count + 1)) if self._warms_up else _DECAY
        self._averages = average_noise_terms(self._averages, terms, decay)
        self.count += 1

    def read(self) -> dict[str, Tensor]:
        """Return the noise scale in samples, and the averages that it is computed from."""
        if self._averages is None:
            return {}
        noise, signal = self._averages
        return {"noise_scale": noise / signal, "noise_trace": noise, "signal_squared": signal}

    def write(self, trainer: pl.Trainer, key: Callable[[str], str]) -> None:
        """Write the noise scale into the summary of the run, if it is finite."""
        final = self.read().get("noise_scale")
        if final is not None and math.isfinite(final.item()):
            log_summary(trainer, {key("noise_scale"): final.item()})

    def state_dict(self) -> dict[str, Any]:
        """Return the averages."""
        return {"averages": None if self._averages is None else self._averages.clone(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with saved averages."""
        self._averages, self.count = state["averages"], state.get("count", 0)


class NoiseScaleMeter:
    """Measure the gradient norm of each part of a batch.

    In measured steps, hooks on the parameters see the gradient of one backward pass on one rank,
    before it is accumulated and before DDP reduces it.

    Args:
        scale: The averages that it updates.
    """

    def __init__(self, scale: NoiseScale) -> None:
        self._scale = scale
        self._handles: list[Any] = []
        self._squares: list[Tensor] = []
        self._parts = 0
        self._sizes: list[int] = []
        self.batch_size = 1  # of the last part
        self._is_again = False

    @staticmethod
    def why_not(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
        """Return why the noise scale is undefined or cannot be measured in this run, or ``None``."""
        if not pl_module.automatic_optimization:
            return "under manual optimization it is unknown which backward passes belong to a step"
        if any(hasattr(parameter, "full_tensor") for parameter in pl_module.parameters()):
            return "gradients of sharded parameters are reduced before they can be measured"
        if getattr(trainer.strategy, "gradient_is_compressed", False):
            return "the exchanged gradient is not a mean, as entries come late (the strategy's log_noise_scale=True logs it)"
        if averaging_ranks(trainer) == 1 and trainer.accumulate_grad_batches == 1:
            return "it compares parts of a batch, so it needs accumulate_grad_batches or several ranks that average gradients"
        return None

    def begin_batch(self, parameters: Sequence[Tensor], batch: Any) -> None:
        """Prepare for one part of the batch of a measured step."""
        self._is_again = False
        if not self._handles:
            self._squares, self._parts, self._sizes = [], 0, []
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            self._handles = [p.register_hook(self._see) for p in trained]  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about batches whose size is ambiguous
            try:
                self.batch_size = int(extract_batch_size(batch))
            except Exception:  # Lightning cannot read the size either: count in parts of a batch
                self.batch_size = 1

    @on_plain_tensors
    def _see(self, gradient: Tensor) -> None:
        self._squares.append(joined_norm([plain_tensor(gradient).detach()]).square())

    def begin_again(self) -> None:
        """Drop what was seen of the step, whose parts are all evaluated again; the norm will be that of the new ones."""
        if not self._is_again:
            self._is_again, self._squares, self._parts = True, [], 0

    def end_part(self) -> None:
        """Count one backward pass."""
        if self._handles:
            self._parts += 1
            if not self._is_again:
                self._sizes.append(self.batch_size)

    def measure(self, trainer: pl.Trainer, norm: Tensor) -> tuple[Tensor, float] | None:
        """Add the gradient norm of the whole batch, just before the optimizer's step.

        It reduces over the ranks, so all of them must call it.

        Returns:
            tuple: Noise and signal of this step, (2,), and its number of samples (by the harmonic mean, if parts differ);
                ``None`` without two parts.
        """
        ranks, parts, accumulated = averaging_ranks(trainer), self._parts, trainer.accumulate_grad_batches
        squares, self._squares = self._squares, []
        self.stop()
        if not squares or parts * ranks < 2:
            return None
        # The loss of each part was divided by the number of parts of a full batch, and multiplied by the loss scale.
        small = torch.stack(squares).sum() / parts * (accumulated / loss_scale(trainer, norm.device)) ** 2
        if ranks > 1:
            small = trainer.strategy.reduce(small, reduce_op="mean")
        big = (norm * accumulated / parts).square()
        # The noise of a part is that of one sample, divided by the size of the part. The last part may be smaller.
        size = statistics.harmonic_mean(self._sizes)
        samples = size * parts * ranks
        terms = torch.stack(noise_scale_terms(small, big, size, samples))
        self._scale.add(terms)
        return terms, samples

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
