"""Compress what ranks moved in a round, with error feedback. Used by ``_outer_model.py``."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.functional import communication as rules
from lightning_grad.functional.communication.wire import kept_count

_MOST_ENTRIES = 2**31  # of a compressed tensor: indices are int32


class MoveCodec(ABC):
    r"""Packs moves into bytes that every rank gathers, and keeps what it could not pack.

    .. math::
        e_r \leftarrow \beta e_r + \Delta_r, \qquad m_r = C(e_r), \qquad e_r \leftarrow e_r - m_r

    Args:
        min_numel: Smaller tensors and vectors are sent as they are.
        decay: Factor :math:`\beta` of the residual.
    """

    def __init__(self, min_numel: int, decay: float) -> None:
        self._min_numel, self._decay = min_numel, decay

    def compresses(self, weight: Tensor) -> bool:
        """Return whether the moves of a weight are compressed."""
        return weight.dim() > 1 and self._min_numel <= weight.numel() < _MOST_ENTRIES

    def pack(self, moves: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Return the message of this rank, uint8, and leave in the residuals what is not in it.

        Args:
            moves: Move and residual of each weight; residuals are flat, and changed in place.
        """
        for move, residual in moves.values():
            residual.mul_(self._decay).add_(move.reshape(-1))
        return self.encode([residual for _, residual in moves.values()])

    def mean(self, messages: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return the mean move of each weight from the messages of all ranks, (ranks, bytes)."""
        sizes = [shape.numel() for shape in shapes.values()]
        means = [torch.zeros(size, device=messages.device) for size in sizes]
        for message in messages:  # all ranks add in rank order and so get the same bits
            self.add_(means, message, 1.0 / len(messages))
        return {name: mean.view(shape) for mean, (name, shape) in zip(means, shapes.items(), strict=True)}

    @abstractmethod
    def encode(self, values: Sequence[Tensor]) -> Tensor:
        """Return flat vectors as one message, uint8, and subtract what it contains from them."""

    @abstractmethod
    def add_(self, sums: Sequence[Tensor], message: Tensor, factor: float) -> None:
        """Add the vectors of a message to flat vectors of the same sizes."""

    @abstractmethod
    def sent_bytes(self, numel: int) -> int:
        """Return the bytes of a vector in the message."""


class TopK(MoveCodec):
    """Packs the largest entries of each vector as pairs of index and value.

    Args:
        ratio: Share of the entries.
        min_numel: See :class:`MoveCodec`.
        decay: See :class:`MoveCodec`.
    """

    def __init__(self, ratio: float, min_numel: int, decay: float) -> None:
        super().__init__(min_numel, decay)
        self._ratio = ratio

    @override
    def encode(self, values: Sequence[Tensor]) -> Tensor:
        counts = self._counts(values)
        indices = [rules.select_largest(one, k, "exact") for one, k in zip(values, counts, strict=True)]
        sent = [one[index].float() for one, index in zip(values, indices, strict=True)]
        for one, index, value in zip(values, indices, sent, strict=True):
            rules.remove_sent_(one, index, value)
        return rules.pack_pairs(indices, sent, counts)

    @override
    def add_(self, sums: Sequence[Tensor], message: Tensor, factor: float) -> None:
        for one, (indices, values) in zip(sums, rules.unpack_pairs(message, self._counts(sums)), strict=True):
            rules.add_pairs_(one, indices, values, factor)

    def _counts(self, values: Sequence[Tensor]) -> list[int]:
        return [kept_count(one.numel(), self._ratio) for one in values]

    @override
    def sent_bytes(self, numel: int) -> int:
        return 8 * kept_count(numel, self._ratio)


class Int8(MoveCodec):
    """Packs each entry into one byte, with a scale for each block of entries."""

    @override
    def encode(self, values: Sequence[Tensor]) -> Tensor:
        messages = [rules.pack_int8(one) for one in values]
        for one, message in zip(values, messages, strict=True):
            one.sub_(rules.unpack_int8(message, one.numel()))
        return torch.cat(messages)

    @override
    def add_(self, sums: Sequence[Tensor], message: Tensor, factor: float) -> None:
        parts = torch.split(message, [rules.int8_bytes(one.numel()) for one in sums])
        for one, part in zip(sums, parts, strict=True):
            one.add_(rules.unpack_int8(part, one.numel()), alpha=factor)

    @override
    def sent_bytes(self, numel: int) -> int:
        return rules.int8_bytes(numel)
