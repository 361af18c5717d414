"""In which order a module uses its parameters: what comes first in the forward pass is where trouble begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_grad.utilities.parameters import clean_name


def is_compiled(module: nn.Module) -> bool:
    """Say whether a module, its children apart, is compiled by ``torch.compile`` in one of its ways."""
    return (
        isinstance(module, torch._dynamo.OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None  # a whole LightningModule
        or any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(module).values())  # one of its methods
    )


class ForwardOrder:
    """Learns the order from one forward pass, through hooks that are gone after it.

    Until it is learnt, and for parameters whose modules were not called, it is the order in which they are registered. A
    compiled module is not looked into: a hook in it would make it compile anew; a scripted
    one takes none.

    Args:
        module: The root.

    Example:
        >>> class Backwards(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.last, self.first = nn.Linear(2, 2), nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.last(self.first(x))
        >>> module = Backwards()
        >>> order = ForwardOrder(module)
        >>> stop = order.watch()
        >>> _ = module(torch.ones(1, 2))
        >>> stop()
        >>> order.sort(["last.weight", "first.weight"])
        ['first.weight', 'last.weight']
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._called: dict[str, int] = {}

    def watch(self) -> Callable[[], None]:
        """Begin to learn.

        Returns:
            Callable: Takes the hooks away.
        """
        handles: list[Any] = [
            child.register_forward_pre_hook(self._seen(clean_name(f"{name}.")))
            for name, child in self._module.named_modules()
            if name and next(child.parameters(recurse=False), None) is not None and not self._is_closed(name)
        ]

        def stop() -> None:
            while handles:
                handles.pop().remove()

        return stop

    def _seen(self, prefix: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._called.setdefault(prefix.rstrip("."), len(self._called))

        return hook

    def _is_closed(self, name: str) -> bool:
        parts = name.split(".")
        path = [self._module.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
        return any(is_compiled(module) or isinstance(module, torch.jit.ScriptModule) for module in path)

    def sort(self, names: list[str]) -> list[str]:
        """Return names of parameters in the order of the forward pass."""
        return sorted(names, key=lambda name: self._called.get(name.rpartition(".")[0], len(self._called)))
