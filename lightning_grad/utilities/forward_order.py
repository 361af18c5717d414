"""In which order a module uses its parameters: what comes first in the forward pass is where trouble begins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_grad.utilities.parameters import clean_name


def has_torch_forward(module: nn.Module) -> bool:
    """Return whether a module computes what a class of torch does, though it may be derived from it."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    forward = module.__dict__.get("forward", type(module).forward)
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    return str(getattr(forward, "__module__", "")).split(".")[0] == "torch"


def is_compiled(module: nn.Module) -> bool:
    """Say whether a module, its children apart, is compiled by ``torch.compile`` in one of its ways."""
    return (
        isinstance(module, torch._dynamo.OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None  # a whole LightningModule
        or any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(module).values())  # one of its methods
    )


@dataclass
class _Calls:
    """When a module was called, counted over all modules, and whether some call had inputs without a history."""

    first: int
    last: int
    from_outside: bool = False


class ForwardOrder:
    """Learns the order from one forward pass, through hooks that are gone after it.

    Until it is learnt, and for parameters whose modules were not called, it is the order in which they are registered.
    Compiled and scripted modules are not looked into: a hook would make the one compile again, and the other takes none.

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
        >>> order.watch()
        >>> _ = module(torch.ones(1, 2))
        >>> order.stop()
        >>> order.sort(["last.weight", "first.weight"])
        ['first.weight', 'last.weight']
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._called: dict[str, _Calls] = {}
        self._closed: set[str] = set()
        self._count = 0
        self._handles: list[Any] | None = None
        self.is_watching = False

    def watch(self) -> None:
        """Begin to learn, unless it has begun before."""
        if self._handles is not None:
            return
        self._handles, self.is_watching = [], True
        for name, child in self._module.named_modules():
            if not name or next(child.parameters(recurse=False), None) is None:
                continue
            if self._is_closed(name):
                self._closed.add(clean_name(name))
            else:
                seen = self._seen(clean_name(name))
                self._handles.append(child.register_forward_pre_hook(seen, with_kwargs=True))

    def stop(self) -> None:
        """Take the hooks away, for good."""
        self.is_watching = False
        while self._handles:
            self._handles.pop().remove()

    def _seen(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls = self._called.setdefault(name, _Calls(self._count, self._count))
            calls.last = self._count
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            calls.from_outside |= not any(value.requires_grad for value in inputs)
            self._count += 1

        return hook

    def _is_closed(self, name: str) -> bool:
        parts = name.split(".")
        path = [self._module.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
        return any(is_compiled(module) or isinstance(module, torch.jit.ScriptModule) for module in path)

    def sort(self, names: list[str]) -> list[str]:
        """Return names of parameters in the order of the forward pass."""
        return sorted(names, key=self._first)

    def networks(self, groups: Sequence[Sequence[str]]) -> list[list[str]] | None:
        """Return the parameters that the batch has reached, network by network, each in the order of the forward pass.

        Groups of parameters are networks of their own where the first layer of each takes something that no other group has
        made: the discriminator of a GAN sees real data. Otherwise they are parts of one network.

        Args:
            groups: Names of parameters, such as those that each optimizer moves.

        Returns:
            list | None: ``None`` if a compiled or scripted layer among them hides when it was called.
        """
        names = [name for group in groups for name in group]
        if any(name.rpartition(".")[0] in self._closed for name in names):
            return None
        reached = [sorted((n for n in group if self._calls_of(n)), key=self._first) for group in groups]
        networks: list[list[str]] = []
        for group in sorted(filter(None, reached), key=lambda group: self._first(group[0])):
            calls = self._calls_of(group[0])
            if networks and calls is not None and not calls.from_outside:
                networks[-1] = sorted([*networks[-1], *group], key=self._first)
            else:
                networks.append(group)
        return networks

    def last(self, names: Sequence[str]) -> str:
        """Return the parameter whose layer was called last; of equal ones the last in the order given."""
        return max(enumerate(names), key=lambda pair: (self._last(pair[1]), pair[0]))[1]

    def _first(self, name: str) -> int:
        calls = self._calls_of(name)
        return self._count if calls is None else calls.first

    def _last(self, name: str) -> int:
        calls = self._calls_of(name)
        return -1 if calls is None else calls.last

    def _calls_of(self, name: str) -> _Calls | None:
        """Return the calls of a parameter's module, or of a layer of torch that computes with it without calling it."""
        path = name.rpartition(".")[0]
        calls = self._called.get(path)
        if calls is None and path:
            outer = path.rpartition(".")[0]
            module = next((m for name, m in self._module.named_modules() if outer and clean_name(name) == outer), None)
            if module is not None and has_torch_forward(module):
                return self._called.get(outer)
        return calls
