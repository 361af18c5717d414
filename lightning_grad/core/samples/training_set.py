"""The training set of a fit: which samples each batch holds, and epochs that shrink and grow in mid-fit.

A :class:`TrainingSet` puts a :class:`~lightning_grad.data.PrunableBatchSampler` into the training loader at the one place
where it is complete and nothing has been drawn from it yet, ``strategy.process_dataloader``; keeps the Trainer's own
counts right when the epoch's length changes; and takes everything back when the fit ends.
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

    Make it in ``setup`` and call :meth:`begin` in ``on_fit_start``, :meth:`keep` in ``on_train_epoch_start``, and
    :meth:`draw` once in ``on_train_batch_start``.

    Args:
        trainer: The trainer, before it has loaded its training data.
        needed_by: Who asks, for errors.
        undo: Where the steps back go.
        loader_key: Which of several training loaders: its key, its position, or a path of them joined by dots.
        remembers: Whether something is remembered of each sample, so that other data must not come in its place.

    Raises:
        ValueError: If another technique already chooses the samples of this fit; on loading, if there are several loaders
            and no key, or none of this key; if the data is loaded again and holds other samples, or others than a checkpoint
            knows.
        TypeError: On loading, if the data has no indices: an iterable data set, ``batch_size=None`` with a sampler that yields
            no batches, ``in_order=False``, an object that is no DataLoader, a sampler of several ranks that is not known, or
            one that yields keys that are no integers.
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
        self._next_batch: int | None = None  # not known when an epoch goes on in its middle
        self._drawing = RecordedBatches(iter(()))
        self._attach()

    def _attach(self) -> None:
        loop = self._trainer.fit_loop
        other = loop.__dict__.get(_OWNER)
        if other is not None:
            raise ValueError(
                f"{other} and {self._needed_by} would both choose the training samples. Keep one of them in the list of "
                "callbacks."
            )
        loop.__dict__[_OWNER] = self._needed_by
        self._undo.push(lambda: loop.__dict__.pop(_OWNER, None))
        self._undo.push(self._give_back)
        self._undo.push(wrap_method(loop._data_source, "dataloader", self._expect))
        self._undo.push(wrap_method(self._trainer.strategy, "process_dataloader", self._receive))
        self._undo.push(wrap_method(loop, "setup_data", self._around_loading))

    @property
    def loader(self) -> DataLoader[Any]:
        """The training loader, once it is loaded."""
        assert self._loader is not None
        return self._loader

    @property
    def is_loaded(self) -> bool:
        """Whether the training loader is made."""
        return self._loader is not None

    @property
    def sampler(self) -> PrunableBatchSampler:
        """The batch sampler in it."""
        assert self._sampler is not None
        return self._sampler

    def items(self, dataset: Any) -> Any:
        """Return a data set whose samples can be read one by one, if the loader reads lists of them at once."""
        return training_loaders.items_of(self.loader, dataset)

    @property
    def is_whole_batch(self) -> bool:
        """Whether a batch of the loader is all that ``training_step`` gets, and not one of several loaders' batches."""
        return self._keys == [""]

    # The data is loaded.

    def _expect(self, inner: Callable[[], Any]) -> Any:
        # An error in here would leave torch's DataLoader patched by Lightning for the rest of the process.
        loaders = inner()
        keys = list(training_loaders.keys_of(loaders.iterables if isinstance(loaders, CombinedLoader) else loaders))
        self._waiting, self._keys = keys, list(keys)
        return loaders

    def _receive(self, inner: Callable[[Any], Any], loader: Any) -> Any:
        if not self._waiting:
            return inner(loader)
        training_loaders.refuse_key(self._loader_key, self._keys, "training", self._needed_by)
        if self._loader_key not in (None, self._waiting.pop(0)):
            return inner(loader)
        self._install(loader)
        processed = inner(loader)
        if processed is not loader:
            raise TypeError(
                f"{self._needed_by} must see the training loader's own batches, and {type(self._trainer.strategy).__name__} "
                f"wraps it in a {type(processed).__name__}. Train with strategy='ddp' or on one device."
            )
        return processed

    def _install(self, loader: Any) -> None:
        training_loaders.refuse_without_indices(loader, self._needed_by)
        original = getattr(loader, training_loaders.slot_of(loader))
        if isinstance(original, PrunableBatchSampler):
            original = original.original
        sampler = PrunableBatchSampler(original, len(loader.dataset), self._needed_by)
        if self._trainer.world_size > 1 and not sampler.shares_are_known:
            raise TypeError(
                f"{self._needed_by} cannot tell which samples each of {self._trainer.world_size} ranks draws from "
                f"{type(original).__name__}({type(sampler.sampler).__name__}). Use a sampler of torch.utils.data, or one "
                "process."
            )
        if self._sampler is None:
            known = [getattr(self._trainer, name, None) for name in ("lightning_module", "datamodule")]
            refuse_other_keys(original, loader.dataset, self._needed_by, [self._trainer, *known])
        self._refuse_other_length(sampler.total)
        self._compare_data(loader)
        if not sampler.shares_are_known and sampler.full_samples < sampler.total:
            rank_zero_warn(
                f"{type(sampler.sampler or original).__name__} draws {sampler.full_samples} of {sampler.total} samples an "
                f"epoch, and {self._needed_by} cannot know which: it chooses among all. If the others are never drawn, train "
                "on a torch.utils.data.Subset instead."
            )
        self._give_back()
        training_loaders.replace_sampler(loader, sampler)
        self._loader, self._sampler = loader, sampler
        if self._begun:
            self._tell_sampler()

    def _refuse_other_length(self, total: int) -> None:
        if self._begun and self._sampler is not None and self._sampler.total != total:
            raise ValueError(
                f"{self._needed_by} knows samples by their index, and the training set had {self._sampler.total} of them and "
                f"now, reloaded, has {total}. Keep the data set the same for the whole fit."
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
            self._known = mark_of(items)  # now, as the same memory may hold other samples by then

    @property
    def mark(self) -> Fingerprint:
        """The fingerprint of the data set."""
        if self._known is None:
            self._known = mark_of(self.items(self.loader.dataset))
        return self._known

    def expect(self, known: Fingerprint) -> None:
        """Refuse another data set than the one that a checkpoint knows.

        Raises:
            ValueError: Now or on loading, if they differ.
        """
        self._known = known
        if self._loader is not None:  # some strategies restore callbacks after the data was loaded
            self._known = refuse_other_data(known, self.items(self.loader.dataset), self._needed_by, reloaded=False)

    def _give_back(self) -> None:
        if self._loader is not None:
            training_loaders.replace_sampler(self._loader, self.sampler.original)

    def _around_loading(self, inner: Callable[[], None]) -> None:
        # A pruned epoch may be shorter than a val_check_interval that was right for the whole one, which Lightning refuses
        # when it loads the data; the update then makes it fit.
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
        """Make pruning count from here on, with the samples that are kept at the start or that a checkpoint has restored.

        Before, the loader has its full length: schedules made in ``configure_optimizers`` are made for the whole run, also
        when it is resumed.
        """
        self._begun = True
        self.keep(kept, fixed_steps)
        self._next_batch = None

    def keep(self, kept: Tensor | None, fixed_steps: bool = False) -> None:
        """Train on these samples from the next epoch's first batch on.

        Args:
            kept: Indices, or ``None`` for all.
            fixed_steps: Whether an epoch has as many batches as the whole data set would give, so that the kept samples are
                passed through more than once.
        """
        self._next_batch, self._drawing = 0, RecordedBatches(iter(()))
        changed = not _same(kept, self._kept) or fixed_steps != self._fixed_steps
        self._kept, self._fixed_steps = kept, fixed_steps
        if self._sampler is None or not changed:
            return
        self._tell_sampler()
        self._length.update()
        if not self._trainer_draws_anew():
            iter(self._trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]

    def _tell_sampler(self) -> None:
        sampler = self.sampler
        last = -1 if self._kept is None else int(self._kept.max())
        if last >= sampler.total:
            raise ValueError(
                f"{self._needed_by} would train on the sample {last}, and the training set has {sampler.total} of them. "
                f"{resume_advice(self._needed_by)}"
            )
        sampler.keep(self._kept, sampler.full_samples if self._fixed_steps else None)
        if self._kept is not None and not len(sampler):
            raise ValueError(
                f"{self._needed_by} keeps {len(self._kept)} samples, which do not fill one batch of {sampler.batch_size}, "
                "and drop_last=True drops it. Prune less, or use smaller batches."
            )

    def _trainer_draws_anew(self) -> bool:
        loop = self._trainer.fit_loop
        starts = self._trainer.current_epoch > 0 and not loop.is_resuming and not loop.epoch_loop.restarting
        return loop._data_fetcher is None or starts

    @property
    def has_idle_workers(self) -> bool:
        """Whether the loader's workers wait for an epoch that begins, and that nothing has been drawn of yet."""
        progress: Any = self._trainer.fit_loop.epoch_progress.current
        begins = progress.ready > progress.started and self._trainer.fit_loop._data_fetcher is not None
        return begins and self._trainer_draws_anew() and can_borrow(self.loader)

    @property
    def resumes_behind_last_batch(self) -> bool:
        """Whether the fit goes on from a checkpoint that was written after an epoch's last batch, before its end."""
        trainer, loop = self._trainer, self._trainer.fit_loop
        behind = loop.epoch_loop.restarted_on_train_batch_end and loop.epoch_loop.batch_progress.is_last_batch
        goes_on = trainer.max_epochs in (None, -1) or trainer.current_epoch < trainer.max_epochs
        return bool(goes_on and loop.restarted_mid_epoch and behind)

    def leave_epoch(self) -> None:
        """Show Lightning that the epoch from which it resumes is done, also when the one that follows is longer."""
        progress = self._trainer.fit_loop.epoch_loop.batch_progress.current
        progress.completed = max(progress.completed, int(self.batches))

    @property
    def batches(self) -> float:
        """Batches of an epoch as it is now."""
        return float(self._trainer.fit_loop.max_batches)

    @property
    def full_batches(self) -> float:
        """Batches of an epoch of the whole training set."""
        return self._length.batches_if(
            lambda loader: self.sampler.full_length if loader is self._loader else training_loaders.length_of(loader)
        )

    @property
    def full_samples(self) -> float:
        """Samples of an epoch of the whole training set, over all ranks."""
        sampler, loaders = self.sampler, self._trainer.fit_loop._combined_loader
        passes, rest = divmod(self.full_batches, sampler.full_length)
        if loaders is not None and loaders._mode == "max_size":
            passes, rest = min((passes, rest), (1, 0))
        whole = min(sampler.full_samples, sampler.full_length * sampler.batch_size)
        return (passes * whole + rest * sampler.batch_size) * self._trainer.world_size

    @property
    def full_samples_until_now(self) -> float:
        """Samples that the fit would have seen by now without pruning, over all ranks; of an epoch cut short its part."""
        trainer = self._trainer
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        in_batches = ready * self.full_batches / max(1.0, self.batches) * self.sampler.batch_size * trainer.world_size
        return self.full_samples * max(0, trainer.current_epoch - 1) + min(self.full_samples, in_batches)

    # A batch is trained on.

    def draw(self, batch_idx: int) -> list[int]:
        """Return the indices of the samples of the batch that begins.

        Args:
            batch_idx: Number of the batch in the epoch, as the hook gets it.

        Raises:
            RuntimeError: If the loader has made the batch without its batch sampler.
        """
        if self._is_exhausted(batch_idx):
            return []
        source = self._source()
        for _ in range(min(self._passed_over(batch_idx), len(source.drawn) - 1)):
            source.drawn.popleft()
        self._next_batch = batch_idx + 1
        if not source.drawn:
            raise RuntimeError(
                f"{self._needed_by} does not know which samples are in batch {batch_idx}: {type(self.loader).__name__} has "
                "made it without its batch sampler. Let it draw its batches from self.batch_sampler, or use a plain "
                "torch.utils.data.DataLoader."
            )
        return list(source.drawn.popleft())

    def _is_exhausted(self, batch_idx: int) -> bool:
        """Return whether only other loaders still have batches, in the one mode in which they continue without this one."""
        loaders = self._trainer.fit_loop._combined_loader
        return loaders is not None and loaders._mode == "max_size" and batch_idx >= len(self.sampler)

    def _passed_over(self, batch_idx: int) -> int:
        """Return how many batches have been drawn before this one that no hook was called for.

        They are those that a loader collates to ``None``, and those that a loader skips which continues in mid-epoch.
        """
        if self._next_batch is None:
            self._next_batch = 0 if hasattr(self.loader, "load_state_dict") else batch_idx
        return batch_idx - self._next_batch

    def _source(self) -> RecordedBatches:
        # What other code draws in mid-epoch has nothing to do with the fit. When a loader is begun again in mid-epoch, its
        # last batches may still be under way.
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
