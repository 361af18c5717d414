"""Data pruning by scores: the callback.

Scores, selection and score files are functions in ``functional/data_pruning/`` and ``data/score_files.py``. The
base is ``core/subset.py``. Next to this file, ``_settings.py`` checks the settings, ``_sources.py`` has the
sources of scores, ``_measures.py`` measures a batch, ``_passes.py`` runs a pass, and ``_report.py`` writes
tables and figures.
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
from lightning_grad.callbacks.data_pruning._score_source import ScoreSource
from lightning_grad.callbacks.data_pruning._scored import ScoredSet, check_score_file, write_score_file
from lightning_grad.callbacks.data_pruning._sources import BINS, CHANCE, FileScores, HistoryScores, source_of
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
_STRATA = {"ccs": 50, "dq": 10}  # as in the released codes
_SCORES = "All scores work except `grand`, `grand-last`, `vog` and `less`, which need whole weights and raise."
_SHARDED = {
    **dict.fromkeys(
        WHOLE_WEIGHTS,
        stand_in(
            f"{_SCORES} Tests run the others with stand-ins of FSDP1 and DeepSpeed in one process, not on real shards."
        ),
    ),
    "fsdp2": yes(
        f"{_SCORES} Tests compare fits under `fully_shard` on two CPU ranks with fits under DDP; none ran on GPUs. Each rank "
        "has its own running statistics of batch norms, and a checkpoint holds those of rank 0: scores after a resume "
        "may differ in such a module."
    ),
}
_NO_GRADIENTS = no(
    "needs whole weights, and {} shards them",
    "Train with strategy='ddp' or on one device, or use a score other than grand, grand-last, vog and less",
)
_NO_PASS = no(
    "does not work with {}: its training_step also steps the optimizer, so it cannot be run just to score samples",
    "Use score='aum' or 'forgetting', keep='random', score_files, or score_fn=, which takes the module and a batch "
    "and returns the scores",
)
_BY_HAND = yes(
    '`keep="random"` without balance, the scores `aum` and `forgetting`, `score_files` and `score_fn` work. Other '
    f"scores raise, because they run the step in a scoring pass. {OWN_SCHEDULES}"
)


class DataPruning(SubsetCallback):
    r"""Score samples during training and continue with those ranked first; or only score, and find mislabeled samples.

    After ``epoch`` whole epochs, every sample of the training set is scored through the module's own
    ``training_step``, in eval mode and without side effects. Training continues with a part of them. With the
    default score, EL2N, and the default rule, the set K of kept samples is

    .. math::
        s_i = \lVert \operatorname{softmax}(f(x_i)) - \operatorname{onehot}(y_i) \rVert_2, \qquad
        K = \{i : \operatorname{rank}(s_i) \in (o n, o n + (1 - r) n]\}

    f are the logits, r is ``prune``, o is ``offset`` and n the number of samples; rank 1 is the hardest.

    ============= ========================================================================================
    score         definition (higher is harder; less: more influential)
    ============= ========================================================================================
    el2n          norm of probabilities minus one-hot label: :func:`~lightning_grad.functional.el2n`
    grand         norm of the gradient of the sample's own loss over all trained parameters
    grand-last    the same over the last layer alone, without a backward pass
    loss          the loss
    margin        minus the margin: best other logit minus the true one
    aum           minus the mean margin in the training batches of the epochs so far
    forgetting    number of changes from right to wrong in the training batches; inf if never right
    vog           variance of the input gradient of the true logit over several passes
    prototypes    distance of the last layer's input to its nearest prototype, with one per class
    less          influence on a target: cosine of the sample's step and the target's gradient
    ============= ========================================================================================

    Args:
        prune: Share of the samples to drop, at least 0 and below 1; 0 only scores them.
            A list prunes in several rounds, with each share counted from the whole set.
        score: Name of the score that ranks the samples; see the table.
        epoch: Number of whole epochs before scoring and pruning; a list for several rounds.
            Default 10 (the paper takes EL2N from 10 to 20 of 200 epochs on), and 0 with score_files.
            With select="dq", 0 is right for a pretrained network.
        keep: "hard" keeps high scores (less: influential samples), "easy" low ones, "random" is the baseline.
            "easy" is better if data is scarce (arXiv 2206.14486).
        offset: Share of the hardest samples to drop too, against wrong labels.
        balance: "class" keeps the same share of every class.
        class_floor: Minimum share of each class to keep.
        select: "top" keeps one end of the ranking, "ccs" and "dq" draw from all samples, for high rates.
            "ccs" (arXiv 2210.15809) draws over all scores. "dq" (Dataset Quantization, arXiv 2308.10524) uses no score:
            it draws evenly from bins of similar features, each of which represents the whole set
            (:func:`~lightning_grad.functional.dataset_quantization`). With balance="class", each class has its bins.
        strata: Number of bins of ccs or dq.
            Default 50 for ccs and 10 for dq, as in their released codes.
        budget: "epochs" shortens epochs and training, "steps" keeps the number of steps per epoch.
            With "steps", as in the paper, an epoch passes through the kept samples more than once.
        score_files: Score files to rank by instead of scoring; several are averaged.
        save_scores: Path of the score file (.npz). Default: next to the logs.
            With several rounds the epoch is added.
        score_fn: Callable (module, batch) -> scores of shape (B,). Use it if the loss cannot be read.
            Dotted path in YAML. It runs in eval mode and without gradients, unless it enables them.
        loss_fn: Callable (module, batch) -> losses of shape (B,), used instead of the step.
            For loss, grand, less and vog (which then uses the gradient of the loss). Its mean must equal the loss of
            the step, up to a constant.
        outputs_fn: Callable (module, batch) -> logits (B, C) and labels (B,), used instead of the step.
            For el2n, margin, aum, forgetting, grand-last, prototypes and select="dq".
        scores_by: "sample" runs the step on one sample at a time, if its loss cannot be split.
            It takes up to a batch size times as long. For loss, grand and less. The mean over the samples of a batch
            must equal the loss of the batch.
        score_dataset: Callable (trainer) -> training set without augmentation, to score it.
        loss_index: Index, from 0, of the only loss call that counts.
            By default loss and grand use the whole loss, grand-last its only call, and the others the only call that
            classifies.
        target: Callable (trainer) -> DataLoader or data set of labeled samples that less aims at.
            Default: the validation loader. A list of them, such as one for each class, keeps samples that help one
            of them. Their batches must have the form of the training batches. Dotted path in YAML.
        include: Names or wildcards of the parameters whose gradients less compares.
            Default: those of adapters (LoRA), if there are any, else all trained parameters.
        projection: Entries of a projected gradient of less, a multiple of 64; None compares exactly.
            The paper projects to 8192 entries, because it stores the gradients.
        checkpoints: Number of passes of vog (at least 2) and less, spread evenly over the epochs before.
        strict: Whether to refuse score files of another data set.
        num_shown: Number of hardest and of easiest samples in the table and figure; 0 for none.
        decode: Callable (item) -> text or image to show for an item of the data set.
            For example, it can decode token ids. Dotted path in YAML.
        figure: Whether to draw the histogram and the samples.
            It needs matplotlib and a logger with a folder.
        seed: Seed of ties, random choices and random streams while scoring.
        loader_key: Key or list position of the training loader to prune, if there are several.
        name: Name of this instance.

    Raises:
        ValueError: In the constructor for a share outside its range, an unknown name, or rounds that do not
            match. In setup for manual optimization (unless no pass is needed), a gradient score with sharded
            parameters, an epoch that is never reached, or another technique that chooses samples. After the
            first batch, which is scored as a check, if the loss cannot be read or does not suit the score.
        RuntimeError: After the first batch, if rows do not follow their samples when these are reordered. Also if the
            score needs the whole loss and only a part can be read, or two calls classify, and ``loss_index``
            does not select one.
        TypeError: If the training data has no indices (iterable data, ``in_order=False``, other keys of a sampler).
        FileNotFoundError: In setup, if a score file is missing. A score file that is damaged or belongs to
            another data set raises a ValueError before the first batch, and so does a ``save_scores`` that
            cannot be written.

    **Hooks.** The training loader gets its batch sampler in ``strategy.process_dataloader``, when it is
    complete and nothing has been drawn. ``on_train_epoch_start`` scores and prunes before the first batch of
    the epoch is drawn. ``on_train_batch_start`` reads the indices of the batch. In shorter epochs,
    ``lr_scheduler_step`` takes several steps at once for schedulers that step with every batch, so that they
    end where they should.

    **Logs** under ``data/``, at each epoch: ``kept_share``, ``samples_seen``. On scoring: a figure of the
    scores with the cut and the kept share of each class, a table and a figure of the hardest and easiest
    samples, and the score file (W&B: a version of the artifact of this data set). If predictions differ from
    labels: a table ``label_errors``, hardest first, with the suggested label, and a table ``label_pairs`` that
    counts them by label and suggested label. In the summary ``samples_share``, samples seen as a share of
    training on all samples.

    With score "less", s is the influence on a target. With passes t at learning rates :math:`\eta_t`,

    .. math::
        s_i = \max_j \frac{\sum_t \eta_t \cos(a_{tj}, \Gamma_t(g_{ti}))}{\sum_t \eta_t}

    :math:`a_{tj}` is the gradient of the mean loss on target j, and :math:`\Gamma_t` turns the gradient g of sample i
    into the direction of Adam's step with the moments of pass t. Parameters of other optimizers keep their gradient.
    So ``keep="hard"`` keeps the influential samples. LESS takes the sum over passes; the mean ranks samples the same.

    **State.** The kept samples, the scores, and the records of histories and of passes; resuming is bit-exact. With several
    ranks, only the first saves its record of the current epoch.

    **Cost.** One evaluation pass through the training set per round (grand, less: forward and backward; vog, less:
    several); see docs/benchmarks.md. A pass of less also differentiates the loss of the target, and holds a gradient of the
    compared parameters for each target, and blocks of gradients.

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
        Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning", 2024, arXiv 2402.04333 (less).
    """

    compatibility: ClassVar[Compatibility] = SubsetCallback.compatibility.but(
        compiled=COMPILED,
        weight_averaging=CURRENT_WEIGHTS,
        **_SHARDED,
        **manual(_BY_HAND),
    )
    trial: ClassVar[Mapping[str, Any]] = {"prune": 0.3, "epoch": 1}
    neutral: ClassVar[Mapping[str, Any] | str] = {"prune": 0.0}

    scored = until_next_fit[ScoredSet | None](lambda _: None)
    source = until_next_fit[ScoreSource](source_of)
    _passes = during_fit[Passes]()
    _last_round = until_next_fit[int](lambda _: -1)  # epoch
    _choice_changed = during_fit.of(bool)
    _goes_on = during_fit.of(bool)  # whether it uses the scores or records of a checkpoint
    _saved_settings = during_fit.of(dict[str, Any])  # in the checkpoint

    def __init__(
        self,
        prune: float | Sequence[float] = 0.5,
        score: Score = "el2n",
        epoch: int | Sequence[int] | None = None,
        keep: Literal["hard", "easy", "random"] = "hard",
        offset: float = 0.0,
        balance: Literal["class"] | None = None,
        class_floor: float = 0.0,
        select: Literal["top", "ccs", "dq"] = "top",
        strata: int | None = None,
        budget: Literal["epochs", "steps"] = "epochs",
        score_files: Sequence[str] | None = None,
        save_scores: str | None = None,
        score_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        score_dataset: Callable[[pl.Trainer], Any] | None = None,
        loss_index: int | None = None,
        loss_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        outputs_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        scores_by: Literal["batch", "sample"] = "batch",
        target: Callable[[pl.Trainer], Any] | None = None,
        include: Sequence[str] | None = None,
        projection: int | None = None,
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
        self.strata = None if strata is None else check_count(strata, 1, "strata")
        self.budget = budget
        self.score_files = as_names(score_files)
        self.save_scores = save_scores
        self.score_fn = score_fn
        self.score_dataset = score_dataset
        self.loss_index = check_count(loss_index, 0, "loss_index")
        self.loss_fn = loss_fn
        self.outputs_fn = outputs_fn
        self.scores_by = scores_by
        self.target = target
        self.include = as_names(include)
        self.projection = projection
        self.checkpoints = check_count(checkpoints, 1, "checkpoints")
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
    def num_strata(self) -> int:
        """Number of bins of ccs or dq."""
        return self.strata or _STRATA.get(self.select, 1)

    @property
    def _needs_no_training(self) -> bool:
        """Whether pruning may begin with the first epoch, because the choice does not depend on the module."""
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
            asked = "select='dq'" if self.select == BINS else asked
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
        if self._has_rounds_left:
            self.source.prepare(self._passes)
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
            self._passes.check_rows()  # first, because its error explains a step that fails on a single sample
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
        """Select the samples to keep after dropping a share, and print their number."""
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
            labels = labels.where(labels >= 0, labels.max() + 1)  # samples of unknown class form one extra class
        choice = {name: getattr(self, name) for name in rules.CHOICE}
        choice |= {"rule": choice.pop("select"), "strata": self.num_strata}
        return select_samples(scored.values[population], count, labels=labels, **choice)

    def _refuse_balance(self, labels: Tensor | None) -> None:
        if self.balances_classes and labels is None:
            raise ValueError(
                f"{self.display_name} balances classes, but the class of each sample is unknown. Leave balance at "
                "None and class_floor at 0."
            )

    def _say_kept(self, name: str, count: int, total: int, share: float) -> None:
        if share == 0.0:
            rank_zero_info(f"{self.display_name} has scored {total} samples by {name} and keeps them all.")
            return
        what = "Epochs get shorter, and schedules that step with every batch advance faster, to end at the same point."
        if self.passes_more_than_once:
            what = "Epochs keep their number of steps and pass through these samples more than once."
        how = f"drawn evenly from {self.num_strata} bins" if self.select == BINS else f"ranked by {name}"
        rank_zero_info(f"{self.display_name} keeps {count} of {total} samples, {how}. {what}")

    def _save(self, trainer: pl.Trainer, scored: ScoredSet) -> None:
        mark = fingerprint(self._passes.items)
        if mark.items is None and self.score_dataset is None and self.source.runs_the_step:
            rank_zero_warn(
                f"{self.display_name} scores samples that differ each time they are read, as with augmentation. Set "
                "score_dataset to a function that takes the trainer and returns the training set without augmentation."
            )
        if self._writes_scores:
            write_score_file(self, trainer, scored, mark)
