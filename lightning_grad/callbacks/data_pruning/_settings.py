"""The settings of ``DataPruning``: rounds, contradictions, and which scores a resumed fit takes from a checkpoint.

A resumed fit reuses scores that the current settings would produce, and selects the kept samples from them. It discards
scores of another kind and scores again if a round is due.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_grad.callbacks.data_pruning._measures import HISTORIES, OF_CLASSES, OF_LOSSES, ONE_BY_ONE
from lightning_grad.callbacks.data_pruning._scored import LESS
from lightning_grad.callbacks.data_pruning._sources import BINS, Chance, FileScores, refuse_offset
from lightning_grad.data.score_files import score_path
from lightning_grad.functional import RademacherProjection
from lightning_grad.utilities.arguments import plain
from lightning_grad.utilities.checks import check_count, check_only_one, check_share
from lightning_grad.utilities.reporting import counted

if TYPE_CHECKING:
    from lightning_grad.callbacks.data_pruning.data_pruning import DataPruning

_TOO_MUCH = 0.6
CHOICE = ("keep", "offset", "balance", "class_floor", "select", "strata", "seed")
Rounds = Sequence[tuple[int, float]]  # epochs, each with the share that is pruned from then on


def read_rounds(prune: float | list[float], epoch: int | list[int] | None, default: int) -> Rounds:
    """Return one or several rounds, pairs of an epoch and a share to prune.

    Raises:
        ValueError: If ``prune`` and ``epoch`` differ in length or are outside their ranges, or the epochs do
            not increase.

    Example:
        >>> read_rounds([0.2, 0.5], [5, 10], default=10), read_rounds(0.5, None, default=10)
        ([(5, 0.2), (10, 0.5)], [(10, 0.5)])
    """
    epochs = epoch if isinstance(epoch, list) else [default if epoch is None else epoch]
    shares = prune if isinstance(prune, list) else [prune] * len(epochs)
    if len(epochs) != len(shares) or not epochs or sorted(set(epochs)) != epochs:
        raise ValueError(
            f"prune must have one share for each epoch, and the epochs must increase; got epoch={epoch}, prune={prune}. "
            "Write for example epoch=[5, 10], prune=[0.2, 0.5]."
        )
    epochs = [check_count(number, 0, "epoch") for number in epochs]
    return list(zip(epochs, [check_share(share, "prune") for share in shares], strict=True))


def check_settings(settings: DataPruning) -> None:
    """Raise if settings contradict each other.

    Raises:
        ValueError: If two settings cannot be used together.
    """
    _check_file(settings.save_scores)
    _check_bins(settings)
    _check_source(settings)
    _check_functions(settings)
    _check_selection(settings)


def _check_file(path: str | None) -> None:
    try:
        if path is not None:
            score_path(path)
    except ValueError as error:
        raise ValueError(f"save_scores must be the path of a .npz file; got {path!r}. {error}") from None


def _check_bins(settings: DataPruning) -> None:
    """Raise if a setting has no effect because Dataset Quantization uses no score."""
    if settings.select != BINS:
        return
    given = {
        "score": settings.score != "el2n",
        "score_fn": settings.score_fn is not None,
        "score_files": settings.score_files is not None,
        "keep": settings.keep != "hard",
        "offset": settings.offset != 0.0,
        "class_floor": settings.class_floor != 0.0,
        "loss_fn": settings.loss_fn is not None,
        "scores_by": settings.scores_by != "batch",
        "target": settings.target is not None,
        "include": settings.include is not None,
        "projection": settings.projection is not None,
    }
    for name in (name for name, is_given in given.items() if is_given):
        raise ValueError(
            f"select='dq' draws evenly from bins of the features of the last layer, so {name} has no effect. Leave "
            f"{name} at its default, or use another select."
        )


def _check_source(settings: DataPruning) -> None:
    """Raise if the settings of the scores contradict each other."""
    score, by_function = settings.score, settings.score_fn is not None
    epochs = [epoch for epoch, _ in settings.rounds]
    _check_target(settings)
    given = {"score_fn": settings.score_fn, "score_files": settings.score_files}
    check_only_one({**given, f"score={score!r}": by_function and score != "el2n"}, "determine the scores")
    if settings.score_files and settings.keep == "random":
        raise ValueError("keep='random' ignores scores, so score_files have no effect. Set only one of the two.")
    if settings.score_files or by_function or settings.keep == "random":
        return
    if score == "vog" and settings.checkpoints < 2:
        raise ValueError(f"checkpoints must be at least 2 with score='vog'; got {settings.checkpoints}.")
    if score == "vog" and any(later - earlier < 2 for earlier, later in pairwise([0, *epochs])):
        raise ValueError(
            "score='vog' compares passes at different epochs, so it needs at least 2 epochs before each round; got "
            f"epoch={settings.epoch}. Set epoch to at least 2, with at least 2 epochs between rounds."
        )
    if score in HISTORIES and epochs[0] == 0:
        raise ValueError(f"score={score!r} is recorded during training, so epoch must be at least 1; got 0.")


def _check_target(settings: DataPruning) -> None:
    """Raise if a setting of the score "less" would have no effect, or another one would undo its choice."""
    is_used = settings.score == LESS and not settings.score_files and settings.keep != "random"
    of_less = {"target": settings.target, "include": settings.include, "projection": settings.projection}
    unused = [name for name, value in of_less.items() if value is not None]
    if unused and not is_used:
        raise ValueError(
            f"{unused[0]} works only with score='less' that ranks the samples; got score={settings.score!r}, "
            f"keep={settings.keep!r} and score_files={settings.score_files}. Leave {unused[0]} at None."
        )
    if settings.projection is not None:
        RademacherProjection(1, check_count(settings.projection, 1, "projection"))  # raises for a wrong number
    refuse_offset(is_used, settings.offset)


def _check_functions(settings: DataPruning) -> None:
    """Raise if a function that replaces the step would have no effect."""
    by_sample = settings.scores_by == "sample"
    functions = {"loss_fn": settings.loss_fn, "outputs_fn": settings.outputs_fn, "scores_by='sample'": by_sample}
    given = [name for name, value in functions.items() if value]
    others = {"loss_index": settings.loss_index, "score_fn": settings.score_fn, "score_files": settings.score_files}
    others["keep='random'"] = settings.keep == "random"
    if given:
        check_only_one({**functions, **others}, "determine how a sample is scored")
        scores = {"loss_fn": OF_LOSSES, "outputs_fn": OF_CLASSES}.get(given[0], ONE_BY_ONE)
        if settings.score not in scores:
            raise ValueError(
                f"{given[0]} works only with score={', '.join(map(repr, scores))}; got score={settings.score!r}. "
                "Use one of these scores, or set score_fn, which replaces any score."
            )


def _check_selection(settings: DataPruning) -> None:
    """Raise if the settings of the selection contradict each other."""
    least = min((share for _, share in settings.rounds if share), default=1.0)
    most = max(share for _, share in settings.rounds)
    if settings.select == "ccs" and settings.keep != "hard":
        raise ValueError(
            f"select='ccs' draws from all scores, so keep={settings.keep!r} has no effect. Leave keep at 'hard'."
        )
    if settings.class_floor and (settings.select != "top" or settings.balance is not None):
        raise ValueError(
            "class_floor works only with select='top' and balance=None, because select='ccs' and balance choose "
            "samples by rules of their own. Set class_floor to 0, or select and balance to their defaults."
        )
    if settings.class_floor and settings.class_floor >= 1.0 - most - 1e-9:  # tolerance for rounding of 1 - most
        raise ValueError(
            f"class_floor={settings.class_floor} must be below the kept share, 1 - prune; got prune={most}. Use "
            "balance='class' to keep the same share of every class."
        )
    if settings.keep == "random" and settings.offset:
        raise ValueError("offset drops the hardest samples, but keep='random' ignores scores. Leave offset at 0.")
    if settings.offset > least:
        raise ValueError(
            f"offset must be at most prune ({least}), because it is part of that share; got {settings.offset}. Set a "
            "smaller offset, or a larger prune."
        )


def warn_of_risks(callback: DataPruning, trainer: pl.Trainer) -> None:
    """Warn of rounds that are never reached, and of settings known to do worse than others."""
    epochs = [epoch for epoch, _ in callback.rounds]
    if trainer.max_epochs is not None and epochs[0] < trainer.max_epochs <= epochs[-1]:
        rank_zero_warn(
            f"{callback.display_name} has rounds that are never reached: max_epochs={trainer.max_epochs}, "
            f"epoch={callback.epoch}. Remove them, or set max_epochs higher."
        )
    # Features of a pretrained network can be used at once.
    by_score = callback.keep != "random" and callback.select != BINS
    if epochs[0] == 0 and callback.source.runs_the_step and by_score:
        rank_zero_warn(
            f"{callback.display_name}(score={callback.score!r}) scores at initialization, before the module has "
            "learned anything. Such scores agree poorly with later ones; GraNd follows the norm of the input (arXiv "
            "2303.14753). Set epoch to a few epochs of training."
        )
    most = max(share for _, share in callback.rounds)
    if most > _TOO_MUCH and not callback.source.is_influence and callback.keep == "hard" and callback.select == "top":
        rank_zero_warn(
            f"{callback.display_name} keeps only the hardest {100 * (1 - most):.0f} % of the samples. At such rates, "
            "the hardest samples alone do worse than a random choice (arXiv 2210.15809). Use select='ccs', or "
            "RepeatedRandomSubset."
        )


def score_settings(callback: DataPruning) -> list[str]:
    """Return the names of the settings on which the scores depend."""
    if isinstance(callback.source, (Chance, FileScores)):
        return ["score_files"]
    names = ["score", "score_fn", "score_dataset", "loss_index", "loss_fn", "outputs_fn", "scores_by"]
    if callback.select == BINS:
        return [*names, "strata", "balance", "seed"]
    if callback.source.name == LESS:
        return [*names, "target", "include", "projection", *(["seed"] if callback.projection else [])]
    return [*names, "seed"] if callback.source.name == "prototypes" else names


def refuse_unrecorded(callback: DataPruning, saved: Mapping[str, Any], next_epoch: int) -> None:
    """Raise if a score that is recorded over epochs cannot be recorded before the next round.

    Args:
        callback: The callback that begins to record in this fit.
        saved: The settings in the checkpoint; empty if there is none.
        next_epoch: The first epoch that will be recorded completely.

    Raises:
        ValueError: If a round comes too early.
    """
    needed = callback.source.epochs_needed
    if not needed or callback.rounds[0][0] >= next_epoch + needed:
        return
    changed = callback.changed_settings({"settings": saved}, *score_settings(callback))
    named = changed[0] if changed else "score"
    was = f" (was {saved[named]!r})" if saved else ""
    keep = "Keep the settings of the checkpoint, or set" if saved else "Set"
    raise ValueError(
        f"{callback.display_name} resumes with {named}={plain(callback.settings[named])!r}{was}, but the checkpoint "
        f"has no record for this score, which needs at least {counted(needed, 'whole epoch')} of training before a "
        f"round. {keep} epoch to {next_epoch + needed} or later; until then it trains on all samples."
    )
