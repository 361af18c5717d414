"""The order in which a module uses its parameters in the forward pass."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_grad.utilities.parameters import clean_name


def has_torch_forward(module: nn.Module) -> bool:
    """Return True if a module uses the ``forward`` of a torch class, possibly through inheritance."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    forward = module.__dict__.get("forward", type(module).forward)
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    return str(getattr(forward, "__module__", "")).split(".")[0] == "torch"


def is_compiled(module: nn.Module) -> bool:
    """Return True if ``torch.compile`` was applied to a module in any of its forms; children are not checked."""
    return (
        isinstance(module, torch._dynamo.OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None  # a whole LightningModule
        or any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(module).values())  # one of its methods
    )


@dataclass
class _Calls:
    """First and last call of a module, counted over all modules, and whether any call had only inputs without grad."""

    first: int
    last: int
    from_outside: bool = False


class ForwardOrder:
    """Record the order of modules in one forward pass, through temporary hooks.

    Parameters whose modules were not called keep their order of registration. Compiled and scripted modules get no
    hooks: a compiled module would compile again, and a scripted one accepts none.

    Args:
        module: The root module.

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
        """Register the hooks; does nothing if they were registered before."""
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
        """Remove the hooks permanently."""
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
        """Sort names of parameters by the forward pass."""
        return sorted(names, key=self._first)

    def networks(self, groups: Sequence[Sequence[str]]) -> list[list[str]] | None:
        """Return the parameters used in the forward pass, as one sorted list per network.

        Two groups of parameters belong to different networks if the first layer of each was called with an input that
        no other group had computed: the discriminator of a GAN is called with real data. Otherwise they form one
        network.

        Args:
            groups: Names of parameters, for example of each optimizer.

        Returns:
            list | None: ``None`` if one of the layers is compiled or scripted, so its calls are unknown.
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
        """Return the parameter whose layer was called last; ties go to the last in the given order."""
        return max(enumerate(names), key=lambda pair: (self._last(pair[1]), pair[0]))[1]

    def _first(self, name: str) -> int:
        calls = self._calls_of(name)
        return self._count if calls is None else calls.first

    def _last(self, name: str) -> int:
        calls = self._calls_of(name)
        return -1 if calls is None else calls.last

    @functools.cached_property
    def _modules(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for name, module in self._module.named_modules():
            found.setdefault(clean_name(name), module)
        return found

    def _calls_of(self, name: str) -> _Calls | None:
        """Return the calls of a parameter's module, or of a torch layer that uses the parameter without calling it."""
        path = name.rpartition(".")[0]
        calls = self._called.get(path)
        if calls is None and path:
            outer = path.rpartition(".")[0]
            module = self._modules.get(outer)
            if outer and module is not None and has_torch_forward(module):
                return self._called.get(outer)
        return calls
