"""Which samples of the data set each training batch holds, without choosing them."""

import operator
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, IterableDataset, Sampler

from lightning_grad.core.dispatch import WrapOrder, wrap_method
from lightning_grad.core.samples.training_loaders import replace_sampler, slot_of
from lightning_grad.core.undo import UndoList


class _Drawn(Iterator[Any]):
    """Iterator over batches of indices that notes them for its sampler. Workers draw ahead, but in the same order."""

    def __init__(self, batches: Iterator[Any], sampler: Any = None) -> None:
        self.batches, self.sampler = batches, sampler
        self.waiting: deque[Any] = deque()

    def __next__(self) -> Any:
        batch = next(self.batches)
        self.waiting.append(batch)
        return batch


class _NotingSampler(Sampler[Any]):
    """Yields what another sampler yields, and notes it; everything else is that of the other one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.latest = _Drawn(iter(()))

    def __iter__(self) -> Iterator[Any]:
        self.latest = _Drawn(iter(self.inner), self)
        return self.latest

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # a copy asks before it has one
            raise AttributeError(name)
        return getattr(self.inner, name)


class BatchIndices:
    """Notes the indices of the samples in each training batch of a fit, if the data has indices.

    It works next to techniques that choose samples. It needs one training loader that is a plain
    :class:`~torch.utils.data.DataLoader` in order; otherwise nothing is known, and nothing raises.

    Args:
        trainer: The trainer, in ``setup``.
        undo: List that receives the undo steps.
    """

    def __init__(self, trainer: pl.Trainer, undo: UndoList) -> None:
        self._trainer = trainer
        self._loader: DataLoader[Any] | None = None
        self._sampler: _NotingSampler | None = None
        self._drawing: _Drawn | None = None
        self._next_batch = 0
        self._loaded: list[Any] | None = None  # while the training data is loaded: the loaders so far
        undo.push(self._remove)
        undo.push(wrap_method(trainer.fit_loop, "setup_data", self._around_loading, order=WrapOrder.LOOK))
        # Outermost, so a technique that chooses samples has put its own sampler into the loader.
        undo.push(wrap_method(trainer.strategy, "process_dataloader", self._receive, order=WrapOrder.LOOK))

    def _around_loading(self, inner: Callable[[], None]) -> None:
        loop = self._trainer.fit_loop
        if loop._combined_loader is None or loop._should_reload_train_dl:
            self._remove()  # others must not see this sampler when they look at the loader
        self._loaded = []
        try:
            inner()
        finally:
            self._loaded = None

    def _receive(self, inner: Callable[[Any], Any], loader: Any) -> Any:
        """Put the noting sampler into the only training loader, before Lightning starts to iterate over it."""
        processed = inner(loader)
        if self._loaded is not None:
            self._loaded.append(processed)
            if len(self._loaded) == 1:
                self._install(processed)
            else:
                self._remove()
        return processed

    def _install(self, loader: Any) -> None:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return
        if getattr(loader, "in_order", True):
            self._loader = loader
            self._sampler = _NotingSampler(getattr(loader, slot_of(loader)))
            replace_sampler(loader, self._sampler)

    def _remove(self) -> None:
        """Take the noting sampler out of the loader, in which those of others may lie around it."""
        loader, own = self._loader, self._sampler
        self._loader = self._sampler = None
        if loader is None or own is None:
            return
        outer = getattr(loader, slot_of(loader))
        if outer is own:
            replace_sampler(loader, own.inner)
        while isinstance(outer, _NotingSampler) and outer is not own:
            if outer.inner is own:
                outer.inner = own.inner
            outer = outer.inner

    def of_batch(self, batch_idx: int) -> list[int]:
        """Return the indices in the batch that begins; empty if they are unknown. Call it once for each batch.

        Args:
            batch_idx: Index of the batch in the epoch, as the hook gets it.
        """
        if self._loader is None or self._sampler is None:
            return []
        drawing = self._drawn()
        if drawing is not self._drawing:
            resumes = self._drawing is None and self._trainer.fit_loop.restarted_mid_epoch
            draws_all_again = hasattr(self._loader, "load_state_dict")  # and skips what was trained on
            self._drawing, self._next_batch = drawing, batch_idx if resumes and not draws_all_again else 0
        waiting = drawing.waiting
        for _ in range(min(batch_idx - self._next_batch, len(waiting) - 1)):  # without a hook: they collate to None
            waiting.popleft()
        self._next_batch = batch_idx + 1
        return _as_indices(waiting.popleft()) if waiting else []

    def _drawn(self) -> _Drawn:
        """Return the iterator of the fit; other code may draw from the loader too."""
        assert self._sampler is not None
        loaders = self._trainer.fit_loop._combined_loader
        live = getattr(getattr(loaders, "_iterator", None), "iterators", None) or [None]
        drawn = getattr(live[0], "_sampler_iter", None)
        while isinstance(drawn, _Drawn) and drawn.sampler is not self._sampler:  # that of another technique
            drawn = drawn.batches
        return drawn if isinstance(drawn, _Drawn) else self._sampler.latest


def _as_indices(batch: Any) -> list[int]:
    found = batch.tolist() if hasattr(batch, "tolist") else batch
    try:
        return [operator.index(index) for index in (found if isinstance(found, (list, tuple)) else [found])]
    except TypeError:  # keys of another kind
        return []
