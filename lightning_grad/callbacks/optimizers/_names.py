"""The optimizers that have a short name, and the scales of learning rates.

Used only by :class:`lightning_grad.callbacks.OptimizerSwap`.
"""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from lightning_grad.functional.choices import hint_for
from lightning_grad.functional.torch_version import TORCH

Make = Callable[..., Optimizer]

USUAL_RATES: Mapping[str, float] = {
    "SGD": 0.1,
    "Adam": 1e-3,
    "Lion": 2e-4,  # 3 to 10 times below Adam: 2302.06675, section 5
    "Adafactor": 1e-2,
    "Hessian": 0.15,
    "Prodigy": 1.0,
    "Adadelta": 1.0,
}
"""A usual learning rate of each scale. Only their ratios are used, to suggest a factor."""


@dataclass(frozen=True)
class Named:
    """An optimizer with a short name.

    Args:
        path: Dotted path of the class.
        scale: The scale of its learning rates, a key of :data:`USUAL_RATES`.
        extra: Extra of this package that installs it; empty for torch.
        options: Options of the constructor that differ from its defaults.
        elementwise: Whether the update of an entry depends on that entry alone, so it also works on
            shards of a parameter.
        only_matrices: Whether it moves matrices only, so the rest stays on the module's own optimizer.
        takes_sparse: Whether it takes sparse gradients.
        takes_complex: Whether it treats a complex entry as two real ones.
        copies_lists: Whether it copies lists of tensors unless ``foreach=False``, which torch cannot do with DTensors.
    """

    path: str
    scale: str = "Adam"
    extra: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    elementwise: bool = False
    only_matrices: bool = False
    takes_sparse: bool = False
    takes_complex: bool = False
    copies_lists: bool = False

    @property
    def class_name(self) -> str:
        """The name of the class."""
        return self.path.rpartition(".")[2]


def _of_library(name: str, scale: str = "Adam", **rest: Any) -> Named:
    return Named(f"pytorch_optimizer.{name}", scale, "optimizers", **rest)


def _for_matrices(name: str, **rest: Any) -> Named:
    return Named(f"lightning_grad.optimizers.{name}", only_matrices=True, **rest)


_EACH_ENTRY: Mapping[str, Any] = {"elementwise": True, "takes_complex": True}
NAMES: Mapping[str, Named] = {
    "adamw": Named("torch.optim.AdamW", **_EACH_ENTRY),
    "adam": Named("torch.optim.Adam", **_EACH_ENTRY),
    "sgd": Named("torch.optim.SGD", "SGD", takes_sparse=True, **_EACH_ENTRY),
    "adafactor": Named("torch.optim.Adafactor", "Adafactor"),
    "muon": Named("torch.optim.Muon", options={"adjust_lr_fn": "match_rms_adamw"}, only_matrices=True),
    "galore-adamw": _for_matrices("GaLoreAdamW"),
    "q-galore": _for_matrices("GaLoreAdamW", options={"lazy": True, "projector_bits": 4}),
    "frugal": _for_matrices("Frugal"),
    "dct-adamw": _for_matrices("DCTAdamW"),
    "lion": _of_library("Lion", "Lion", **_EACH_ENTRY),
    "adabelief": _of_library("AdaBelief", **_EACH_ENTRY),
    "adamp": _of_library("AdamP", takes_complex=True),
    "sgdp": _of_library("SGDP", "SGD", takes_complex=True),
    "diffgrad": _of_library("DiffGrad", copies_lists=True, **_EACH_ENTRY),
    "came": _of_library("CAME"),
    "spam": _of_library("SPAM"),
    "soap": _of_library("SOAP"),
    "prodigy": _of_library("Prodigy", "Prodigy"),
    "adahessian": Named("lightning_grad.callbacks.optimizers._second_order.AdaHessian", "Hessian"),
    "sophia": Named("lightning_grad.callbacks.optimizers._second_order.Sophia"),
    "schedulefree-adamw": Named("schedulefree.AdamWScheduleFree", extra="optimizers", elementwise=True),
}

_SCALES: Mapping[str, str] = {
    **{named.class_name.lower(): named.scale for named in NAMES.values()},
    **dict.fromkeys(("nadam", "nadamw", "radam", "adamax"), "Adam"),
    **dict.fromkeys(("asgd", "sgdw"), "SGD"),
    **dict.fromkeys(("dadaptadam", "dadaptadagrad", "dadaptadan", "dadaptlion", "dadaptsgd"), "Prodigy"),
    "adadelta": "Adadelta",
}
_VARIANT = re.compile("^(paged|schedulefree)|(8bit|4bit|32bit|fp8|schedulefree)$")
_NEWER: Mapping[str, str] = {"muon": "2.9"}  # versions of torch that brought a class
_SECOND_ORDER: Mapping[str, str] = {"adahessian": "adahessian", "sophiah": "sophia"}  # classes of libraries


def entry_of(kind: Any) -> Named | None:
    """Return the entry of an optimizer class that has a short name, also if it was found in another way.

    Example:
        >>> import torch
        >>> entry_of(torch.optim.SGD) is NAMES["sgd"], entry_of(torch.optim.Rprop)
        (True, None)
    """
    found = (getattr(kind, "__module__", "").partition(".")[0], getattr(kind, "__name__", ""))
    return next((each for each in NAMES.values() if (each.path.partition(".")[0], each.class_name) == found), None)


def refuse_second_order(kind: Any) -> None:
    """Raise for a class that needs a graph of the gradients, but does not say in which steps.

    Raises:
        ValueError: With the short name of this package's version.

    Example:
        >>> refuse_second_order(type("SophiaH", (), {}))
        Traceback (most recent call last):
        ValueError: optimizer must not be SophiaH, which needs second derivatives, but does not say in which steps. \
Write 'sophia', the version of this package.
    """
    name = getattr(kind, "__name__", "")
    if name.lower() in _SECOND_ORDER and not hasattr(kind, "needs_graph"):
        raise ValueError(
            f"optimizer must not be {name}, which needs second derivatives, but does not say in which steps. Write "
            f"{_SECOND_ORDER[name.lower()]!r}, the version of this package."
        )


def scale_of(kind: type) -> str | None:
    """Return the scale of the learning rates of an optimizer class, or ``None`` if it is not known.

    Classes are recognized by their name, which libraries share.

    Example:
        >>> import torch
        >>> scale_of(torch.optim.NAdam), scale_of(type("PagedAdamW8bit", (), {})), scale_of(torch.optim.Rprop)
        ('Adam', 'Adam', None)
    """
    name = kind.__name__.lower()
    return _SCALES.get(name, _SCALES.get(_VARIANT.sub("", name)))


def find_class(name: str) -> Make:
    """Return the optimizer class for a short name or a dotted path.

    Raises:
        ValueError: If there is no such name, module or class, or it is not an optimizer.
        ModuleNotFoundError: If the package is not installed.

    Example:
        >>> find_class("adafactor").__name__
        'Adafactor'
        >>> find_class("adafaktor")
        Traceback (most recent call last):
        ValueError: optimizer must be a short name or the dotted path of a class; got 'adafaktor'. Did you mean \
'adafactor'? Short names are adamw, adam, sgd, adafactor, muon, galore-adamw, q-galore, frugal, dct-adamw, lion, \
adabelief, adamp, sgdp, diffgrad, came, spam, soap, prodigy, adahessian, sophia, schedulefree-adamw.
    """
    named = NAMES.get(name)
    path = named.path if named else name
    module_name, _, class_name = path.rpartition(".")
    if not module_name:
        raise ValueError(
            "optimizer must be a short name or the dotted path of a class; got "
            f"{name!r}.{hint_for(name, NAMES)} Short names are {', '.join(NAMES)}."
        )
    found = getattr(_import(module_name, name, named), class_name, None)
    if found is None:
        raise ValueError(_words_of_missing(name, module_name, class_name))
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"optimizer must name a subclass of torch.optim.Optimizer; got {name!r}, which is {found!r}.")
    return found


def _import(module_name: str, name: str, named: Named | None) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        package = module_name.partition(".")[0]
        command = f'Run pip install "lightning-grad[{named.extra}]"' if named else f"Install {error.name}"
        is_absent = named is None and error.name == package  # so the path may be wrong
        raise ModuleNotFoundError(
            f"OptimizerSwap(optimizer={name!r}) needs {error.name}, which is not installed. "
            f"{command}{', or correct the path' if is_absent else ''}.",
            name=error.name,
        ) from error


def _words_of_missing(name: str, module_name: str, class_name: str) -> str:
    if name in _NEWER:
        version = ".".join(map(str, TORCH))
        return (
            f"optimizer={name!r} needs torch >= {_NEWER[name]}; this is torch {version}. Update torch, or use another."
        )
    known = [each for each, value in vars(importlib.import_module(module_name)).items() if isinstance(value, type)]
    return f"optimizer: {module_name} has no class {class_name!r}.{hint_for(class_name, known)}"
