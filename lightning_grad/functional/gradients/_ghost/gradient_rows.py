"""Hand on the gradients of samples in blocks: those of one parameter and a range of samples at a time."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_grad.functional.gradients._ghost.contributions import Contribution, add_up, chunks
from lightning_grad.functional.gradients._ghost.graph import rows_of_jacobian
from lightning_grad.functional.gradients._ghost.sums import carried, connected
from lightning_grad.functional.gradients._ghost.tracer import Source, Use

BLOCK = 1 << 23  # entries of a block on a CPU: a projection draws its signs once for each block

Receive = Callable[[str, int, Tensor], None]


@dataclass
class _Group:
    """Contributions to the same parameters, by the id of the tensor that they are gradients of."""

    uses: int
    parts: dict[int, tuple[Source, list[Contribution]]] = field(default_factory=dict)


class GradientRows:
    """Sum the contributions of all uses of each parameter, and send the sums in blocks.

    A parameter with one use is sent as soon as its contribution arrives; others wait for their last use.

    Args:
        uses: All uses of the forward pass.
        parameters: The parameters by name.
        like: A tensor (B,) with the dtype and device of the gradients.
        receive: Gets the name of a parameter, the first sample of the block, and the gradients (samples, entries).
    """

    def __init__(self, uses: Iterable[Use], parameters: Mapping[str, Tensor], like: Tensor, receive: Receive) -> None:
        self._parameters, self._like, self._receive = parameters, like, receive
        self._group_of: dict[int, _Group] = {}
        for sources in connected([source for use in uses for source, _ in use.terms]):
            group = _Group(len(sources))
            self._group_of |= {id(source.tensor): group for source in sources}

    def add(self, source: Source, contribution: Contribution) -> None:
        """Take one contribution."""
        group = self._group_of[id(source.tensor)]
        group.parts.setdefault(id(source.tensor), (source, []))[1].append(contribution)
        if sum(len(contributions) for _, contributions in group.parts.values()) == group.uses:
            self._send(group)

    def finish(self) -> None:
        """Send what waits for a use that the loss does not depend on."""
        for group in {id(group): group for group in self._group_of.values()}.values():
            self._send(group)

    def _send(self, group: _Group) -> None:
        parts, group.parts = list(group.parts.values()), {}
        names = sorted(frozenset().union(*(source.roots for source, _ in parts)))
        leaves = [self._parameters[name] for name in names]
        if len(parts) == 1 and parts[0][0].tensor is leaves[0]:
            for start, stop in chunks(self._like, leaves[0].numel(), BLOCK):
                self._receive(names[0], start, add_up(parts[0][1], start, stop))
            return
        entries = sum(source.tensor.numel() for source, _ in parts) + sum(leaf.numel() for leaf in leaves)
        for start, stop in chunks(self._like, entries, BLOCK) if parts else ():
            sums = [self._like.new_zeros(stop - start, *leaf.shape) for leaf in leaves]
            for source, contributions in parts:
                rows = add_up(contributions, start, stop).view(stop - start, *source.tensor.shape)
                for total, gradient in zip(sums, carried(source.tensor, leaves, rows), strict=True):
                    if gradient is not None:
                        total += gradient
            for name, total in zip(names, sums, strict=True):
                self._receive(name, start, total.flatten(1))


def send_by_backward(losses: Tensor, parameters: Mapping[str, Tensor], entries: int, receive: Receive) -> None:
    """Send the gradients of each loss by one backward pass each, for all operations.

    Args:
        losses: (B,).
        parameters: The leaf tensors by name.
        entries: Number of entries in memory that one such backward pass needs.
        receive: As in :class:`GradientRows`.
    """
    for start, stop in chunks(losses, entries):
        seeds = torch.zeros(stop - start, len(losses), dtype=losses.dtype, device=losses.device)
        seeds[range(stop - start), range(start, stop)] = 1
        found = rows_of_jacobian(losses, list(parameters.values()), seeds)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                receive(name, start, gradient.flatten(1))
