"""Data pruning by scores: the callback.

Scores, selection and score files are functions, in ``functional/data_pruning/`` and ``data/score_files.py``.
``core/subset.py`` is the base; next to this file ``_settings.py`` checks the settings, ``_sources.py`` knows where scores
come from, ``_measures.py`` what a pass measures, ``_passes.py`` runs it, and ``_report.py`` shows what was found.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks.data_pruning import _settings as rules
from lightning_grad.callbacks.data_pruning._measures import GRADIENT_SCORES, Score
from lightning_grad.callbacks.data_pruning._passes import Passes
from lightning_grad.callbacks.data_pruning._report import report_scores
from lightning_grad.callbacks.data_pruning._scored import ScoredSet, check_score_file, write_score_file
from lightning_grad.callbacks.data_pruning._sources import CHANCE, FileScores, HistoryScores, ScoreSource, source_of
from lightning_grad.callbacks.data_pruning._works_with import COMPILED, CURRENT_WEIGHTS
from lightning_grad.core.compatibility import WHOLE_WEIGHTS, Compatibility, manual, no, stand_in, yes
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.losses.loss_tap import read_losses
from lightning_grad.core.losses.scoring import say_what_is_skipped
from lightning_grad.core.subset import OWN_SCHEDULES, SubsetCallback
from lightning_grad.data import fingerprint
from lightning_grad.data.random_streams import generators_kept
from lightning_grad.functional import count_kept, select_samples
from lightning_grad.utilities.checks import check_between, check_count
from lightning_grad.utilities.parameters import as_names

_EPOCH = 10
_SHARDED = stand_in(
    "All but the scores `grand`, `grand-last` and `vog`, which need whole weights and raise. Tests run the others under "
    "stand-ins of FSDP2, FSDP1 and DeepSpeed in one process; none has run them on real shards."
)
_NO_GRADIENTS = no(
    "needs whole weights, and {} shards them",
    "Train with strategy='ddp' or on one device, or use a score other than grand, grand-last and vog",
)
_NO_PASS = no(
    "does not work with {}: its training_step also steps, so it cannot be run just to score samples",
    "Use score='aum' or 'forgetting', keep='random', score_files, or score_fn=, which takes the module and a batch and "
    "returns the scores",
)
_BY_HAND = yes(
    '`keep="random"` without balance, the scores `aum` and `forgetting`, `score_files` and `score_fn`. What runs the step in '
    f"a pass of its own raises. {OWN_SCHEDULES}"
)


class DataPruning(SubsetCallback):
    r"""Train on the samples that a score in mid-training ranks first; or only score, and find wrong labels.

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
        loss_index: Index, from 0, of the only loss call that counts.
            By default loss and grand take all that the step returns, grand-last its only call, and the others the only one
            that classifies.
        checkpoints: Number of passes of vog, at least 2, spread evenly over the epochs before.
        strict: Whether score files of another data set are refused.
        num_shown: Number of the hardest and of the easiest samples that are shown, in a table and a figure; 0 for none.
        decode: Function of an item of the data set that returns the text or the image to show of it, such as one that
            decodes token ids; by dotted path in YAML.
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
            loss is seen where the whole counts, or two calls classify, and ``loss_index`` does not say which counts alone.
        TypeError: If the training data has no indices (iterable data, ``in_order=False``, other keys of a sampler).
        FileNotFoundError: In setup, if a score file is missing. One that is damaged, or belongs to another data set, raises a
            ValueError before the first batch, and so does a ``save_scores`` that cannot be written.

    **Hooks.** The training loader gets its batch sampler in ``strategy.process_dataloader``, where it is complete and
    nothing is drawn yet; ``on_train_epoch_start`` scores and prunes, before the epoch's first batch is drawn;
    ``on_train_batch_start`` learns which samples come; step schedulers take several steps for one in shorter epochs, in
    ``lr_scheduler_step``, so that they end where they should.

    **Logs** under ``data/``, at each epoch: ``kept_share``, ``samples_seen``. On scoring: a figure of the scores with the
    cut and the kept share of each class, a table and a figure of the hardest and easiest samples, and the score file
    (W&B: a version of the artifact of this data set). Where the module gives samples another class than their label: a
    table ``label_errors``, hardest first, with the suggested label, and a table ``label_pairs`` that counts them by both
    classes. In the summary ``samples_share``, samples seen against those that training on all would have seen.

    **State.** The samples kept, the scores, and what histories have recorded; resuming is bit-exact. Of several ranks only
    the first saves its part of the present epoch's history.

    **Cost.** One evaluation pass of the training set for each round (grand: forward and backward), see docs/benchmarks.md.

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

    compatibility: ClassVar[Compatibility] = SubsetCallback.compatibility.but(
        compiled=COMPILED,
        weight_averaging=CURRENT_WEIGHTS,
        **dict.fromkeys(WHOLE_WEIGHTS, _SHARDED),
        **manual(_BY_HAND),
    )
    trial: ClassVar[Mapping[str, Any]] = {"prune": 0.3, "epoch": 1}
    neutral: ClassVar[Mapping[str, Any] | str] = {"prune": 0.0}

    scored = until_next_fit[ScoredSet | None](lambda _: None)
    source = until_next_fit[ScoreSource](source_of)
    _passes = during_fit[Passes]()
    _last_round = until_next_fit[int](lambda _: -1)  # epoch
    _choice_changed = during_fit.of(bool)
    _goes_on = during_fit.of(bool)  # with the scores of a checkpoint, or what was recorded for them
    _saved_settings = during_fit.of(dict[str, Any])  # of a checkpoint

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
        loss_index: int | None = None,
        loss_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        outputs_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        scores_by: Literal["batch", "sample"] = "batch",
        checkpoints: int = 3,
        strict: bool = True,
        num_shown: int = 16,
        decode: Callable[[Any], Any] | None = None,
        figure: bool = True,
        seed: int = 0,
        loader_key: str | int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loader_key, name)
        self.prune = list(prune) if isinstance(prune, Sequence) else prune
        self.score = score
        self.epoch = list(epoch) if isinstance(epoch, Sequence) else epoch
        self.keep = keep
        self.offset = check_between(offset, 0.0, 1.0, "offset")
        self.balance = balance
        self.class_floor = check_between(class_floor, 0.0, 1.0, "class_floor")
        self.select = select
        self.strata = check_count(strata, 1, "strata")
        self.budget = budget
        self.score_files = as_names(score_files)
        self.save_scores = save_scores
        self.score_fn = score_fn
        self.score_dataset = score_dataset
        self.loss_index = check_count(loss_index, 0, "loss_index")
        self.loss_fn = loss_fn
        self.outputs_fn = outputs_fn
        self.scores_by = scores_by
        self.checkpoints = check_count(checkpoints, 2, "checkpoints")
        self.strict = strict
        self.num_shown = check_count(num_shown, 0, "num_shown")
        self.decode = decode
        self.figure = figure
        self.seed = check_count(seed, 0, "seed")
        self.rounds = rules.read_rounds(self.prune, self.epoch, default=0 if self._needs_no_training else _EPOCH)
        rules.check_settings(self)

    @property
    def balances_classes(self) -> bool:
        """Whether the choice of samples depends on their classes."""
        return self.balance is not None or self.class_floor != 0.0

    @property
    def _needs_no_training(self) -> bool:
        """Whether pruning may begin with the first epoch, because nothing has to be learnt before."""
        return bool(self.score_files) or (self.keep == "random" and not self.balances_classes)

    @property
    def _writes_scores(self) -> bool:
        return not self.score_files and self.source.name != CHANCE

    @property
    @override
    def plan(self) -> str:
        by = "chosen at random" if self.keep == "random" else f"by {self.source.name}"
        steps = [f"on {100 * (1 - share):g} % of the samples from epoch {epoch} on" for epoch, share in self.rounds]
        first = [] if self.rounds[0][0] == 0 else ["on all samples at first"]
        return f"trains {', '.join([*first, *steps])} ({by})"

    @property
    @override
    def remembers_samples(self) -> bool:
        return any(share for _, share in self.rounds) or self.source.epochs_needed > 0

    @property
    @override
    def holds_samples(self) -> bool:
        return self.scored is not None or self.source.is_recording

    @property
    @override
    def passes_more_than_once(self) -> bool:
        return self.budget == "steps"

    # The fit begins.

    @override
    def works_with(self) -> Compatibility:
        answers = self.compatibility
        if self.source.runs_the_step:
            asked = "balance or class_floor" if self.source.name == CHANCE else f"score={self.score!r}"
            answers = answers.but(**manual(_NO_PASS.given(asked)))
        if self.source.name in GRADIENT_SCORES:
            answers = answers.but(**dict.fromkeys(WHOLE_WEIGHTS, _NO_GRADIENTS.given(f"score={self.score!r}")))
        return answers

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not self.fitting:
            return
        if isinstance(self.source, FileScores):
            self.source.check(self)
        if self._writes_scores:
            check_score_file(self, trainer)
        self.refuse_unreached(trainer, self.rounds[0][0], "prune")
        rules.warn_of_risks(self, trainer)
        self._passes = Passes(self, trainer, pl_module)
        if isinstance(self.source, HistoryScores):
            read = partial(self.source.read, self)
            self.undo.push(read_losses(pl_module, read, self._passes.asked, lambda _: len(self.indices)))

    @override
    def state_dict(self) -> dict[str, Any]:
        scored = None if self.scored is None else dict(vars(self.scored))
        own = {"last_round": self._last_round, "scored": scored}
        return {**super().state_dict(), **own, "source_kind": self.source.kind, "source": self.source.state_dict()}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._saved_settings = state["settings"]
        is_foreign = state["source_kind"] != self.source.kind
        if is_foreign or self.changed_settings(state, *rules.score_settings(self)):
            return
        self._goes_on = True
        self._choice_changed = bool(self.changed_settings(state, "prune", "epoch", *rules.CHOICE))
        self._last_round = state["last_round"]
        self.source.load_state_dict(state["source"])
        if state["scored"] is not None:
            self.scored = ScoredSet(**state["scored"])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._goes_on:
            next_epoch = trainer.current_epoch + trainer.fit_loop.restarted_mid_epoch
            rules.refuse_unrecorded(self, self._saved_settings, next_epoch)
            self.source.begin(next_epoch)
        if isinstance(self.source, FileScores) and self._has_rounds_left:
            self._refuse_balance(self.source.look(self._passes).labels)
        super().on_train_start(trainer, pl_module)

    @property
    def _has_rounds_left(self) -> bool:
        return self._last_round < self.rounds[-1][0]

    @override
    def rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.refuse_unreached_steps(trainer, self.rounds[0][0], "prune")
        if not self._has_rounds_left:
            return
        runs_single_samples = self.scores_by == "sample"
        if runs_single_samples:
            self._passes.check_rows()  # says what a step that fails on one sample is
        found = self.source.rehearse(self._passes)
        if not runs_single_samples:
            self._passes.check_rows()
        if found:
            self._refuse_balance(found.get("label"))

    @override
    def end_epoch(self, trainer: pl.Trainer) -> None:
        self.source.gather(trainer)

    # An epoch begins.

    @override
    def choose_samples(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor | None:
        self.source.epoch_begins(self._passes)
        due = [(epoch, share) for epoch, share in self.rounds if epoch <= trainer.current_epoch]
        if not due:
            return None
        epoch, share = due[-1]
        if epoch > self._last_round:
            self._last_round = trainer.current_epoch
            return self._prune(trainer, share)
        if self._choice_changed and self.scored is not None:  # on resume
            self._choice_changed = False
            return self._keep(self.scored, share).kept
        return self.kept

    def _prune(self, trainer: pl.Trainer, share: float) -> Tensor | None:
        scored = self._keep(self.source.take(self._passes), share)
        if scored.name != CHANCE:
            with generators_kept(self._passes.dataset):
                self._save(trainer, scored)
                report_scores(trainer, scored, self._passes.items, self, self.num_shown, self.figure, self.decode)
        return scored.kept

    def _keep(self, scored: ScoredSet, share: float) -> ScoredSet:
        """Choose the samples that a share leaves of those scored, and print how many they are."""
        sampler = self.training_set.sampler
        population = sampler.population
        say_what_is_skipped(self.display_name, population, ~scored.values[population].isnan())
        count = count_kept(len(population), share, sampler.batch_size, sampler.ranks, sampler.drop_last)
        if share:
            self.warn_of_too_few(count, len(population))
        kept = None if share == 0.0 else population[self._select(scored, population, count)]
        self.scored = replace(scored, kept=kept)
        self._say_kept(scored.name, count, len(population), share)
        return self.scored

    def _select(self, scored: ScoredSet, population: Tensor, count: int) -> Tensor:
        self._refuse_balance(scored.labels)
        labels = scored.labels if self.balances_classes else None
        if labels is not None:
            labels = labels[population]
            labels = labels.where(labels >= 0, labels.max() + 1)  # those of unknown class are one of their own
        choice = {name: getattr(self, name) for name in rules.CHOICE}
        return select_samples(scored.values[population], count, rule=choice.pop("select"), labels=labels, **choice)

    def _refuse_balance(self, labels: Tensor | None) -> None:
        if self.balances_classes and labels is None:
            raise ValueError(
                f"{self.display_name} balances classes, and nothing tells which class a sample has. Leave balance at None and "
                "class_floor at 0."
            )

    def _say_kept(self, name: str, count: int, total: int, share: float) -> None:
        if share == 0.0:
            rank_zero_info(f"{self.display_name} has scored {total} samples by {name}, and keeps them all.")
            return
        what = "Epochs get shorter, and schedules that step with batches advance faster, to end where they would have."
        if self.passes_more_than_once:
            what = "Epochs keep their number of steps, and pass through these samples more than once."
        rank_zero_info(f"{self.display_name} goes on with {count} of {total} samples (by {name}). {what}")

    def _save(self, trainer: pl.Trainer, scored: ScoredSet) -> None:
        mark = fingerprint(self._passes.items)
        if mark.items is None and self.score_dataset is None and self.source.runs_the_step:
            rank_zero_warn(
                f"{self.display_name} scores samples that differ each time they are read, as augmentation makes them. Give "
                "score_dataset=, a function of the trainer that returns the training set without it."
            )
        if self._writes_scores:
            write_score_file(self, trainer, scored, mark)
