"""The reference projects on which callbacks are checked, and what a caller gives instead."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from lightning_grad.testing.project import Project, is_a
from lightning_grad.testing.reference import BATCH, BATCHES, VALIDATION_BATCHES, loaders, make_classifier, make_data

_SHORT = {"limit_train_batches": 6, "limit_val_batches": 3}


class _Named(Dataset[dict[str, Any]]):
    """The reference data as dictionaries."""

    def __init__(self, seed: int, batches: int) -> None:
        self.inputs, self.labels = make_data(seed, batches).tensors

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"inputs": self.inputs[index], "labels": self.labels[index], "name": f"sample {index}"}


def _dictionaries() -> Any:
    """Return a module whose batches and results of a step are dictionaries."""

    class WithDictionaries(type(make_classifier())):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step((batch["inputs"], batch["labels"]), batch_idx)
            return {"loss": loss, "size": len(batch["labels"])}

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step((batch["inputs"], batch["labels"]), batch_idx)

    return WithDictionaries(), DataLoader(_Named(0, BATCHES), BATCH), DataLoader(_Named(1, VALIDATION_BATCHES), BATCH)


def _of_pytorch_lightning() -> Any:
    base = importlib.import_module("pytorch_lightning").LightningModule
    return make_classifier(base), *loaders(resumable=True)


def _reference(make: Callable[[], Any], **rest: Any) -> Project:
    return Project(lambda: (make(), *loaders(resumable=True)), "the reference module", monitor="val_loss", **rest)


REFERENCE = _reference(
    make_classifier,
    variants={
        "dictionaries": Project(_dictionaries, "the reference module with dictionaries"),
        "manual_optimization": _reference(lambda: make_classifier(manual=True)),
        "no_second_moment": _reference(lambda: make_classifier(optimizer="sgd")),
        "pytorch_lightning": Project(_of_pytorch_lightning, "the reference module of pytorch_lightning"),
    },
)
"""A classifier of sequences with a custom module, a transformer layer, batch normalization, AdamW and a scheduler."""


def projects_of(modules: Any) -> list[Project]:
    """Return the projects of functions that build modules with their data, in a list or by name; of ``None`` the reference.

    A fit takes at most six training batches and three validation batches in each epoch.

    Raises:
        TypeError: If an entry is no function, or returns something else.
        ValueError: If there is no entry.
    """
    if modules is None:
        return [REFERENCE]
    if not isinstance(modules, Mapping | Sequence) or isinstance(modules, str):
        raise TypeError(
            f"modules must be a list of functions that build a module, or map names to them; got {_name(modules)}."
        )
    named = dict(modules) if isinstance(modules, Mapping) else _named(modules)
    if not named:
        raise ValueError(
            "modules is empty. Pass functions that build a module with its data, or None for the reference."
        )
    for name, function in named.items():
        if not callable(function) or is_a(function, "LightningModule"):
            raise TypeError(
                f"modules[{name!r}] must be a function that builds a module, not {type(function).__name__}."
            )
    return [Project(function, name, _SHORT) for name, function in named.items()]


def _named(functions: Sequence[Any]) -> dict[str, Any]:
    names = [_name(function) for function in functions]
    unique = [name if names.count(name) == 1 else f"{name} {index}" for index, name in enumerate(names)]
    return dict(zip(unique, functions, strict=True))


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
