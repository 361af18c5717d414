"""Save and restore the contents of objects: tensors, containers, generators, meters, metrics, whole modules.

The objects themselves stay the same; only their contents are restored. Objects of frameworks (a
logger, a data set, a Trainer), code, and state inside C extensions are ignored: they are not state
of the user's module.

This runs in every step of some techniques, and a network has thousands of attributes. The attributes
of all modules are therefore read into flat lists, which built-in functions compare in one go.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, compress
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from lightning_grad.core.dispatch import MethodDispatcher
from lightning_grad.data.random_streams import GENERATORS, set_generator, state_of_generator
from lightning_grad.functional.plain_tensors import attributes_of, plain_tensor
from lightning_grad.utilities.batch_copies import FIXED

CONTAINERS = (list, dict, set, deque)
_PLAIN_CONTAINERS = (*CONTAINERS, OrderedDict)  # only exact types: subclasses may define their own truth and clear()
_CODE = (FunctionType, BuiltinFunctionType, MethodType, functools.partial, type, MethodDispatcher)
_OF_MODULES = ("_parameters", "_buffers", "_modules", "_trainer", "_fabric")  # what these refer to is not restored
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
    ordinary: list[tuple[Tensor, Tensor]] = []
    others: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        (ordinary if _is_ordinary(*pair) else others).append(pair)
    if ordinary:
        tensors, values = zip(*ordinary, strict=True)
        with torch.inference_mode(False), torch.no_grad():
            torch._foreach_copy_([tensor.detach() for tensor in tensors], values)
    for tensor, value in others:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            plain_tensor(tensor).detach().copy_(value)


def _is_ordinary(tensor: Tensor, value: Tensor) -> bool:
    """Return True if one call can copy into this tensor and others."""
    is_plain = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return is_plain and not tensor.is_inference() and tensor.shape == value.shape  # a step may resize it


@functools.cache
def _may_change(kind: Any) -> bool:
    """Return False for types whose objects have no state: numbers, code, objects of frameworks."""
    return kind not in FIXED and not issubclass(kind, _CODE) and (_has_contents(kind) or _is_own_class(kind))


@functools.cache
def _has_contents(kind: Any) -> bool:
    return issubclass(kind, (*CONTAINERS, *GENERATORS, tuple, Tensor, nn.Module, np.ndarray))


def _way_back(value: Any) -> Callable[[], object]:
    """Make a shallow copy of a value's contents, and return a function that restores them."""
    if isinstance(value, np.ndarray):
        return partial(np.copyto, value, value.copy())
    if isinstance(value, GENERATORS):
        return partial(set_generator, value, state_of_generator(value))
    if isinstance(value, CONTAINERS):
        return partial(_refill, value, dict(value) if isinstance(value, dict) else list(value))
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
    """The contents of modules, except which submodules and parameters they have.

    Args:
        modules: The modules, with all their submodules.
        frozen: Parameters to save and restore too.
    """

    def __init__(self, modules: Sequence[nn.Module], frozen: Sequence[nn.Parameter] = ()) -> None:
        self._known = set(map(id, modules))  # of everything saved so far, because objects may refer to each other
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._ways_back: list[Callable[[], object]] = []
        self._save_tensors(frozen)
        self._save_modules(modules)

    def restore(self) -> None:
        """Restore everything that can be restored, then raise the first error."""
        ways_back: list[Callable[[], object]] = [partial(put_back, self._tensors), *self._ways_back]
        errors: list[BaseException] = []
        for way_back in ways_back:
            try:
                way_back()
            except BaseException as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _save_modules(self, modules: Sequence[nn.Module]) -> None:
        attributes = _Attributes(modules)
        self._ways_back.append(attributes.restore)
        self._save_tensors(buffers_of(modules))
        for value in attributes.changing():
            self._save(value)

    def _save_tensors(self, tensors: Sequence[Tensor]) -> None:
        self._tensors += [(tensor, plain_tensor(tensor).detach().clone()) for tensor in tensors]

    def _save(self, value: Any) -> None:
        """Save a value and everything in it, unless it cannot change or is saved already."""
        kind: Any = type(value)
        if not _may_change(kind) or id(value) in self._known or (kind is tuple and holds_fixed_only(value)):
            return
        self._known.add(id(value))
        if isinstance(value, Tensor):
            self._save_tensors([value])
        elif isinstance(value, nn.Module):  # for example in a plain list, where it is not a registered submodule
            self._known.update(map(id, value.modules()))
            self._save_modules(list(value.modules()))
        else:
            self._save_contents(value)

    def _save_contents(self, value: Any) -> None:
        if not isinstance(value, tuple):  # which cannot change itself
            self._ways_back.append(_way_back(value))
        if not (isinstance(value, CONTAINERS) and holds_fixed_only(value)):
            for item in items_of(value):
                self._save(item)


class _Attributes:
    """The attributes and buffers of modules: which objects they are, not their contents.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._modes = [module.training for module in modules]
        self._buffers = [dict(module._buffers) if module._buffers else {} for module in modules]
        self._names, self._values, self._counts = _attributes_of_all(modules)
        plan = _plan_for(modules[0], self._names, list(map(type, self._values)))
        containers, self._others = plan.changing(self._values)
        # Every module has a dozen empty dictionaries; clearing them is faster than copying them.
        self._filled = [container for container in containers if container]
        self._empty = [container for container in containers if not container]

    def changing(self) -> list[Any]:
        """Return the values whose contents can change, except empty containers."""
        return [*self._filled, *self._others]

    def restore(self) -> None:
        """Give each module its attributes and buffers again, and clear the containers that were empty."""
        self._restore_buffers()
        self._restore_attributes()
        self._restore_modes()
        for container in filter(None, self._empty):
            container.clear()

    def _restore_buffers(self) -> None:
        for module, were in zip(self._modules, self._buffers, strict=True):
            buffers = module._buffers
            if (buffers or were) and isinstance(buffers, dict):  # in a scripted module it is a read-only view
                buffers.clear()
                buffers.update(were)

    def _restore_attributes(self) -> None:
        names, values, counts = _attributes_of_all(self._modules)
        if names == self._names and counts == self._counts and all(map(is_, values, self._values)):
            return
        end = 0
        for module, count in zip(self._modules, self._counts, strict=True):
            start, end = end, end + count
            were, own = dict(zip(self._names[start:end], self._values[start:end], strict=True)), vars(module)
            for name in [name for name in own if name not in were]:
                del own[name]
            own.update(were)

    def _restore_modes(self) -> None:
        for module, mode in zip(self._modules, self._modes, strict=True):
            if module.training != mode:  # a scripted module does not keep it in __dict__
                module.training = mode


class _Plan:
    """Positions of values that can change, in the list of all attributes of some modules.

    It follows from the names and types of the attributes, and holds nothing else, so it keeps no
    object alive. Attributes with other names or types need another plan. Buffers, training modes,
    gradients and contents are never planned: they are read again for each snapshot.

    Args:
        names: Names of the attributes.
        kinds: Types of their values.
    """

    def __init__(self, names: list[str], kinds: list[Any]) -> None:
        self._names, self._kinds = names, kinds
        may_change = [name not in _OF_MODULES and _may_change(kind) for name, kind in zip(names, kinds, strict=True)]
        are_containers = [kind in _PLAIN_CONTAINERS for kind in kinds]
        self._containers = list(map(bool.__and__, may_change, are_containers))
        self._others = list(map(bool.__gt__, may_change, are_containers))

    def fits(self, names: list[str], kinds: list[Any]) -> bool:
        """Return True if this is the plan for these attributes."""
        return names == self._names and kinds == self._kinds

    def changing(self, values: list[Any]) -> tuple[list[Any], list[Any]]:
        """Return the containers among the values, most of which are empty, and other values that can change."""
        return list(compress(values, self._containers)), list(compress(values, self._others))


_PLANS: WeakKeyDictionary[nn.Module, _Plan] = WeakKeyDictionary()  # by the first module


def _plan_for(owner: nn.Module, names: list[str], kinds: list[Any]) -> _Plan:
    """Return the owner's last plan if it fits, else a new one."""
    plan = _PLANS.get(owner)
    if plan is None or not plan.fits(names, kinds):
        plan = _Plan(names, kinds)
        if type(owner).__hash__ is object.__hash__:  # the hash of a metric depends on its state
            _PLANS[owner] = plan
    return plan


def _attributes_of_all(modules: Sequence[nn.Module]) -> tuple[list[str], list[Any], list[int]]:
    """Return the names and the values of the attributes of all modules, and the number of attributes of each."""
    attributes = list(map(vars, modules))
    return list(chain(*attributes)), list(chain(*map(dict.values, attributes))), list(map(len, attributes))


def parameters_of(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of the modules themselves, without their submodules; each once, in their order."""
    found = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    return list(found.values())


def buffers_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return the buffers of the modules themselves, without their submodules."""
    return [buffer for module in modules for buffer in module._buffers.values() if buffer is not None]
