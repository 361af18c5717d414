r"""Stream the gradients of single samples, and project them to vectors that fit in memory.

B gradients of P parameters take B P entries. :class:`PerSampleGradients` never stores them: it hands on blocks, each of
one parameter and a range of samples, from one forward and one backward pass. :class:`RademacherProjection` adds blocks
up to vectors of a few hundred entries whose inner products are about those of the gradients.
"""

import zlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_grad.functional.gradients._ghost.gradient_rows import GradientRows, Receive, send_by_backward
from lightning_grad.functional.gradients._ghost.tracer import Tracer
from lightning_grad.functional.gradients.per_sample_gradients import PerSampleGradientNorms

_WORD = 64  # signs in one random integer
_MOST_SIGNS = 1 << 20  # signs in memory at once
# The constants of the generator splitmix64, as signed integers.
_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


class PerSampleGradients(PerSampleGradientNorms):
    r"""Stream the gradient of each sample's own loss, block by block, from one forward and one backward pass.

    It is a :class:`PerSampleGradientNorms`, with the same cost and refusals: calling it returns the norms. A block
    holds up to eight million entries on a CPU and 32 million on a GPU, or one row. A block of a parameter that is used
    several times is sent when all uses are known. Parameters that the loss does not depend on are not sent: their
    gradient is zero.

    Args:
        module: The module whose trainable parameters are measured; in eval mode if it has BatchNorm.
        fallback: "auto" measures parameters without a rule by one backward pass per sample, "raise" raises.

    Attributes:
        samples: B of the latest stream.

    Example:
        >>> module = nn.Linear(2, 1, bias=False)
        >>> inputs = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
        >>> losses = lambda: module(inputs).squeeze(1)
        >>> gradients = PerSampleGradients(module)
        >>> gradients.stream(losses, lambda name, start, rows: print(name, start, rows.tolist()))
        weight 0 [[3.0, 4.0], [6.0, 8.0]]
    """

    _receive: Receive | None = None
    samples = 0

    def stream(self, compute_losses: Callable[[], Tensor], receive: Receive) -> None:
        """Send the gradients of all samples.

        Args:
            compute_losses: Function that runs the module and returns the losses, (B,), with their graph.
                It is called several times for the first batch, with the same random numbers.
            receive: Function (name, start, rows): ``rows`` (samples, entries) are the gradients of a parameter for the
                samples from ``start`` on. It must copy what it keeps.
        """
        self._receive = receive
        try:
            self(compute_losses)
        finally:
            self._receive = None

    def _measure(self, tracer: Tracer) -> Tensor:
        receive, like = self._receive, self._like(tracer)
        if receive is None:
            return super()._measure(tracer)
        self.samples = len(like)
        rest, entries = self._without_rule(tracer)
        if rest:
            send_by_backward(
                tracer.losses, rest, entries, lambda name, start, rows: receive(name, start, rows.to(like))
            )
        blocks = GradientRows(tracer.uses, tracer.parameters, like, receive)
        self._add_up(tracer, blocks.add)
        blocks.finish()
        return like


class RademacherProjection:
    r"""Project the gradients of samples by a fixed random matrix of signs.

    .. math::
        y_b = \frac 1 {\sqrt d} R\, g_b, \qquad R \in \{-1, 1\}^{d \times P}

    Inner products of projections are unbiased, with a standard error of at most
    :math:`\sqrt{2 / d}\, \lVert g_b \rVert \lVert g_c \rVert`. R is never stored: each sign is a hash of seed, parameter and
    position. So it is the same on every device, whatever the blocks.

    Args:
        samples: B.
        dim: d, a multiple of 64.
        seed: Seed of R.

    Attributes:
        values: y, (B, d), float32 on the device of the blocks; zeros before the first block.

    Raises:
        ValueError: If ``dim`` is not a positive multiple of 64.

    Example:
        >>> projection = RademacherProjection(samples=2, dim=64)
        >>> projection.add("weight", 0, torch.tensor([[3.0, 4.0], [6.0, 8.0]]))
        >>> projection.values.shape, torch.equal(2 * projection.values[0], projection.values[1])
        (torch.Size([2, 64]), True)

    References:
        Achlioptas, "Database-friendly random projections: Johnson-Lindenstrauss with binary coins", 2003.
        Park et al., "TRAK: Attributing Model Behavior at Scale", 2023, arXiv 2303.14186 (for gradients).
    """

    def __init__(self, samples: int, dim: int = 1024, seed: int = 0) -> None:
        if dim < _WORD or dim % _WORD:
            raise ValueError(f"dim must be a positive multiple of {_WORD}; got {dim}.")
        self._dim = dim
        self._seed = seed
        self.values = torch.zeros(samples, dim, dtype=torch.float32)  # bf16-true changes the default type

    def add(self, name: str, start: int, rows: Tensor) -> None:
        """Add the part of one block: the argument ``receive`` of :meth:`PerSampleGradients.stream`."""
        self.values = self.values.to(rows.device)
        total = self.values[start : start + len(rows)]
        columns = max(1, _MOST_SIGNS // self._dim)
        for first in range(0, rows.shape[1], columns):
            part = rows[:, first : first + columns].to(total.dtype)
            signs = _signs(name, first, part.shape[1], self._dim, self._seed, rows.device)
            total.addmm_(part, signs, alpha=self._dim**-0.5)


def _signs(name: str, first: int, count: int, dim: int, seed: int, device: torch.device) -> Tensor:
    """Return rows ``first`` to ``first + count`` of the matrix of signs of a parameter, (count, dim), float32."""
    words = dim // _WORD
    origin = zlib.crc32(f"{seed} {name}".encode()) << 31
    counter = torch.arange(first * words, (first + count) * words, device=device) + origin
    # Looking up the eight signs of each byte is twenty times as fast as shifting bits.
    places = torch.arange(8, device=device)
    signs_of_byte = ((torch.arange(256, device=device)[:, None] >> places) & 1).mul(2).sub(1).float()
    return F.embedding(_mixed(counter).view(torch.uint8).int(), signs_of_byte).view(count, dim)


def _mixed(counter: Tensor) -> Tensor:
    """Return random 64-bit integers by splitmix64; torch has no unsigned shift, so the sign is masked."""
    x = (counter + 1) * _STEP
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (_WORD - by)) - 1)


def project_gradients(
    module: nn.Module, compute_losses: Callable[[], Tensor], dim: int = 1024, seed: int = 0
) -> Tensor:
    """Return the projected gradient of each sample's loss.

    Args:
        module: The module, in eval mode if it has BatchNorm.
        compute_losses: As in :meth:`PerSampleGradients.stream`.
        dim: Entries of each projection, a multiple of 64.
        seed: Seed of the projection.

    Returns:
        Tensor: (B, dim), float32.

    Example:
        >>> module = nn.Linear(2, 1)
        >>> project_gradients(module, lambda: module(torch.eye(2)).squeeze(1), dim=128).shape
        torch.Size([2, 128])
    """
    gradients = PerSampleGradients(module)
    projections: list[RademacherProjection] = []

    def receive(name: str, start: int, rows: Tensor) -> None:
        if not projections:
            projections.append(RademacherProjection(gradients.samples, dim, seed))
        projections[0].add(name, start, rows)

    gradients.stream(compute_losses, receive)
    return projections[0].values if projections else torch.zeros(gradients.samples, dim, dtype=torch.float32)
