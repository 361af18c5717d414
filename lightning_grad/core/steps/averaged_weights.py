"""Weights for inference that are an average of those that train, as in Schedule-Free and Lookahead.

An optimizer that averages has methods ``train()`` and ``eval()``, which replace the weights in
place. The second does not undo the first exactly, so the training weights are copied before
``eval()`` and copied back afterwards. A callback that averages uses an object with the same methods.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_grad.core.dispatch import WrapOrder, wrap_method
from lightning_grad.core.undo import UndoList
from lightning_grad.functional.plain_tensors import on_plain_tensors


@runtime_checkable
class Averaging(Protocol):
    """An optimizer that averages its weights, or an object that averages those of an optimizer."""

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        """The parameter groups of the optimizer."""

    def train(self) -> Any:
        """Replace the averaged weights by the training weights, up to rounding, or do nothing."""

    def eval(self) -> Any:
        """Replace the training weights by the averaged weights."""


def averages(optimizer: Optimizer) -> bool:
    """Return True if an optimizer has different weights for training and inference.

    Example:
        >>> averages(torch.optim.AdamW([torch.zeros(1)]))
        False
    """
    return isinstance(optimizer, Averaging)


class AveragedCopies:
    """Averages that a callback keeps next to the weights: an :class:`Averaging` for them.

    Args:
        pairs: Returns the weights and their averages, in the same order; nothing before there are any.

    Example:
        >>> weight, average = torch.zeros(1), torch.ones(1)
        >>> copies = AveragedCopies(lambda: ([weight], [average]))
        >>> copies.eval()
        >>> weight
        tensor([1.])
    """

    def __init__(self, pairs: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
        self._pairs = pairs

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        """The weights that have an average, in one group."""
        return [{"params": list(self._pairs()[0])}]

    def train(self) -> None:
        """Do nothing: :class:`AveragedWeights` copies the training weights back."""

    @torch.no_grad()
    @on_plain_tensors
    def eval(self) -> None:
        """Copy the averages into the weights."""
        weights, averages = self._pairs()
        if weights:
            torch._foreach_copy_(list(weights), list(averages))


class AveragedWeights:
    """Shows the averaged weights in validation, in checkpoints and after the fit.

    Everything that runs during a validation or while a checkpoint is saved sees the averaged
    weights. Training continues from the training weights, bit for bit; checkpoints hold them in
    :attr:`training_weights`, which the owner adds to its state.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        optimizers: The optimizers that average.
        is_resumed: Whether the module has training weights that :func:`wrap_loading` put into the
            checkpoint. In that case, the optimizers only have to change their mode.

    Attributes:
        has_started: Whether the optimizers have been put into training mode.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizers: Sequence[Averaging],
        is_resumed: bool,
    ) -> None:
        self._trainer, self._pl_module = trainer, pl_module
        self._optimizers = optimizers
        self._is_resumed = is_resumed
        self._kept: dict[Tensor, Tensor] | None = None  # the training weights while the module has the averaged ones
        self._has_started = False
        self._in_training = 0  # number of groups that were put into training mode

    def watch(self, undo: UndoList, undo_after_saving: UndoList) -> None:
        """Wrap validations, the saving of checkpoints, and the start and the end of the training.

        Call it in ``on_fit_start`` at the latest. Hooks of callbacks would not do, because a search for
        a learning rate trains without the callbacks.
        """
        loop = self._trainer.fit_loop
        undo.push(wrap_method(loop, "on_run_start", self._begin))
        undo.push(wrap_method(loop.epoch_loop.val_loop, "run", self._show))
        undo.push(wrap_method(loop, "on_run_end", self._end))
        undo_after_saving.push(wrap_method(self._trainer, "save_checkpoint", self._show))

    def _start(self) -> None:
        """Put the optimizers into training mode, when all states are restored."""
        if not self._has_started:
            self._has_started = True
            self._kept = self._copies() if self._is_resumed else None
            self._train()

    def finish(self) -> None:
        """Leave the averaged weights in the module."""
        self._start()
        if self._kept is None:
            if self._in_training < self._count_groups():  # a callback added some, which begin in the other mode
                self._kept = self._copies()
                self._train()
            self._kept = self._copies()
            for optimizer in self._optimizers:
                optimizer.eval()

    @property
    def is_training(self) -> bool:
        """Whether the module has the training weights, because training has started and has not ended."""
        return self._has_started and self._kept is None

    @property
    def training_weights(self) -> dict[str, Tensor]:
        """The training weights by name, on the CPU."""
        kept, trained = self._kept or {}, self._weights()
        named = self._pl_module.named_parameters(remove_duplicate=False)
        return {name: kept.get(weight, weight).detach().cpu().clone() for name, weight in named if weight in trained}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Let the module have the averaged weights inside the block."""
        is_outermost = self._kept is None
        self.finish()
        try:
            yield
        finally:
            if is_outermost:
                self._train()

    def _show(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.shown():
            return inner(*args, **kwargs)

    def _begin(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._kept is not None:  # a search for a learning rate trained before, and the weights were loaded again
            self._kept = self._copies()
            self._train()
        self._start()
        return inner(*args, **kwargs)

    def _end(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.finish()
        return inner(*args, **kwargs)

    def _weights(self) -> set[Tensor]:
        return {p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}

    def _copies(self) -> dict[Tensor, Tensor]:
        return {weight: weight.detach().clone() for weight in self._weights()}

    @torch.no_grad()
    def _train(self) -> None:
        """Copy the training weights back, after the optimizers computed them up to rounding."""
        for optimizer in self._optimizers:
            optimizer.train()
        for weight, kept in (self._kept or {}).items():
            weight.copy_(kept)
        self._kept = None
        self._in_training = self._count_groups()

    def _count_groups(self) -> int:
        return sum(len(optimizer.param_groups) for optimizer in self._optimizers)


def wrap_loading(pl_module: pl.LightningModule, weights_in: Callable[[Mapping[str, Any]], Any]) -> Callable[[], None]:
    """From now on, replace the averaged weights of every checkpoint by its training weights before the module loads it.

    Args:
        pl_module: Module that loads the checkpoint.
        weights_in: Returns the training weights in a checkpoint, by name, or ``None``.

    Returns:
        Callable: Undoes this.
    """

    def load(inner: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        inner(checkpoint)
        kept = weights_in(checkpoint) or {}
        weights = checkpoint.get("state_dict", {})  # some strategies have loaded them by now
        weights.update({name: kept[name] for name in kept.keys() & weights.keys()})

    # Outermost, because the views of a WeightCallback first restore the dense form of the averaged weights.
    return wrap_method(pl_module, "on_load_checkpoint", load, WrapOrder.LOOK)


def has_batch_statistics(module: nn.Module) -> bool:
    """Return True if a module collects statistics of activations, which belong to the training weights."""
    return any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules())
