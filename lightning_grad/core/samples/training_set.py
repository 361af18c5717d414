"""The training set of a fit: the samples of each batch, and epochs that shrink and grow during the fit.

A :class:`TrainingSet` puts a :class:`~lightning_grad.data.PrunableBatchSampler` into the training
loader. It does so in ``strategy.process_dataloader``, the only place where the loader is complete
and nothing has been drawn from it. It keeps the Trainer's counts right when the length of the epoch
changes, and restores everything when the fit ends.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_grad.core.dispatch import wrap_method
from lightning_grad.core.samples import training_loaders
from lightning_grad.core.undo import UndoList
from lightning_grad.data import PrunableBatchSampler
from lightning_grad.data.borrowed_workers import can_borrow
from lightning_grad.data.fingerprints import Fingerprint, mark_of, refuse_other_data, resume_advice
from lightning_grad.data.prunable_sampler import RecordedBatches
from lightning_grad.data.sampler_keys import refuse_other_keys

_OWNER = "_lightning_grad_training_set"


class TrainingSet:
    """The samples that a fit trains on.

    Make it in ``setup`` and call :meth:`begin` in ``on_fit_start``, :meth:`keep` in
    ``on_train_epoch_start``, and :meth:`draw` once in ``on_train_batch_start``.

    Args:
        trainer: The trainer, before it has loaded its training data.
        needed_by: Name of the technique, for errors.
        undo: List that receives the undo steps.
        loader_key: Loader to use if there are several: its key or position, or a path of these
            joined by dots.
        remembers: Whether the technique stores values for each sample, which requires the data to
            stay the same.

    Raises:
        ValueError: If another technique already chooses the samples of this fit. On loading, if
            there are several loaders and no key, or no loader has the key, or the data differs from
            the data loaded before or from a checkpoint's.
        TypeError: On loading, if samples cannot be identified: an iterable data set,
            ``batch_size=None`` with a sampler that yields no batches, ``in_order=False``, an object
            that is not a DataLoader, an unknown sampler with several ranks, or a sampler that
            yields keys other than integers.
    """

    def __init__(
        self, trainer: pl.Trainer, needed_by: str, undo: UndoList, loader_key: str | None = None, remembers: bool = True
    ) -> None:
        self._trainer, self._needed_by, self._undo = trainer, needed_by, undo
        self._loader_key, self._remembers = loader_key, remembers
        self._known: Fingerprint | None = None
        self._waiting: list[str] = []
        self._keys = [""]
        self._length = training_loaders.EpochLength(trainer)
        self._kept: Tensor | None = None
        self._fixed_steps = False
        self._begun = False
        self._loader: DataLoader[Any] | None = None
        self._sampler: PrunableBatchSampler | None = None
        self._next_batch: int | None = None  # None if unknown, because the fit resumes within an epoch
        self._drawing = RecordedBatches(iter(()))
        self._attach()

    def _attach(self) -> None:
        loop = self._trainer.fit_loop
        other = loop.__dict__.get(_OWNER)
        if other is not None:
            raise ValueError(
                f"{other} and {self._needed_by} would both choose the training samples. Keep one of them in the list "
                "of callbacks."
            )
        loop.__dict__[_OWNER] = self._needed_by
        self._undo.push(lambda: loop.__dict__.pop(_OWNER, None))
        self._undo.push(self._give_back)
        self._undo.push(wrap_method(loop._data_source, "dataloader", self._expect))
        self._undo.push(wrap_method(self._trainer.strategy, "process_dataloader", self._receive))
        self._undo.push(wrap_method(loop, "setup_data", self._around_loading))

    @property
    def loader(self) -> DataLoader[Any]:
        """The training loader; available once it is loaded."""
        assert self._loader is not None
        return self._loader

    @property
    def is_loaded(self) -> bool:
        """Whether the training loader is loaded."""
        return self._loader is not None

    @property
    def sampler(self) -> PrunableBatchSampler:
        """The batch sampler of the training loader."""
        assert self._sampler is not None
        return self._sampler

    def items(self, dataset: Any) -> Any:
        """Return a data set whose samples can be read one by one, even if the loader reads lists of them."""
        return training_loaders.items_of(self.loader, dataset)

    @property
    def is_whole_batch(self) -> bool:
        """Whether ``training_step`` gets the batch of this loader alone, not one of several loaders' batches."""
        return self._keys == [""]

    # The data is loaded.

    def _expect(self, inner: Callable[[], Any]) -> Any:
        # Raise no error here: Lightning would leave torch's DataLoader patched for the rest of the
        # process.
        loaders = inner()
        keys = list(training_loaders.keys_of(loaders.iterables if isinstance(loaders, CombinedLoader) else loaders))
        self._waiting, self._keys = keys, list(keys)
        return loaders

    def _receive(self, inner: Callable[[Any], Any], loader: Any) -> Any:
        """Replace the sampler of the chosen loader. Lightning passes the loaders here in the order of their keys."""
        if not self._waiting:
            return inner(loader)
        training_loaders.refuse_key(self._loader_key, self._keys, "training", self._needed_by)
        if self._loader_key not in (None, self._waiting.pop(0)):
            return inner(loader)
        self._install(loader)
        processed = inner(loader)
        if processed is not loader:
            raise TypeError(
                f"{self._needed_by} must see the training loader's own batches, but "
                f"{type(self._trainer.strategy).__name__} wraps the loader in {type(processed).__name__}. Train with "
                "strategy='ddp' or on one device."
            )
        return processed

    def _install(self, loader: Any) -> None:
        """Check a loader and its data, and put the prunable sampler into it, also after a reload."""
        training_loaders.refuse_without_indices(loader, self._needed_by)
        original = getattr(loader, training_loaders.slot_of(loader))
        if isinstance(original, PrunableBatchSampler):
            original = original.original
        sampler = PrunableBatchSampler(original, len(loader.dataset), self._needed_by)
        if self._trainer.world_size > 1 and not sampler.shares_are_known:
            raise TypeError(
                f"{self._needed_by} does not know which samples each of the {self._trainer.world_size} ranks draws "
                f"from {type(original).__name__}({type(sampler.sampler).__name__}). Use shuffle=True "
                "or False, a DistributedSampler, or one process."
            )
        if self._sampler is None:
            known = [getattr(self._trainer, name, None) for name in ("lightning_module", "datamodule")]
            refuse_other_keys(original, loader.dataset, self._needed_by, [self._trainer, *known])
        self._refuse_other_length(sampler.total)
        self._compare_data(loader)
        if not sampler.shares_are_known and sampler.full_samples < sampler.total:
            rank_zero_warn(
                f"{type(sampler.sampler or original).__name__} draws {sampler.full_samples} of {sampler.total} "
                f"samples per epoch. {self._needed_by} does not know which, and chooses among all samples. If the "
                "others are never drawn, train on a torch.utils.data.Subset instead."
            )
        self._give_back()
        training_loaders.replace_sampler(loader, sampler)
        self._loader, self._sampler = loader, sampler
        if self._begun:
            self._update_sampler()

    def _refuse_other_length(self, total: int) -> None:
        if self._begun and self._sampler is not None and self._sampler.total != total:
            raise ValueError(
                f"{self._needed_by} identifies samples by index, but the training set had {self._sampler.total} "
                f"samples and has {total} after reloading. Keep the data set the same during the whole fit."
            )

    def _compare_data(self, loader: DataLoader[Any]) -> None:
        if not self._remembers or (self._loader is not None and loader.dataset is self._loader.dataset):
            return
        items = training_loaders.items_of(loader, loader.dataset)
        if self._loader is not None:
            refuse_other_data(self.mark, items, self._needed_by, reloaded=True)
        elif self._known is not None:
            self._known = refuse_other_data(self._known, items, self._needed_by, reloaded=False)
        elif getattr(self._trainer, "reload_dataloaders_every_n_epochs", 0):
            self._known = mark_of(items)  # now, because the data set object may hold other samples after a reload

    @property
    def mark(self) -> Fingerprint:
        """Fingerprint of the data set."""
        if self._known is None:
            self._known = mark_of(self.items(self.loader.dataset))
        return self._known

    def expect(self, known: Fingerprint) -> None:
        """Require the data set of a checkpoint.

        Raises:
            ValueError: Now or on loading, if the data set differs.
        """
        self._known = known
        if self._loader is not None:  # some strategies restore callbacks after the data was loaded
            self._known = refuse_other_data(known, self.items(self.loader.dataset), self._needed_by, reloaded=False)

    def _give_back(self) -> None:
        if self._loader is not None:
            training_loaders.replace_sampler(self._loader, self.sampler.original)

    def _around_loading(self, inner: Callable[[], None]) -> None:
        # Lightning raises when it loads the data if val_check_interval exceeds the number of
        # batches. A pruned epoch may be shorter than an interval that suits whole epochs. So the
        # check is avoided here, and update() adapts the interval.
        trainer = self._trainer
        interval, every = trainer.val_check_interval, trainer.check_val_every_n_epoch
        if self._begun and self._kept is not None and isinstance(interval, int):
            trainer.check_val_every_n_epoch = None
        try:
            inner()
        finally:
            trainer.check_val_every_n_epoch = every
        if self._begun and self._sampler is not None:
            self._length.update()

    # The training set changes.

    def begin(self, kept: Tensor | None, fixed_steps: bool = False) -> None:
        """Start pruning, with the samples that are kept at the start or restored from a checkpoint.

        Until then the loader has its full length, so schedules made in ``configure_optimizers`` are
        made for the whole run, even when it resumes.
        """
        self._begun = True
        self.keep(kept, fixed_steps)
        self._next_batch = None

    def keep(self, kept: Tensor | None, fixed_steps: bool = False) -> None:
        """Train on these samples from the first batch of the next epoch on.

        Args:
            kept: Indices, or ``None`` for all.
            fixed_steps: Whether an epoch keeps the number of batches of the whole data set and goes
                through the kept samples several times.
        """
        self._next_batch, self._drawing = 0, RecordedBatches(iter(()))
        changed = not _same(kept, self._kept) or fixed_steps != self._fixed_steps
        self._kept, self._fixed_steps = kept, fixed_steps
        if self._sampler is None or not changed:
            return
        self._update_sampler()
        self._length.update()
        if not self._restarts_loader():
            iter(self._trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]

    def _update_sampler(self) -> None:
        """Pass the kept samples to the sampler, and raise if they do not fill a batch."""
        sampler = self.sampler
        last = -1 if self._kept is None else int(self._kept.max())
        if last >= sampler.total:
            raise ValueError(
                f"{self._needed_by} would train on sample {last}, but the training set has {sampler.total} samples. "
                f"{resume_advice(self._needed_by)}"
            )
        sampler.keep(self._kept, sampler.full_samples if self._fixed_steps else None)
        if self._kept is not None and not len(sampler):
            raise ValueError(
                f"{self._needed_by} keeps {len(self._kept)} samples, which do not fill one batch of "
                f"{sampler.batch_size}, and drop_last=True drops incomplete batches. Prune less, or use smaller "
                "batches."
            )

    def _restarts_loader(self) -> bool:
        """Return True if Lightning restarts the loader for the epoch that begins; when resuming, it does not."""
        loop = self._trainer.fit_loop
        starts = self._trainer.current_epoch > 0 and not loop.is_resuming and not loop.epoch_loop.restarting
        return loop._data_fetcher is None or starts

    @property
    def has_idle_workers(self) -> bool:
        """Whether an epoch begins, nothing has been drawn from it yet, and the loader's workers are idle."""
        progress: Any = self._trainer.fit_loop.epoch_progress.current
        begins = progress.ready > progress.started and self._trainer.fit_loop._data_fetcher is not None
        return begins and self._restarts_loader() and can_borrow(self.loader)

    @property
    def resumes_behind_last_batch(self) -> bool:
        """Whether the fit resumes from a checkpoint between the last batch and the end of an epoch."""
        trainer, loop = self._trainer, self._trainer.fit_loop
        behind = loop.epoch_loop.restarted_on_train_batch_end and loop.epoch_loop.batch_progress.is_last_batch
        continues = trainer.max_epochs in (None, -1) or trainer.current_epoch < trainer.max_epochs
        return bool(continues and loop.restarted_mid_epoch and behind)

    def leave_epoch(self) -> None:
        """Mark the epoch from which the fit resumes as done for Lightning, even if the next one is longer."""
        progress = self._trainer.fit_loop.epoch_loop.batch_progress.current
        progress.completed = max(progress.completed, int(self.batches))

    @property
    def batches(self) -> float:
        """Number of batches in the current epoch."""
        return float(self._trainer.fit_loop.max_batches)

    @property
    def full_batches(self) -> float:
        """Number of batches in an epoch of the whole training set."""
        return self._length.batches_if(
            lambda loader: self.sampler.full_length if loader is self._loader else training_loaders.length_of(loader)
        )

    @property
    def full_samples(self) -> float:
        """Number of samples in an epoch of the whole training set, over all ranks."""
        sampler, loaders = self.sampler, self._trainer.fit_loop._combined_loader
        passes, rest = divmod(self.full_batches, sampler.full_length)
        if loaders is not None and loaders._mode == "max_size":
            passes, rest = min((passes, rest), (1, 0))
        whole = min(sampler.full_samples, sampler.full_length * sampler.batch_size)
        return (passes * whole + rest * sampler.batch_size) * self._trainer.world_size

    @property
    def full_samples_until_now(self) -> float:
        """Number of samples that the fit would have seen so far without pruning, over all ranks."""
        trainer = self._trainer
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        in_batches = ready * self.full_batches / max(1.0, self.batches) * self.sampler.batch_size * trainer.world_size
        return self.full_samples * max(0, trainer.current_epoch - 1) + min(self.full_samples, in_batches)

    # A batch is trained on.

    def draw(self, batch_idx: int) -> list[int]:
        """Return the indices of the samples in the batch that begins.

        Args:
            batch_idx: Index of the batch in the epoch, as the hook gets it.

        Raises:
            RuntimeError: If the loader made the batch without its batch sampler.
        """
        if self._is_exhausted(batch_idx):
            return []
        source = self._source()
        for _ in range(min(self._num_skipped(batch_idx), len(source.drawn) - 1)):
            source.drawn.popleft()
        self._next_batch = batch_idx + 1
        if not source.drawn:
            raise RuntimeError(
                f"{self._needed_by} does not know which samples are in batch {batch_idx}, because "
                f"{type(self.loader).__name__} created it without its batch sampler. Make it draw batches from "
                "self.batch_sampler, or use a plain torch.utils.data.DataLoader."
            )
        return list(source.drawn.popleft())

    def _is_exhausted(self, batch_idx: int) -> bool:
        """Return True if only other loaders still have batches, which happens in the mode "max_size"."""
        loaders = self._trainer.fit_loop._combined_loader
        return loaders is not None and loaders._mode == "max_size" and batch_idx >= len(self.sampler)

    def _num_skipped(self, batch_idx: int) -> int:
        """Return how many batches were drawn before this one for which Lightning called no hook.

        These are batches that collate to ``None``, and batches that a loader skips when it resumes
        within an epoch.
        """
        if self._next_batch is None:
            self._next_batch = 0 if hasattr(self.loader, "load_state_dict") else batch_idx
        return batch_idx - self._next_batch

    def _source(self) -> RecordedBatches:
        # Other code may draw from the loader during an epoch, so the batches come from the iterator
        # of the fit. If the loader is restarted within an epoch, batches drawn earlier may still be
        # pending: they come first.
        if not self._drawing.drawn:
            self._drawing = self._source_now()
        return self._drawing

    def _source_now(self) -> RecordedBatches:
        loaders = self._trainer.fit_loop._combined_loader
        iterator = None if loaders is None else loaders._iterator
        known = [] if loaders is None else loaders.flattened
        for loader, live in zip(known, getattr(iterator, "iterators", None) or [], strict=False):
            drawing = getattr(live, "_sampler_iter", None)
            if loader is self._loader and isinstance(drawing, RecordedBatches):
                return drawing
        return self.sampler.latest


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and bool((one == other).all())
