"""Which parameters got a gradient in a step, on this rank and on any of them.

Used by ``compressed_ddp.py`` where DDP expects unused parameters. DDP does not touch the gradient of a parameter that no
rank has used: whatever was sent for it, and taken out of the memories, would be lost. One without a gradient is not moved by
the optimizer, so it can wait. One whose gradient is zeros, which ``zero_grad(set_to_none=False)`` has left, is moved by its
momentum: it takes part in the exchange, and what arrives is written past DDP.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lightning_grad.core.undo import UndoList
from lightning_grad.strategies._collectives import Collectives
from lightning_grad.utilities.reporting import listed

_ABSENT, _ZERO, _USED = 0, 1, 2  # no gradient, one that nothing was added to, one that this step has made


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
        self._read: tuple[Tensor | None, tuple[set[str], set[str]]] = (None, (set(), set()))
        self.forget()

    def attach(self, undo: UndoList) -> None:
        """Begin to mark, until a list takes it back."""
        for parameter in self._parameters.values():
            hook = parameter.register_post_accumulate_grad_hook(self._mark)  # type: ignore[no-untyped-call]
            undo.push(hook.remove)

    def forget(self) -> None:
        """Begin a step: nothing is marked."""
        self._marks = [False] * len(self._parameters)

    def _mark(self, parameter: Tensor) -> None:
        self._marks[self._places[id(parameter)]] = True

    def agree(self, ranks: Collectives, device: torch.device, owned: Collection[int]) -> Tensor:
        """Return a mask of what any rank has of each parameter since the last time, (parameters), uint8; forget the marks.

        Args:
            ranks: Talks to them.
            device: Of the mask.
            owned: Identities of the parameters that an optimizer moves. Other gradients are never zeroed.
        """
        given = zip(self._parameters.values(), self._marks, strict=True)
        marks = [_USED if used else _ZERO if p.grad is not None and id(p) in owned else _ABSENT for p, used in given]
        self.forget()
        if self._agreed is None or not self._static:
            # In a static graph ranks agree in the first step only, and once more after a resume. If that was counted, a
            # resumed run would have sent more than an uninterrupted one.
            mask = torch.tensor(marks, dtype=torch.uint8, device=device)
            self._agreed = ranks.maximum_(mask, counted=not self._static)
        return self._agreed

    def names(self, mask: Tensor) -> tuple[set[str], set[str]]:
        """Return the names of the parameters that take part, and of those among them whose gradients DDP does not touch.

        It waits for the device, in a static graph once.
        """
        if mask is not self._read[0]:
            marks = dict(zip(self._parameters, mask.tolist(), strict=True))
            present = {name for name, mark in marks.items() if mark != _ABSENT}
            self._read = (mask, (present, {name for name in present if marks[name] == _ZERO}))
        return self._read[1]


def explain_unused_parameters(error: BaseException, display_name: str, parameters: Mapping[str, Tensor]) -> None:
    """Replace what Lightning says of parameters that got no gradient, which would lead away from the strategy.

    Args:
        error: Its message is changed, if it is that one.
        display_name: Whose run it is.
        parameters: Of the module, by name, with the gradients of the step that was broken off.
    """
    if not any("parameters that were not used in producing the loss" in str(part) for part in error.args):
        return
    unused = [name for name, parameter in parameters.items() if parameter.requires_grad and parameter.grad is None]
    named = f" ({listed(unused)})" if unused else ""
    text = (
        f"{display_name}: some parameters{named} got no gradient in a step. If that is intended, set "
        f"{display_name}(find_unused_parameters=True). If they are never used, freeze them with requires_grad_(False)."
    )
    error.args = (text,)
