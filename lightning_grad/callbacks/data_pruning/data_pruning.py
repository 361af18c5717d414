"""Data pruning by scores: the callback.

Scores, selection and score files are functions, in ``functional/data_scores.py``, ``functional/data_selection.py``,
``functional/per_sample_gradients.py`` and ``data/score_files.py``. ``core/subset.py`` is the base; beside this file
``_arguments.py`` checks the settings, ``_sources.py`` says where scores come from, ``_measures.py`` what a pass looks at,
``_report.py`` what is shown. ``core/scoring.py`` runs the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks.data_pruning._arguments import check_settings, read_rounds, warn_of_risks
from lightning_grad.callbacks.data_pruning._measures import GRADIENT_SCORES, OF_CLASSES, ONE_BY_ONE, Score, errors_of
from lightning_grad.callbacks.data_pruning._report import report
from lightning_grad.callbacks.data_pruning._resume import choice_settings, refuse_unrecorded, score_settings
from lightning_grad.callbacks.data_pruning._score_file import ScoreFile
from lightning_grad.callbacks.data_pruning._scored import ScoredSet
from lightning_grad.callbacks.data_pruning._sources import (
    CHANCE,
    FileScores,
    HistoryScores,
    Pass,
    ScoreSource,
    source_of,
)
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.given_functions import LOSS_FN, OUTPUTS_FN, SCORE_FN
from lightning_grad.core.look import Measure
from lightning_grad.core.loss_tap import read_losses
from lightning_grad.core.one_sample import cost_of_single_samples, in_words
from lightning_grad.core.rehearsal import Rehearsal
from lightning_grad.core.sample_losses import SampleLoss
from lightning_grad.core.scoring import look_at_all, say_what_is_skipped
from lightning_grad.core.subset import SubsetCallback
from lightning_grad.data import SampleScores, fingerprint
from lightning_grad.data.random_streams import generators_kept
from lightning_grad.functional import LossCall, count_kept, select_samples
from lightning_grad.functional.gradients import InseparableLossError
from lightning_grad.utilities.checks import (
    refuse_manual_optimization,
    refuse_sharded,
)
from lightning_grad.utilities.parameters import as_names

_EPOCH = 10


class DataPruning(SubsetCallback):
    r"""Train on the samples that matter most, as a score taken in mid-training ranks them.

    After k whole epochs every sample of the training set is scored through the module's own ``training_step``, in eval mode
    and without a trace, and training goes on with a part of them. With the default score, EL2N, and the default rule

    .. math::
        s_i = \lVert \operatorname{softmax}(f(x_i)) - \operatorname{onehot}(y_i) \rVert_2, \qquad
        K = \{i : \operatorname{rank}(s_i) \in (o n, o n + (1 - r) n]\}

    f are the logits, r is ``prune``, o is ``offset`` and n the number of samples; rank 1 is the hardest.

    ============= ========================================================================================
    score         high for
    ============= ========================================================================================
    el2n          :func:`~lightning_grad.functional.el2n`: answers far from the label
    grand         norm of the gradient of the sample's own loss, over all trained parameters
    grand-last    the same of the last layer alone, which needs no backward pass
    loss          the loss
    margin        minus the margin: the true logit against the best other
    aum           minus the mean margin over the epochs so far, each at the sample's own batch
    forgetting    how often an answer went from right to wrong at the sample's own batches; never right = inf
    vog           variance of the input gradient of the true logit over several passes
    prototypes    distance of the last layer's input to the nearest of as many means as there are classes
    ============= ========================================================================================

    Args:
        prune: Share of the samples left out, at least 0 and below 1; 0 scores and leaves out none, which finds label
            errors. A list prunes in several rounds, each counted from the whole set.
        score: What ranks the samples; see the table.
        epoch: Number of whole epochs after which samples are scored, then pruned; a list for several rounds. Default 10 (the
            paper takes EL2N from 10 to 20 of 200 epochs on), and 0 with score_files.
        keep: "hard" keeps high scores, "easy" low ones (better when data is scarce, arXiv 2206.14486), "random" is the
            baseline.
        offset: Share of the hardest that is left out too, against wrong labels.
        balance: "class" keeps the same share of every class.
        class_floor: Least share of each class that is kept.
        select: "top" keeps one end of the ranking, "ccs" spreads over all scores (arXiv 2210.15809), for high rates.
        strata: Number of bins of ccs (50, as in its released code).
        budget: "epochs" makes epochs shorter, and training faster; "steps" keeps their number of steps, as the paper does,
            and passes through the kept samples more than once.
        score_files: Score files to rank by instead of scoring; several are averaged.
        save_scores: Where to write the scores (.npz); with several rounds the epoch is added. Default: beside the logs.
        score_fn: Function of the module and a batch that returns the scores (B,), for losses that cannot be seen; by dotted
            path in YAML. It runs in eval mode and without gradients, unless it turns them on.
        loss_fn: Function of the module and a batch that returns the losses (B,), in place of the step, for loss, grand
            and vog (which then takes the gradient of the loss). Its mean must be the step's loss, up to a constant.
        outputs_fn: Function of the module and a batch that returns logits (B, C) and labels (B,), for el2n, margin, aum,
            forgetting, grand-last and prototypes.
        scores_by: "sample" runs the step on one sample at a time, up to a batch size times as long; for loss and grand.
            It is for a loss that cannot be separated. The mean over the samples of a batch must be the batch's loss.
        score_dataset: Function of the trainer that returns the training set without augmentation, to score that.
        loss: Which call of a loss alone counts, from 0. By default loss and grand take all that the step returns, grand-last
            its only call, and the others the only one that classifies.
        checkpoints: Number of passes of vog, at least 2, spread evenly over the epochs before.
        strict: Whether score files of another data set are refused.
        show: Number of the hardest and of the easiest samples that are shown, in a table and a figure; 0 for none.
        figure: Draw histogram and samples (needs matplotlib, and a logger whose folder takes the file).
        seed: Seed of ties, of random choices and of random streams while scoring.
        loader_key: Which of several training loaders to prune: its key, or its position in a list.
        name: Name of this instance.

    Raises:
        ValueError: In the constructor for a share outside its range, an unknown name, or rounds that do not fit. In setup
            for manual optimization (unless nothing has to be scored in a pass), a gradient score with sharded parameters, an
            epoch that never comes, another technique that chooses samples. After the first batch, if the loss cannot be
            seen or does not suit the score: one batch is scored to find out.
        RuntimeError: After the first batch, if rows do not follow their samples into another order, or if only a part of the
            loss is seen where the whole counts, or two calls classify, and ``loss`` does not say which counts alone.
        TypeError: If the training data has no indices (iterable data, ``in_order=False``, other keys of a sampler).
        FileNotFoundError: In setup, if a score file is missing. One that is damaged, or belongs to another data set, raises a
            ValueError before the first batch, and so does a ``save_scores`` that cannot be written.

    **Hooks.** The training loader gets its batch sampler in ``strategy.process_dataloader``, where it is complete and
    nothing is drawn yet; ``on_train_epoch_start`` scores and prunes, before the epoch's first batch is drawn;
    ``on_train_batch_start`` learns which samples come; step schedulers take several steps for one in shorter epochs, in
    ``lr_scheduler_step``, so that they end where they should.

    **Logs** under ``data/``, at each epoch: ``kept_share``, ``samples_seen``. On scoring: a figure of the scores with the
    cut and the kept share of each class, a table and a figure of the hardest and easiest samples, and the score file (W&B: an
    artifact).
    In the summary ``samples_share``, samples seen against those that training on all would have seen.

    **State.** The samples kept, the scores, and what histories have recorded; resuming is bit-exact. Of several ranks only
    the first saves its part of the present epoch's history.

    **Cost.** One evaluation pass of the training set for each round (grand: forward and backward), see docs/benchmarks.md.

    **Works with** accumulation, fp16 and bf16, DDP, compiled submodules, any sampler of torch.utils.data, workers: yes.
    FSDP, DeepSpeed: all but grand, grand-last and vog. Manual optimization: with ``keep="random"``, score files, score_fn,
    aum or forgetting.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.DataPruning
                  init_args:
                    prune: 0.5
                    score: el2n
                    epoch: 10

    References:
        Paul et al., "Deep Learning on a Data Diet: Finding Important Examples Early in Training", 2021, arXiv 2107.07075.
    """

    trial: ClassVar[Mapping[str, Any]] = {"prune": 0.3, "epoch": 1}

    scored = until_next_fit[ScoredSet | None](lambda _: None)
    _unaugmented = during_fit[Any](lambda _: None)
    _sample_loss = during_fit[SampleLoss](lambda _: None)
    _has_checked = during_fit.of(bool)
    # What a refusal says of scores_by="sample", once that is measured.
    _by_sample = during_fit[str | None](lambda _: None)
    _last_round = until_next_fit[int](lambda _: -1)  # epoch
    _choice_changed = during_fit.of(bool)
    _goes_on = during_fit.of(bool)  # with the scores of a checkpoint, or what was recorded for them
    # What a checkpoint's scores depend on, if they are of another kind.
    _foreign = during_fit[dict[str, Any] | None](lambda _: None)

    def __init__(
        self,
        prune: float | Sequence[float] = 0.5,
        score: Score = "el2n",
        epoch: int | Sequence[int] | None = None,
        keep: Literal["hard", "easy", "random"] = "hard",
        offset: float = 0.0,
        balance: Literal["class"] | None = None,
        class_floor: float = 0.0,
        select: Literal["top", "ccs"] = "top",
        strata: int = 50,
        budget: Literal["epochs", "steps"] = "epochs",
        score_files: Sequence[str] | None = None,
        save_scores: str | None = None,
        score_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        score_dataset: Callable[[pl.Trainer], Any] | None = None,
        loss: int | None = None,
        loss_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        outputs_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        scores_by: Literal["batch", "sample"] = "batch",
        checkpoints: int = 3,
        strict: bool = True,
        show: int = 16,
        figure: bool = True,
        seed: int = 0,
        loader_key: str | int | None = None,
        name: str | None = None,
    ) -> None:
        self.prune = list(prune) if isinstance(prune, Sequence) else prune
        self.score = score
        self.epoch = list(epoch) if isinstance(epoch, Sequence) else epoch
        self.keep = keep
        self.offset = offset
        self.balance = balance
        self.class_floor = class_floor
        self.select = select
        self.strata = strata
        self.budget = budget
        self.score_files = as_names(score_files)
        self.save_scores = save_scores
        self.score_fn = score_fn
        self.score_dataset = score_dataset
        self.loss = loss
        self.loss_fn = loss_fn
        self.outputs_fn = outputs_fn
        self.scores_by = scores_by
        self.checkpoints = checkpoints
        self.strict = strict
        self.show = show
        self.figure = figure
        self.seed = seed
        self._rounds = read_rounds(self.prune, self.epoch, default=0 if self._needs_no_training else _EPOCH)
        check_settings(self, self._rounds)
        super().__init__(loader_key, name)

    @until_next_fit
    def _source(self) -> ScoreSource:
        source = source_of(
            self.score,
            self.score_fn,
            self.score_files,
            self.strict,
            by_chance=self.keep == "random",
            needs_classes=not self._needs_no_classes,
            checkpoints=self.checkpoints,
            seed=self.seed,
            one_by_one=self.scores_by == "sample",
        )
        if self.loss_fn is not None or self.outputs_fn is not None:  # which take the place of the step
            source.runs_the_step = False
        return source

    @property
    def _needs_no_classes(self) -> bool:
        return self.balance is None and self.class_floor == 0.0

    @property
    def _needs_no_training(self) -> bool:
        """Whether pruning may begin with the first epoch, because nothing has to be learnt before."""
        return bool(self.score_files) or (self.keep == "random" and self._needs_no_classes)

    @property
    @override
    def plan(self) -> str:
        by = "chosen at random" if self.keep == "random" else f"by {self._source.name}"
        steps = [f"on {100 * (1 - share):g} % of the samples from epoch {epoch} on" for epoch, share in self._rounds]
        first = [] if self._rounds[0][0] == 0 else ["on all samples at first"]
        return f"trains {', '.join([*first, *steps])} ({by})"

    @property
    @override
    def remembers_samples(self) -> bool:
        return any(share for _, share in self._rounds) or self._source.epochs_needed > 0

    @property
    @override
    def holds_samples(self) -> bool:
        return self.scored is not None or self._source.is_recording

    @property
    @override
    def passes_more_than_once(self) -> bool:
        return self.budget == "steps"

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not self.fitting:
            return
        if self._source.runs_the_step:
            asked = "balance or class_floor" if self._source.name == CHANCE else f"score={self.score!r}"
            refuse_manual_optimization(
                pl_module,
                f"{self.label} with {asked}",
                "its training_step also steps, so that it cannot be run just to score samples. Use score='aum' or "
                "'forgetting', keep='random', score_files, or score_fn=, which takes the module and a batch and returns the "
                "scores.",
            )
        if self._source.name in GRADIENT_SCORES:
            refuse_sharded(trainer, f"{self.label}(score={self.score!r})")
        if isinstance(self._source, FileScores):
            self._source.check(self.label)
        if self._writes_scores:
            self._score_file.check(trainer, self._rounds[-1][0])
        self.refuse_unreached(trainer, self._rounds[0][0], "prune")
        late = [
            epoch for epoch, _ in self._rounds if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epoch
        ]
        if late and late != [epoch for epoch, _ in self._rounds]:
            rank_zero_warn(
                f"{self.label} has rounds that never come: max_epochs={trainer.max_epochs}, epoch={self.epoch}. Leave "
                "them out, or set max_epochs higher."
            )
        warn_of_risks(self, self._rounds)
        if isinstance(self._source, HistoryScores):
            own = (pl_module, self._read, self.loss, lambda: len(self.indices), self._way_out)
            self.undo.push(read_losses(*own, needed_by=self.label, outputs_fn=self.outputs_fn, by_classes=True))

    @override
    def state_dict(self) -> dict[str, Any]:
        scored = None
        if self.scored is not None:
            scored = {key: value for key, value in vars(self.scored).items() if key != "kept"}
        return {
            **super().state_dict(),
            "last_round": self._last_round,
            "source": self._source.state_dict(),
            "scored": scored,
            "score_settings": score_settings(self),
            "choice_settings": choice_settings(self),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if not self.fitting:
            return
        if state_dict["score_settings"] != score_settings(self):
            self._foreign = state_dict["score_settings"]
            return
        self._goes_on = True
        self._choice_changed = state_dict["choice_settings"] != choice_settings(self)
        self._last_round = state_dict["last_round"]
        self._source.load_state_dict(state_dict["source"])
        if state_dict["scored"] is not None:
            self.scored = ScoredSet(**state_dict["scored"], kept=self.kept)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._goes_on:
            next_epoch = trainer.current_epoch + trainer.fit_loop.restarted_mid_epoch
            refuse_unrecorded(self, self._foreign, next_epoch)
            self._source.begin(next_epoch)
        if isinstance(self._source, FileScores) and self._last_round < self._rounds[-1][0]:
            self._look_at_files(trainer)
        super().on_train_start(trainer, pl_module)

    def _look_at_files(self, trainer: pl.Trainer) -> None:
        assert isinstance(self._source, FileScores)
        items = self.training_set.items(self._dataset(trainer))
        if self._source.look(self.training_set.sampler.total, items).labels is None:
            self._refuse_balance()

    @override
    def rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.refuse_unreached_steps(trainer, self._rounds[0][0], "prune")
        if self._last_round < self._rounds[-1][0]:
            if self.scores_by == "sample":
                self._check_rows(trainer, pl_module)  # says what a step that fails on one sample is
            found = self._source.rehearse(self._passes(trainer, pl_module, rehearsal=True))
            if self.scores_by != "sample":
                self._check_rows(trainer, pl_module)
            if found and "label" not in found:
                self._refuse_balance()

    def _check_rows(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._source.pairs_rows:
            return
        in_training = isinstance(self._source, HistoryScores)
        rehearsal = Rehearsal(
            trainer,
            pl_module,
            self.label,
            self.loss,
            measure=self._source.measure,
            runs_the_step=pl_module.automatic_optimization,
            by_terms=self._source.by_terms,
            by_classes=self._source.by_classes,
            loss_fn=self.loss_fn,
            outputs_fn=self.outputs_fn,
            way_out=self._way_out,
        )
        dataset = None if in_training else self._dataset(trainer)
        if self.scores_by == "sample":
            rehearsal.check_alone(self.training_set, dataset)
            return
        rehearsal.check_loader(self.training_set, dataset, in_training and self.outputs_fn is None)
        if self.loss_fn is not None and pl_module.automatic_optimization and self.training_set.is_whole_batch:
            rehearsal.check_function(self.training_set, dataset)
        self._sample_loss, self._has_checked = rehearsal.kind, True

    @property
    def _way_out(self) -> str:
        """What to do about a loss that cannot be seen."""
        if self.score in OF_CLASSES:
            return f"{SCORE_FN}, or {OUTPUTS_FN}"
        first = "leave scores_by at 'batch', and " if self.scores_by == "sample" else ""
        return f"{first}{SCORE_FN}, or {LOSS_FN}{self._by_sample or ''}"

    def _offering_samples(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, look: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Have a refusal also say what it would cost to score one sample at a time, where that is possible."""
        try:
            return look()
        except (InseparableLossError, ValueError):
            may_offer = self.score in ONE_BY_ONE and self.scores_by == "batch" and self.loss_fn is None
            if not may_offer or self._by_sample is not None or not self.training_set.is_whole_batch:
                raise
        rehearsal = Rehearsal(trainer, pl_module, self.label, way_out=self._way_out)
        own = (self.training_set, self._dataset(trainer), self._source.name in GRADIENT_SCORES)
        found = cost_of_single_samples(rehearsal, *own)
        self._by_sample = (
            ""
            if found is None
            else ", or set scores_by='sample', which runs the step on one sample at a time: such a pass takes "
            f"{in_words(found[0])} here as one in batches of {found[1]}"
        )
        return look()  # which is refused again, in these words

    def _kind(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> SampleLoss:
        """Return what the loss of a sample is, where it comes from several terms."""
        if not self._has_checked:  # scoring comes before the first batch
            self._check_rows(trainer, pl_module)
        return self._sample_loss

    @override
    def end_epoch(self, trainer: pl.Trainer) -> None:
        self._source.gather(trainer)

    # An epoch begins.

    @override
    def choose_samples(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor | None:
        run_pass = self._passes(trainer, pl_module)
        self._source.epoch_begins(trainer, run_pass, [epoch for epoch, _ in self._rounds])
        due = [(epoch, share) for epoch, share in self._rounds if epoch <= trainer.current_epoch]
        if not due:
            return None
        epoch, share = due[-1]
        if epoch > self._last_round:
            self._last_round = trainer.current_epoch
            return self._prune(trainer, run_pass, share)
        if self._choice_changed and self.scored is not None:  # on resume
            self._choice_changed = False
            return self._keep(self.scored, share).kept
        return self.kept

    def _passes(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rehearsal: bool = False) -> Pass:
        def run(measure: Measure, title: str) -> Mapping[str, Tensor]:
            own = (trainer, pl_module, self.training_set, measure, title, self._dataset(trainer))
            kind = None if rehearsal else lambda: self._kind(trainer, pl_module)
            look = partial(
                look_at_all,
                *own,
                which=self.loss,
                seed=self.seed,
                rehearsal=rehearsal,
                label=self.label,
                kind=kind,
                loss_fn=self.loss_fn,
                outputs_fn=self.outputs_fn,
                one_by_one=self.scores_by == "sample",
                by_classes=self._source.by_classes,
            )
            found = self._offering_samples(trainer, pl_module, lambda: look(way_out=self._way_out))
            if self.scores_by == "sample" and not rehearsal:
                self._compare_with_batches(trainer, pl_module, found.get("loss", found["score"]))
            return found

        return run

    def _compare_with_batches(self, trainer: pl.Trainer, pl_module: pl.LightningModule, losses: Tensor) -> None:
        """Refuse losses of single samples whose mean is not that of their batch."""

        def mean(indices: list[int]) -> float:
            return float(losses[indices].nanmean())

        own = (self.training_set, self._dataset(trainer), mean, "scores_by='sample'")
        Rehearsal(trainer, pl_module, self.label, way_out=self._way_out).check_means(*own, with_constant=False)

    def _prune(self, trainer: pl.Trainer, run_pass: Pass, share: float) -> Tensor | None:
        items = self.training_set.items(self._dataset(trainer))
        scored = self._keep(self._source.take(trainer, run_pass, self.training_set, items), share)
        if scored.name != CHANCE:
            dataset = self._dataset(trainer)
            with generators_kept(dataset):
                self._save(trainer, scored)
                report(trainer, scored, self.training_set.items(dataset), self, self.show)
        return scored.kept

    def _keep(self, scored: ScoredSet, share: float) -> ScoredSet:
        """Choose the samples that a share leaves of those scored, and print how many they are."""
        sampler = self.training_set.sampler
        population = sampler.population
        say_what_is_skipped(self.label, population, ~scored.values[population].isnan())
        count = count_kept(len(population), share, sampler.batch_size, sampler.ranks, sampler.drop_last)
        if share:
            self.warn_of_too_few(count, len(population))
        kept = None if share == 0.0 else population[self._select(scored, population, count)]
        self.scored = replace(scored, kept=kept)
        self._say_kept(scored.name, count, len(population), share)
        return self.scored

    def _select(self, scored: ScoredSet, population: Tensor, count: int) -> Tensor:
        labels = None if self._needs_no_classes else self._labels_of(scored, population)
        return select_samples(
            scored.values[population],
            count,
            keep=self.keep,
            rule=self.select,
            offset=self.offset,
            labels=labels,
            balance=self.balance,
            class_floor=self.class_floor,
            strata=self.strata,
            seed=self.seed,
        )

    def _labels_of(self, scored: ScoredSet, population: Tensor) -> Tensor:
        if scored.labels is None:
            self._refuse_balance()
        assert scored.labels is not None
        labels = scored.labels[population]
        return labels.where(labels >= 0, labels.max() + 1)  # those of unknown class are one of their own

    def _refuse_balance(self) -> None:
        if not self._needs_no_classes:
            raise ValueError(
                f"{self.label} balances classes, and nothing tells which class a sample has. Leave balance at None and "
                "class_floor at 0."
            )

    def _say_kept(self, name: str, count: int, total: int, share: float) -> None:
        if share == 0.0:
            rank_zero_info(f"{self.label} has scored {total} samples by {name}, and keeps them all.")
            return
        what = (
            "Epochs keep their number of steps, and pass through these samples more than once."
            if self.passes_more_than_once
            else "Epochs get shorter, and schedules that step with batches advance faster, to end where they would have."
        )
        rank_zero_info(f"{self.label} goes on with {count} of {total} samples (by {name}). {what}")

    def _dataset(self, trainer: pl.Trainer) -> Any:
        if self.score_dataset is None:
            return self.training_set.loader.dataset
        if self._unaugmented is None:
            self._unaugmented = self.score_dataset(trainer)
        return self._unaugmented

    def _save(self, trainer: pl.Trainer, scored: ScoredSet) -> None:
        mark = fingerprint(self.training_set.items(self._dataset(trainer)))
        if mark.items is None and self.score_dataset is None and self._source.runs_the_step:
            rank_zero_warn(
                f"{self.label} scores samples that differ each time they are read, as augmentation makes them. Give "
                "score_dataset=, a function of the trainer that returns the training set without it."
            )
        if self._writes_scores:
            scores = SampleScores(scored.values, scored.name, scored.epoch, self.seed, mark, scored.labels)
            self._score_file.write(trainer, scores, scored.epoch)

    @property
    def _writes_scores(self) -> bool:
        return not self.score_files and self._source.name != CHANCE

    @property
    def _score_file(self) -> ScoreFile:
        return ScoreFile(self.label, self.name, self.save_scores, several=len(self._rounds) > 1)

    # A batch is trained on.

    def _read(self, call: LossCall) -> None:
        assert isinstance(self._source, HistoryScores)
        with errors_of(self.label):
            self._source.read(call, self.indices, self.training_set.sampler.total)
