"""Which parameters got a gradient in a step, on this rank and on any of them.

Used by ``compressed_ddp.py`` where DDP expects unused parameters. DDP does not touch the gradient of a parameter that no rank
has used: whatever was sent for it, and taken out of the memories, would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_grad.strategies._collectives import Collectives
from lightning_grad.utilities.undo import UndoList


class UsedParameters:
    """Marks the parameters that get a gradient, as DDP does, until all ranks have agreed on them.

    Args:
        parameters: By name, in the same order on all ranks.
        static: Whether the same ones are used in every step, so that ranks agree once.
    """

    def __init__(self, parameters: Mapping[str, Tensor], static: bool = False) -> None:
        self._places = {id(parameter): place for place, parameter in enumerate(parameters.values())}
        self._parameters, self._static = parameters, static
        self._agreed: Tensor | None = None
        self._read: tuple[Tensor | None, set[str]] = (None, set())
        self._undo = UndoList()
        self.forget()

    def attach(self) -> None:
        """Begin to mark."""
        for parameter in self._parameters.values():
            hook = parameter.register_post_accumulate_grad_hook(self._mark)  # type: ignore[no-untyped-call]
            self._undo.push(hook.remove)

    def detach(self) -> None:
        """End, and leave the parameters as they were found."""
        self._undo.run()

    def forget(self) -> None:
        """Begin a step: nothing is marked."""
        self._marks = [False] * len(self._parameters)

    def _mark(self, parameter: Tensor) -> None:
        self._marks[self._places[id(parameter)]] = True

    def agree(self, ranks: Collectives, device: torch.device) -> Tensor:
        """Return which parameters any rank has used since the last time, (parameters), uint8, and forget the marks."""
        marks = self._marks
        self.forget()
        if self._agreed is None or not self._static:
            # A static graph agrees in the first step only, and a resumed run once more: that must not be counted, lest its
            # counts be other ones than those of an uninterrupted run.
            mask = torch.tensor(marks, dtype=torch.uint8, device=device)
            self._agreed = ranks.maximum_(mask, counted=not self._static)
        return self._agreed

    def names(self, mask: Tensor) -> set[str]:
        """Return the names of the parameters in a mask; waits for the device, in a static graph once."""
        if mask is not self._read[0]:
            self._read = (mask, {name for name, mark in zip(self._parameters, mask.tolist(), strict=True) if mark})
        return self._read[1]
