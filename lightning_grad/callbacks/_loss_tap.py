"""Reading, or reweighting, the loss of every sample in the training steps of a module.

Several techniques may read the losses of one module; one :class:`~lightning_grad.functional.LossCapture` a step serves
them all. At most one may reweight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch.utils._pytree as pytree
from torch import Tensor

from lightning_grad.callbacks._look import SCORE_FN, only_loss
from lightning_grad.callbacks._quiet import is_quiet
from lightning_grad.functional import LossCall, LossCapture
from lightning_grad.functional.loss_capture import IndivisibleError
from lightning_grad.utilities.dispatch import wrap_method

_INNERMOST = -100
_TAPS: WeakKeyDictionary[Any, _LossTap] = WeakKeyDictionary()


def read_losses(
    pl_module: pl.LightningModule,
    reader: Callable[[LossCall], None],
    which: int | None = None,
    samples: Callable[[], int] | None = None,
    way_out: str = SCORE_FN,
    needed_by: str = "A reader of losses",
) -> Any:
    """Have ``reader`` called with the loss of every training step, after it.

    Args:
        pl_module: The module.
        reader: Gets the call of the loss.
        which: Which loss of the step, if it has several.
        samples: Tells the number of samples of the batch. Default: the length of its tensors.
        way_out: What to do about a loss that cannot be seen, as a clause that begins with a verb.
        needed_by: Who asks, for errors.

    Returns:
        Callable: Takes the reader away.
    """
    tap = _tap_of(pl_module)
    tap.samples = samples or tap.samples
    entry = (reader, which, way_out, needed_by)
    tap.readers.append(entry)
    return lambda: tap.remove(entry)


def reweight_losses(
    pl_module: pl.LightningModule,
    reweight: Callable[[LossCall], Tensor | None],
    needed_by: str,
    which: int | None = None,
    samples: Callable[[], int] | None = None,
    way_out: str = SCORE_FN,
) -> Any:
    """Have the samples of every training step weighted, before its backward.

    Args:
        pl_module: The module.
        reweight: Gets the call of the loss, and returns a weight for each sample, or ``None`` to leave them alone.
        needed_by: Who asks, for errors.
        which: Which loss of the step, if it has several.
        samples: Tells the number of samples of the batch. Default: the length of its tensors.
        way_out: What to do about a loss that cannot be seen, as a clause that begins with a verb.

    Returns:
        Callable: Takes the weighting away.

    Raises:
        ValueError: If the module's samples are weighted already.
    """
    tap = _tap_of(pl_module)
    if tap.reweight is not None:
        raise ValueError(
            f"{tap.reweighted_by} and {needed_by} would both weight the samples of a batch. Keep one of them in the list of "
            "callbacks."
        )
    tap.reweight, tap.reweighted_by, tap.which, tap.way_out = reweight, needed_by, which, way_out
    tap.samples = samples or tap.samples
    return lambda: tap.remove(None)


def _tap_of(pl_module: pl.LightningModule) -> _LossTap:
    if pl_module not in _TAPS:
        _TAPS[pl_module] = _LossTap(pl_module)
    return _TAPS[pl_module]


class _LossTap:
    """The capture around one module's ``training_step``, there as long as somebody wants it."""

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self.readers: list[tuple[Callable[[LossCall], None], int | None, str, str]] = []
        self.reweight: Callable[[LossCall], Tensor | None] | None = None
        self.reweighted_by = ""
        self.which: int | None = None
        self.way_out = SCORE_FN
        self.samples: Callable[[], int] | None = None
        self._seen = 0
        self._may_skip = pl_module.automatic_optimization

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs) if is_quiet(pl_module) else self._step(inner, *args, **kwargs)

        self._undo = wrap_method(pl_module, "training_step", around, priority=_INNERMOST)

    def remove(self, entry: Any) -> None:
        if entry is None:
            self.reweight = None
        else:
            self.readers = [other for other in self.readers if other is not entry]
        if self.reweight is None and not self.readers:
            self._undo()
            for module in [module for module, tap in _TAPS.items() if tap is self]:
                del _TAPS[module]

    def _step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._seen = 0
        batch = next(iter((*args, *kwargs.values())))
        samples = batch_size_of(batch) if self.samples is None else self.samples()
        if samples == 0:
            # None of the samples that are watched: another loader's batch, or a tuner that tries a few steps.
            return inner(*args, **kwargs)
        weights = None if self.reweight is None else self._weights
        try:
            with LossCapture(samples, weights, way_out=self.way_out) as capture:
                output = inner(*args, **kwargs)
        except IndivisibleError as error:
            raise ValueError(f"{self.reweighted_by} weights the loss of each sample. {error}") from None
        if output is None and self._may_skip:
            return None  # Lightning trains on no batch for which an automatic step returns nothing
        if self.reweight is not None:
            self._refuse_unweighted(capture)
        for reader, which, capture.way_out, needed_by in self.readers:
            reader(only_loss(capture, needed_by, which))
        return output

    def _refuse_unweighted(self, capture: LossCapture) -> None:
        # An unseen or ambiguous loss is an error, and not a step without weights.
        try:
            capture.only(self.which)
        except (RuntimeError, ValueError) as error:
            raise type(error)(
                f"{self.reweighted_by} weights the loss of each sample, so it must see one loss of torch.nn.functional in "
                f"training_step. {error}"
            ) from None

    def _weights(self, call: LossCall) -> Tensor | None:
        assert self.reweight is not None
        self._seen += 1
        is_meant = call.has_graph if self.which is None else self._seen - 1 == self.which
        return self.reweight(call) if is_meant else None


def batch_size_of(batch: Any) -> int | None:
    """Return the number of samples of a batch, if all its tensors agree on it.

    Example:
        >>> import torch
        >>> batch_size_of({"x": torch.zeros(4, 2), "y": torch.zeros(4)}), batch_size_of([torch.zeros(4), torch.zeros(3)])
        (4, None)
    """
    sizes = {len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    return sizes.pop() if len(sizes) == 1 else None
