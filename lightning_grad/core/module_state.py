"""Save and restore the contents of objects: tensors, containers, generators, meters, metrics, whole modules.

The objects themselves stay the same; only their contents are restored. Objects of frameworks (a
logger, a data set, a Trainer), code, and state inside C extensions are ignored: they are not state
of the user's module.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_grad.core.dispatch import MethodDispatcher
from lightning_grad.data.random_streams import GENERATORS, set_generator, state_of_generator
from lightning_grad.functional.plain_tensors import attributes_of, plain_tensor
from lightning_grad.utilities.batch_copies import FIXED

CONTAINERS = (list, dict, set, deque)
_DICTIONARIES = (dict, OrderedDict)
_CODE = (FunctionType, BuiltinFunctionType, MethodType, functools.partial, type, MethodDispatcher)
_OF_MODULES = ("_parameters", "_buffers", "_modules", "_trainer", "_fabric")
# Parts of the standard library from which users derive classes, or in which they keep values.
_BASES = {"abc", "argparse", "builtins", "collections", "dataclasses", "types", "typing"}
_FRAMEWORKS = (
    "PIL datasets google hydra jsonargparse lightning lightning_fabric lightning_grad lightning_utilities matplotlib "
    "mlflow numpy omegaconf pandas pytorch_lightning rich scipy sklearn tensorboard tensorboardX tokenizers torch "
    "torchaudio torchmetrics torchvision tqdm transformers wandb"
)
_FOREIGN = frozenset((sys.stdlib_module_names - _BASES) | set(_FRAMEWORKS.split()))


def is_code(value: Any) -> bool:
    """Return True for functions, methods, classes and other code, which hold nothing that changes."""
    return isinstance(value, _CODE)


def has_own_state(value: Any) -> bool:
    """Return True if an object is an instance of a user's class, such as an average meter, and has attributes."""
    kind: Any = type(value)
    return _is_own_class(kind) and bool(attributes_of(value))


@functools.cache
def _is_own_class(kind: type) -> bool:
    packages = {cls.__module__.partition(".")[0] for cls in kind.__mro__ if cls is not object}
    return kind.__module__ != "builtins" and not packages & _FOREIGN


def holds_fixed_only(container: Any) -> bool:
    """Return True if nothing in a container can change, as in a vocabulary."""
    items = container.values() if isinstance(container, dict) else container
    return FIXED.issuperset(map(type, items))


def put_back(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first. Inference tensors can only be changed in inference mode."""
    normal = [pair for pair in pairs if not pair[0].is_inference()]
    others = [pair for pair in pairs if pair[0].is_inference()]
    for mode, chosen in ((False, normal), (True, others)):
        if chosen:
            with torch.inference_mode(mode), torch.no_grad():
                for tensor, value in chosen:
                    plain_tensor(tensor).detach().copy_(value)


def put_aside(value: Any, known: set[int]) -> list[Held]:
    """Return a list that holds the saved value, or an empty list if it cannot change or is saved already.

    Args:
        value: The value.
        known: ``id()`` of everything saved so far; the value's is added. Objects may refer to each
            other.
    """
    kind = type(value)
    if kind in FIXED or id(value) in known or isinstance(value, _CODE):
        return []
    changes = isinstance(value, (*CONTAINERS, *GENERATORS, tuple, Tensor, nn.Module, np.ndarray))
    return [Held(value, known)] if changes or has_own_state(value) else []


class Held:
    """A value and a copy of its contents.

    Args:
        value: The value.
        known: ``id()`` of everything saved so far.
    """

    def __init__(self, value: Any, known: set[int]) -> None:
        known.add(id(value))
        self._put_back = _way_back(value)
        self._parts: list[Held | Snapshot] = []
        if isinstance(value, nn.Module):  # for example in a plain list, where it is not a registered submodule
            self._parts += [Snapshot(module, False, known) for module in value.modules()]
        elif not (isinstance(value, CONTAINERS) and holds_fixed_only(value)):
            self._parts += [held for item in items_of(value) for held in put_aside(item, known)]

    def restore(self) -> None:
        """Restore its contents, and the contents of everything in it."""
        self._put_back()
        for part in self._parts:
            part.restore()


def _way_back(value: Any) -> Callable[[], object]:
    """Make a shallow copy of a value's contents, and return a function that restores them."""
    if isinstance(value, Tensor):
        return partial(put_back, [(value, plain_tensor(value).detach().clone())])
    if isinstance(value, np.ndarray):
        return partial(np.copyto, value, value.copy())
    if isinstance(value, GENERATORS):
        return partial(set_generator, value, state_of_generator(value))
    if isinstance(value, CONTAINERS):
        return partial(_refill, value, dict(value) if isinstance(value, dict) else list(value))
    if isinstance(value, (tuple, nn.Module)):  # a tuple cannot change; a Snapshot restores a module
        return lambda: None
    return partial(_set_state, value, attributes_of(value))


def items_of(value: Any) -> Iterable[Any]:
    """Return the items of a container, or the attributes of an object."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, deque)):
        return list(value)
    return [] if isinstance(value, (Tensor, np.ndarray, *GENERATORS)) else list(attributes_of(value).values())


def _refill(container: Any, was: Any) -> None:
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(was)
    else:
        container.extend(was)


def _set_state(value: Any, was: dict[str, Any]) -> None:
    for name in attributes_of(value).keys() - was.keys():
        object.__delattr__(value, name)
    for name, item in was.items():
        object.__setattr__(value, name, item)  # works for frozen dataclasses too


class Snapshot:
    """The contents of one module, except its submodules and trained parameters.

    Args:
        module: The module.
        copies_frozen: Whether frozen parameters are saved and restored too.
        known: ``id()`` of everything saved so far.
    """

    def __init__(self, module: nn.Module, copies_frozen: bool, known: set[int]) -> None:
        self._module = module
        known.add(id(module))
        frozen = [p for p in module._parameters.values() if p is not None and not p.requires_grad and copies_frozen]
        buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
        self._tensors = [(tensor, plain_tensor(tensor).detach().clone()) for tensor in (*buffers, *frozen)]
        self._buffers = dict(module._buffers)
        self._mode = module.training
        self._attributes = {name: value for name, value in module.__dict__.items() if name not in _OF_MODULES}
        # Every module has a dozen empty dictionaries; clearing them is faster than copying them.
        self._empty = [value for value in self._attributes.values() if type(value) in _DICTIONARIES and not value]
        known.update(map(id, self._empty))
        self._held = [held for value in self._attributes.values() for held in put_aside(value, known)]
        self._names = set(module.__dict__)

    def restore(self) -> None:
        """Restore the module."""
        module = self._module
        put_back(self._tensors)
        if isinstance(module._buffers, dict):  # in a scripted module it is a read-only view
            module._buffers.clear()
            module._buffers.update(self._buffers)
        for name in [name for name in module.__dict__ if name not in self._names]:
            del module.__dict__[name]
        module.__dict__.update(self._attributes)
        if module.training != self._mode:  # a scripted module does not keep it in __dict__
            module.training = self._mode
        for held in self._held:
            held.restore()
        for container in self._empty:
            container.clear()
