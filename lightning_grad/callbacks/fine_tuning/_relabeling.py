"""Finds the labels in the batches of a module, and replaces those of some samples."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_grad.core import Look
from lightning_grad.core.losses.look import SkippedBatchError
from lightning_grad.data.random_streams import seed_streams
from lightning_grad.functional import InseparableLossError, LossCall
from lightning_grad.functional.fine_tuning.saliency import label_shifts, shifted_labels
from lightning_grad.functional.plain_tensors import dressed, plain_tensor
from lightning_grad.utilities.batch_copies import DEEPEST, children
from lightning_grad.utilities.batches import Path, input_at, text_of, with_input

Relabel = Callable[[Any, Tensor, torch.Generator], Any]
RELABEL = "set relabel= to a function (batch, forget, generator) -> batch with other targets where forget is True"
_BINARY = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
_SAME = 1e-4  # relative change of a loss that counts as none


class BatchFunction:
    """Relabels with the function of the user.

    Args:
        relabel: Function (batch, forget, generator) -> batch.
        seed: Seed of the generator, next to the samples of the batch.
    """

    def __init__(self, relabel: Relabel, seed: int) -> None:
        self._relabel, self._seed = relabel, seed

    def __call__(self, batch: Any, indices: list[int], forget: list[bool]) -> Any:
        """Return a batch with other targets for some of its samples."""
        seed = zlib.crc32(repr((self._seed, indices)).encode())  # so a resumed run draws the same numbers
        return self._relabel(batch, torch.tensor(forget), torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class FoundLabels:
    """What a batch and a step show of the labels.

    Args:
        path: Place of the labels in a batch.
        num_classes: Number of classes; ``None`` if the loss does not show it.
        is_target: Whether the loss compares them as they are in the batch.
    """

    path: Path
    num_classes: int | None
    is_target: bool = False


@dataclass
class Labels:
    """The labels in a batch: where they are, and the number of classes.

    Args:
        path: Place of the labels in a batch.
        num_classes: Number of classes.
        is_target: As in :class:`FoundLabels`.
        draws: Uniform number of each sample of the data set, (n,).
        display_name: Name of the technique, for errors.
    """

    path: Path
    num_classes: int
    is_target: bool
    draws: Tensor
    display_name: str

    def of(self, batch: Any, samples: int) -> Tensor:
        """Return the labels in a batch, (B,).

        Raises:
            RuntimeError: If there is not one for each sample.
        """
        labels = plain_tensor(input_at(batch, self.path))
        if labels.numel() != samples:
            raise RuntimeError(
                f"{self.display_name} needs one label for each of {samples} samples, but {text_of(self.path)} has the "
                f"shape {tuple(labels.shape)}. Make collate_fn keep one row for each sample, or {RELABEL}."
            )
        return labels.reshape(samples)

    def __call__(self, batch: Any, indices: list[int], forget: list[bool]) -> Any:
        """Return a batch with random other labels for some of its samples."""
        labels, place = self.of(batch, len(indices)), input_at(batch, self.path)
        others = shifted_labels(labels, self._shifts(indices, labels), self.num_classes)
        chosen = torch.where(torch.tensor(forget, device=labels.device), others, labels)
        return with_input(batch, self.path, dressed(chosen.reshape(place.shape), place))

    def own(self, labels: Tensor, indices: list[int], forget: Tensor) -> Tensor:
        """Return the samples' own labels from those that :meth:`__call__` wrote into a batch."""
        return torch.where(forget, shifted_labels(labels, -self._shifts(indices, labels), self.num_classes), labels)

    def _shifts(self, indices: list[int], labels: Tensor) -> Tensor:
        return label_shifts(self.draws[indices], self.num_classes).to(labels.device)


def find_labels(look_at: Callable[[Any], Look], batches: Iterable[tuple[Any, int]], display_name: str) -> FoundLabels:
    """Return where the labels are in a batch, and the number of classes if the loss shows it.

    The labels are the tensor that a loss call of ``torch.nn.functional`` compares with the outputs. If the loss is
    another one, they are the only tensor of classes whose entries decide the losses of their own samples.

    Args:
        look_at: Function (batch) -> look, in a quiet module.
        batches: Batches with several classes and the number of their samples; the first one that has a loss is used.
        display_name: Name of the technique, for errors.

    Raises:
        ValueError: If no tensor, or more than one, may hold the labels.
        InseparableLossError: If the loss is not a sum of one term for each sample.
    """
    for batch, samples in batches:
        if batch is not None:
            with suppress(SkippedBatchError):
                return _find(look_at, batch, samples, display_name)
    raise ValueError(
        f"{display_name} must find the labels in a batch, but no batch had a loss: each was None, or training_step returned "
        "None for it. Make collate_fn and training_step return something for some batches in eval mode."
    )


def _find(look_at: Callable[[Any], Look], batch: Any, samples: int, display_name: str) -> FoundLabels:
    candidates = [(path, value) for path, value in _tensors(batch) if _may_be_labels(value, samples)]
    call = _call(look_at(batch))
    classes = None if call is None else _classes(call)
    if call is not None and classes is not None:
        same = [path for path, value in candidates if torch.equal(_numbers(value), _numbers(call.target))]
        if len(same) == 1:
            return FoundLabels(same[0], classes, is_target=True)
    found = [path for path, value in candidates if _decides(look_at, batch, path, value)]
    if len(found) != 1:
        what = f"{' and '.join(map(text_of, found))} both change" if found else "no tensor of classes (B,) changes"
        raise ValueError(
            f"{display_name} gives the samples to forget other labels, but does not know which part of a batch holds "
            f"the labels: {what} the loss of each sample. {RELABEL[0].upper()}{RELABEL[1:]}."
        )
    return FoundLabels(found[0], classes)


def _tensors(batch: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(batch, Tensor):
        yield path, plain_tensor(batch)
        return
    for key, child in children(batch) if len(path) < DEEPEST else ():
        yield from _tensors(child, (*path, key))


def _may_be_labels(value: Tensor, samples: int) -> bool:
    fits = value.dim() > 0 and value.numel() == len(value) == samples and not value.is_complex()
    return fits and bool(not value.is_floating_point() or ((value == 0) | (value == 1)).all())


def _numbers(value: Tensor) -> Tensor:
    return value.detach().flatten().double().cpu()


def _call(look: Look) -> LossCall | None:
    seed_streams(0)
    try:
        return look.loss()
    except (RuntimeError, ValueError):  # the loss is not one call
        return None


def _classes(call: LossCall) -> int | None:
    """Return the number of classes that a loss call compares; ``None`` if it compares something else."""
    if call.name in _BINARY and call.input.numel() == call.samples:
        return 2
    scores = call.options.get("linear_weight")  # of linear_cross_entropy, whose input are features
    is_seen = call.has_class_indices and call.input.dim() > 1
    return len(scores) if scores is not None else call.input.shape[1] if is_seen else None


def _decides(look_at: Callable[[Any], Look], batch: Any, path: Path, value: Tensor) -> bool:
    """Return True if other entries of a tensor change the losses of their own samples, and no others."""
    rows = value.flatten()
    shift = max(range(1, len(rows)), key=lambda by: int((rows.roll(by) != rows).sum()), default=0)
    is_other = (rows.roll(shift) != rows).cpu()
    if not is_other.any():
        return False
    before = _losses(look_at(batch))
    after = _losses(look_at(with_input(batch, path, dressed(rows.roll(shift).reshape(value.shape), value))))
    size = max(before[before.isfinite()].abs().max().item(), 1e-8)
    changes = (after - before).abs() > _SAME * size
    return bool((changes & is_other).sum() * 2 >= is_other.sum()) and not bool((changes & ~is_other).any())


def _losses(look: Look) -> Tensor:
    seed_streams(0)
    try:
        return look.losses().losses.detach().double().cpu()
    except InseparableLossError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ValueError(str(error)) from error
