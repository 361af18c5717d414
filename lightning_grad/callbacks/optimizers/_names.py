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
        only_matrices: Whether it refuses parameters that are not two-dimensional.
        needs_graph: Whether it differentiates the gradients, so backward must keep their graph.
        averages: Whether validation and checkpoints need other weights than training.
    """

    path: str
    scale: str = "Adam"
    extra: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    elementwise: bool = False
    only_matrices: bool = False
    needs_graph: bool = False
    averages: bool = False

    @property
    def class_name(self) -> str:
        """The name of the class."""
        return self.path.rpartition(".")[2]


def _of_library(name: str, scale: str = "Adam", **rest: Any) -> Named:
    return Named(f"pytorch_optimizer.{name}", scale, "optimizers", **rest)


NAMES: Mapping[str, Named] = {
    "adamw": Named("torch.optim.AdamW", elementwise=True),
    "adam": Named("torch.optim.Adam", elementwise=True),
    "sgd": Named("torch.optim.SGD", "SGD", elementwise=True),
    "adafactor": Named("torch.optim.Adafactor", "Adafactor"),
    "muon": Named("torch.optim.Muon", options={"adjust_lr_fn": "match_rms_adamw"}, only_matrices=True),
    "lion": _of_library("Lion", "Lion", elementwise=True),
    "adabelief": _of_library("AdaBelief", elementwise=True),
    "adamp": _of_library("AdamP"),
    "sgdp": _of_library("SGDP", "SGD"),
    "diffgrad": _of_library("DiffGrad", elementwise=True),
    "came": _of_library("CAME"),
    "spam": _of_library("SPAM"),
    "soap": _of_library("SOAP"),
    "prodigy": _of_library("Prodigy", "Prodigy"),
    "adahessian": Named("lightning_grad.callbacks.optimizers._second_order.AdaHessian", "Hessian"),
    "sophia": Named("lightning_grad.callbacks.optimizers._second_order.Sophia"),
    "schedulefree-adamw": Named("schedulefree.AdamWScheduleFree", extra="optimizers", averages=True, elementwise=True),
}

_SCALES: Mapping[str, str] = {
    **{named.class_name.lower(): named.scale for named in NAMES.values()},
    **dict.fromkeys(("nadam", "radam", "adamax"), "Adam"),
    **dict.fromkeys(("asgd", "sgdw"), "SGD"),
}
_VARIANT = re.compile("^(paged|schedulefree)|(8bit|4bit|32bit|fp8|schedulefree)$")
_NEWER: Mapping[str, str] = {"muon": "2.9"}  # versions of torch that brought a class


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
'adafactor'? Short names are adamw, adam, sgd, adafactor, muon, lion, adabelief, adamp, sgdp, diffgrad, came, spam, \
soap, prodigy, adahessian, sophia, schedulefree-adamw.
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
        command = f'Run pip install "lightning-grad[{named.extra}]"' if named else ""
        raise ModuleNotFoundError(
            f"OptimizerSwap(optimizer={name!r}) needs {error.name}, which is not installed. "
            f"{command or f'Install {package}, or correct the path'}.",
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
