"""Tracks which parameters got a gradient in a step, on this rank and on any rank.

Used by ``compressed_ddp.py`` where DDP expects unused parameters. DDP does not touch the gradient of a parameter that
no rank used, so anything sent for it and removed from the memories would be lost. A parameter without a gradient is
not updated by the optimizer, so it can wait. A parameter whose gradient is zero, as ``zero_grad(set_to_none=False)``
leaves it, is moved by its momentum: it takes part in the exchange, and the result is written into ``.grad`` here, not
by DDP.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lightning_grad.core.undo import UndoList
from lightning_grad.strategies._collectives import Collectives
from lightning_grad.utilities.reporting import listed

_ABSENT, _ZERO, _USED = 0, 1, 2  # no gradient; a zero gradient from zero_grad; a gradient from this step


class UsedParameters:
    """Marks the parameters that get a gradient, like DDP, until all ranks have agreed on them.

    Args:
        parameters: Parameters by name, in the same order on all ranks.
        static: Whether every step uses the same parameters, so ranks agree once.
    """

    def __init__(self, parameters: Mapping[str, Tensor], static: bool = False) -> None:
        self._places = {id(parameter): place for place, parameter in enumerate(parameters.values())}
        self._parameters, self._static = parameters, static
        self._agreed: Tensor | None = None
        self._read: tuple[Tensor | None, tuple[set[str], set[str]]] = (None, (set(), set()))
        self.forget()

    def attach(self, undo: UndoList) -> None:
        """Register the hooks and push their removal to ``undo``."""
        for parameter in self._parameters.values():
            hook = parameter.register_post_accumulate_grad_hook(self._mark)  # type: ignore[no-untyped-call]
            undo.push(hook.remove)

    def forget(self) -> None:
        """Clear all marks at the start of a step."""
        self._marks = [False] * len(self._parameters)

    def _mark(self, parameter: Tensor) -> None:
        self._marks[self._places[id(parameter)]] = True

    def agree(self, ranks: Collectives, device: torch.device, owned: Collection[int]) -> Tensor:
        """Return the maximum over ranks of each parameter's mark, (parameters), uint8, and clear the marks.

        Args:
            ranks: The collectives.
            device: Device of the result.
            owned: ``id`` of each parameter that an optimizer holds. Gradients of others are never zeroed.
        """
        given = zip(self._parameters.values(), self._marks, strict=True)
        marks = [_USED if used else _ZERO if p.grad is not None and id(p) in owned else _ABSENT for p, used in given]
        self.forget()
        if self._agreed is None or not self._static:
            # In a static graph, ranks agree in the first step, and again after a resume. The bytes are not counted: a
            # resumed run would otherwise report more than an uninterrupted one.
            mask = torch.tensor(marks, dtype=torch.uint8, device=device)
            self._agreed = ranks.maximum_(mask, counted=not self._static)
        return self._agreed

    def names(self, mask: Tensor) -> tuple[set[str], set[str]]:
        """Return the names of the parameters that take part, and of those among them that DDP does not write.

        Waits for the device: in every step, or once in a static graph.
        """
        if mask is not self._read[0]:
            marks = dict(zip(self._parameters, mask.tolist(), strict=True))
            present = {name for name, mark in marks.items() if mark != _ABSENT}
            self._read = (mask, (present, {name for name in present if marks[name] == _ZERO}))
        return self._read[1]


def explain_unused_parameters(error: BaseException, display_name: str, parameters: Mapping[str, Tensor]) -> None:
    """Replace Lightning's message about unused parameters, which recommends another strategy.

    Args:
        error: Its message is replaced if it is about unused parameters.
        display_name: Name of the strategy.
        parameters: Parameters of the module by name, with the gradients of the failed step.
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
