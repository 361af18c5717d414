"""The base of callbacks that inspect the module at regular intervals and change nothing.

``probe_samples.py`` reads the samples, ``probe_reading.py`` takes one look and logs its reading,
``record.py`` stores and draws the readings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_grad.core.callback import Chosen, GradCallback
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.losses.given_functions import LossRequest
from lightning_grad.core.missed_validation import is_validation_due
from lightning_grad.core.probe_reading import Outcome, Reading, averaged_weights, send_reading, take_look
from lightning_grad.core.probe_samples import NOUNS, ProbeLook, ProbeSamples, Split, check_samples
from lightning_grad.core.record import RunRecord
from lightning_grad.utilities.checks import check_count, is_sharded
from lightning_grad.utilities.reporting import counted, logged_at, output_file, stepped_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_MOST_KEPT = 8  # looks whose kept tensors are in checkpoints


class ProbeCallback(GradCallback):
    """Calls :meth:`probe` on the same samples every few epochs or steps, without leaving a trace in the run.

    Each call is a *look*. The module is quiet (:func:`~lightning_grad.core.quiet`) and in eval
    mode, gradients are off unless the probe turns them on, and the random numbers are the same in
    each look. The precision is the same as in the run. A look at the end of an epoch takes place in its
    validation, so it sees the validated weights, including averaged ones; if the epoch has no
    validation at its end, the look takes place when it ends. A look after a step sees the trained
    weights. Only rank zero runs the probe, unless the model is sharded; the other ranks wait, and
    all log the same numbers.

    A rehearsal follows the first batch of a fit; its result is dropped. An error in the rehearsal
    ends the fit. An error in a later look becomes a warning, and training continues.

    Class attributes:

    - ``way_out``: ends the error about losses that cannot be captured: what to do instead, as an
      imperative.
    - ``looks_on_all_ranks``: set it to True if the probe runs a step in which ranks communicate.
    - ``credits_samples``: set it to True if the probe reports values by the index of a sample. A
      ``collate_fn`` that changes the order of the samples then ends the fit.

    Args:
        samples: Number of samples to inspect, spread evenly over the set, or their indices.
        every_n_epochs: Inspect at the end of every n-th epoch. Default: 1.
        every_n_steps: Inspect after every n-th optimizer step instead.
        split: Set that the samples are from, "train" or "val".
        dataset: Callable (trainer) -> data set to read from, for example one without augmentation.
        loader_key: Key or list position of the loader to use, if there are several.
        figure: Draw the record at the end (needs matplotlib and a logger with a folder).
        name: Name of this instance, needed if two of a class are used; part of state and log keys.

    Raises:
        ValueError: In the constructor, if both every_n_epochs and every_n_steps are set, or for no
            samples. When training starts, without validation data. After the first batch, if there
            are fewer samples.
        TypeError: After the first batch, if the data has no indices.

    **Logs** what :meth:`probe` returns: scalars to all loggers, arrays as histograms and pictures
    as images to loggers that support them. Each look writes to the log folder one ``.npz`` file
    with its arrays, one PNG file per picture and one CSV file per table. The end of the run adds a
    table of all scalars and a figure.

    **State.** The scalars of all looks, thinned, what the figure needs of up to eight looks, and
    whether a look is due.
    """

    way_out: ClassVar[str] = "use a probe that needs no losses of samples"
    looks_on_all_ranks: ClassVar[bool] = False
    credits_samples: ClassVar[bool] = False

    record = until_next_fit.of(RunRecord).saved()
    kept_looks = until_next_fit[RunRecord](lambda _: RunRecord(_MOST_KEPT)).saved()
    _due = until_next_fit[dict[str, int] | None](lambda _: None).saved()  # epoch and step of the next look
    _is_rehearsed = during_fit.of(bool)
    _samples = during_fit[ProbeSamples]()
    _indices = during_fit.of(list[int])

    def __init__(
        self,
        samples: int | Sequence[int] = 8,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        split: Split = "val",
        dataset: Callable[[pl.Trainer], Any] | None = None,
        loader_key: str | int | None = None,
        figure: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if every_n_epochs is not None and every_n_steps is not None:
            raise ValueError(
                f"Set either every_n_epochs or every_n_steps; got every_n_epochs={every_n_epochs} and "
                f"every_n_steps={every_n_steps}."
            )
        self.samples = samples if isinstance(samples, int) else list(samples)
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.split: Split = split
        self.dataset = dataset
        self.loader_key = loader_key
        self.figure = figure
        check_samples(self.samples)
        check_count(1 if every_n_epochs is None else every_n_epochs, 1, "every_n_epochs")
        check_count(1 if every_n_steps is None else every_n_steps, 1, "every_n_steps")

    def probe(self, look: ProbeLook) -> Reading:
        """Return the reading of one look."""
        raise NotImplementedError(f"{type(self).__name__} must define probe(look).")

    def loss_request(self) -> LossRequest:
        """Return what the probe needs of the losses of the step."""
        return LossRequest(self.display_name, way_out=self.way_out)

    def draw(self, record: RunRecord) -> Figure:
        """Return the figure of the whole run. Default: one panel for each scalar. Needs matplotlib."""
        return record.draw(self.display_name)

    # The fit begins.

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.works_with().refuse_parameters(self.display_name, pl_module)
        count = self.samples if isinstance(self.samples, int) else len(self.samples)
        every, unit = (self.every_n_steps, "step") if self.every_n_steps else (self.every_n_epochs or 1, "epoch")
        often = f"every {unit}" if every == 1 else f"every {every} {unit}s"
        given = [] if isinstance(self.samples, int) else self.samples
        self.announce(f"inspects {counted(count, f'{NOUNS[self.split]} sample')} {often}", "samples", given)

    @override
    def chosen(self) -> Chosen:
        """Return the samples that it inspects. A count becomes indices at the first look, on ranks that take looks."""
        chosen = super().chosen()
        return replace(chosen, names=self._indices) if self._indices else chosen

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.split == "val" and not trainer.enable_validation:
            raise ValueError(
                f"{self.display_name} inspects validation samples, but this fit has no validation. Define "
                "validation_step and pass a validation loader to fit(), or set split='train'."
            )
        asked = self.loss_request()
        choice = (self.samples, self.split, self.loader_key, self.dataset)
        self._samples = ProbeSamples(trainer, *choice, asked, in_order=self.credits_samples)

    # The times of looks.

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._look_if_due(trainer, pl_module)  # due if the run resumed from between a step and its look

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        place = {"epoch": trainer.current_epoch, "step": stepped_batches(trainer)}
        if self.every_n_steps is not None:
            steps = not trainer.fit_loop.epoch_loop._should_accumulate()
            if steps and (place["step"] + 1) % self.every_n_steps == 0:
                self._due = place
                self._look_if_due(trainer, pl_module)
        elif trainer.is_last_batch and (trainer.current_epoch + 1) % (self.every_n_epochs or 1) == 0:
            self._due = {**place, "in_validation": int(is_validation_due(trainer))}
        if not self._is_rehearsed:
            self._take(trainer, pl_module, place)

    @override
    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        # Not earlier: averaged weights are swapped in by on_validation_epoch_start of a callback
        # that may come later.
        if self.fitting and not trainer.sanity_checking:
            self._look_if_due(trainer, pl_module, is_validating=True)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look_if_due(trainer, pl_module)

    # A look.

    def _look_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, is_validating: bool = False) -> None:
        """Take a look that is due, record its reading and log it at the step at which it was due."""
        due = self._due
        if due is None:
            return
        swapped = due.get("in_validation") and not is_validating
        with averaged_weights(trainer, pl_module) if swapped else nullcontext():
            outcome = self._take(trainer, pl_module, due)
        self._due = None
        if outcome.numbers is None:
            return
        place = {"epoch": due["epoch"], "step": due["step"]}
        self.record.add({**place, **outcome.numbers})
        if outcome.reading is not None and outcome.reading.kept:
            self.kept_looks.add({**place, **outcome.reading.kept})
        self.record.save(trainer, self)
        folder = output_file(trainer, self.display_name, "")
        stem = None if folder is None else folder / f"step_{due['step']:08d}"
        with logged_at(trainer, due["step"]):
            send_reading(trainer, outcome.numbers, outcome.reading, self.log_key, stem, self.display_name)

    def _take(self, trainer: pl.Trainer, pl_module: pl.LightningModule, due: Mapping[str, int]) -> Outcome:
        """Take a look on the ranks that do so, and return its outcome; errors of the first look are raised."""
        on_all, outcome = self.looks_on_all_ranks or is_sharded(trainer), Outcome()
        if on_all or trainer.is_global_zero:
            outcome = take_look(trainer, pl_module, self._samples, self.probe, due)
            self._indices = self._samples.indices
        outcome = outcome.shared(trainer, on_all)
        if outcome.fault and (outcome.is_fatal or not self._is_rehearsed):
            self._raise(outcome)
        if outcome.fault:
            rank_zero_warn(f"{self.display_name} failed at step {due['step']}; training continues. {outcome.fault}")
        self._is_rehearsed = True
        return outcome

    def _raise(self, outcome: Outcome) -> None:
        error = outcome.error or RuntimeError(f"{self.display_name} failed on another rank. {outcome.fault}")
        if self.display_name not in str(error):
            which = "a" if self._is_rehearsed else "the first"
            error.add_note(f"{self.display_name}.probe raised this in {which} look. Correct it, or drop the callback.")
        raise error

    # The fit ends.

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        with contextlib.suppress(Exception):  # an error here would keep Lightning from calling the later callbacks
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        self.record.report(trainer, self, partial(self.draw, self.record), table="looks")
