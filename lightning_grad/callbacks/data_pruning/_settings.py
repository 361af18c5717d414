"""The settings of ``DataPruning``: its rounds, what contradicts itself, and what a resumed fit may take from a checkpoint.

Scores that the present settings would give are used again, and the samples to keep are chosen from them. Scores of
another kind are dropped, and the round that is due is done again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_grad.callbacks.data_pruning._measures import HISTORIES, OF_CLASSES, OF_LOSSES, ONE_BY_ONE
from lightning_grad.callbacks.data_pruning._sources import Chance, FileScores
from lightning_grad.data.score_files import score_path
from lightning_grad.utilities.arguments import plain
from lightning_grad.utilities.checks import check_count, check_only_one, check_share
from lightning_grad.utilities.reporting import counted

if TYPE_CHECKING:
    from lightning_grad.callbacks.data_pruning.data_pruning import DataPruning

_TOO_MUCH = 0.6
CHOICE = ("keep", "offset", "balance", "class_floor", "select", "strata", "seed")
Rounds = Sequence[tuple[int, float]]  # epochs, each with the share left out from then on


def read_rounds(prune: float | list[float], epoch: int | list[int] | None, default: int) -> Rounds:
    """Return the rounds that ``prune`` and ``epoch`` stand for, one or several.

    Raises:
        ValueError: If they do not fit, or are outside their ranges.

    Example:
        >>> read_rounds([0.2, 0.5], [5, 10], default=10), read_rounds(0.5, None, default=10)
        ([(5, 0.2), (10, 0.5)], [(10, 0.5)])
    """
    epochs = epoch if isinstance(epoch, list) else [default if epoch is None else epoch]
    shares = prune if isinstance(prune, list) else [prune] * len(epochs)
    if len(epochs) != len(shares) or not epochs or sorted(set(epochs)) != epochs:
        raise ValueError(
            f"prune must have one share for each epoch, and epochs that rise; got epoch={epoch}, prune={prune}. Write for "
            "example epoch=[5, 10], prune=[0.2, 0.5]."
        )
    epochs = [check_count(number, 0, "epoch") for number in epochs]
    return list(zip(epochs, [check_share(share, "prune") for share in shares], strict=True))


def check_settings(settings: DataPruning) -> None:
    """Raise unless the settings are possible together.

    Raises:
        ValueError: If they are not.
    """
    _check_file(settings.save_scores)
    _check_source(settings)
    _check_functions(settings)
    _check_selection(settings)


def _check_file(path: str | None) -> None:
    try:
        if path is not None:
            score_path(path)
    except ValueError as error:
        raise ValueError(f"save_scores must name a .npz file to write; got {path!r}. {error}") from None


def _check_source(settings: DataPruning) -> None:
    score, by_function = settings.score, settings.score_fn is not None
    epochs = [epoch for epoch, _ in settings.rounds]
    given = {"score_fn": settings.score_fn, "score_files": settings.score_files}
    check_only_one({**given, f"score={score!r}": by_function and score != "el2n"}, "give the scores")
    if settings.score_files and settings.keep == "random":
        raise ValueError("keep='random' looks at no score, so that score_files mean nothing. Leave one of them out.")
    if settings.score_files or by_function or settings.keep == "random":
        return
    if score == "vog" and any(later - earlier < 2 for earlier, later in pairwise([0, *epochs])):
        raise ValueError(
            "score='vog' compares passes at different epochs, so each round needs at least 2 before it; got "
            f"{settings.epoch}. Set epoch to at least 2, with 2 or more between rounds."
        )
    if score in HISTORIES and epochs[0] == 0:
        raise ValueError(f"score={score!r} is recorded while training, so epoch must be at least 1; got 0.")


def _check_functions(settings: DataPruning) -> None:
    """Refuse functions in place of the step where they would not be asked."""
    by_sample = settings.scores_by == "sample"
    functions = {"loss_fn": settings.loss_fn, "outputs_fn": settings.outputs_fn, "scores_by='sample'": by_sample}
    given = [name for name, value in functions.items() if value]
    others = {"loss_index": settings.loss_index, "score_fn": settings.score_fn, "score_files": settings.score_files}
    others["keep='random'"] = settings.keep == "random"
    if given:
        check_only_one({**functions, **others}, "say what a sample is scored by")
        scores = {"loss_fn": OF_LOSSES, "outputs_fn": OF_CLASSES}.get(given[0], ONE_BY_ONE)
        if settings.score not in scores:
            raise ValueError(
                f"{given[0]} goes with score={', '.join(map(repr, scores))}; got score={settings.score!r}. "
                "score_fn= takes the place of any score."
            )


def _check_selection(settings: DataPruning) -> None:
    least = min((share for _, share in settings.rounds if share), default=1.0)
    most = max(share for _, share in settings.rounds)
    if settings.select == "ccs" and settings.keep != "hard":
        raise ValueError(
            f"select='ccs' draws from all scores, so keep={settings.keep!r} means nothing. Leave keep at 'hard'."
        )
    if settings.class_floor and (settings.select != "top" or settings.balance is not None):
        raise ValueError(
            "class_floor goes with select='top' and without balance, which has a rule of its own. Leave class_floor out, or "
            "the others."
        )
    if settings.class_floor and settings.class_floor >= 1.0 - most - 1e-9:  # a rounding away from what is left of all
        raise ValueError(
            f"class_floor={settings.class_floor} of each class leaves no choice with prune={most}. Use balance='class', which "
            "keeps the same share of every class."
        )
    if settings.keep == "random" and settings.offset:
        raise ValueError("offset leaves out the hardest, and keep='random' looks at no score. Leave offset at 0.")
    if settings.offset > least:
        raise ValueError(f"offset is part of what prune leaves out, so at most {least}; got {settings.offset}.")


def warn_of_risks(callback: DataPruning, trainer: pl.Trainer) -> None:
    """Warn of rounds that never come, and of settings that are possible, and known to do worse than others."""
    epochs = [epoch for epoch, _ in callback.rounds]
    if trainer.max_epochs is not None and epochs[0] < trainer.max_epochs <= epochs[-1]:
        rank_zero_warn(
            f"{callback.display_name} has rounds that never come: max_epochs={trainer.max_epochs}, "
            f"epoch={callback.epoch}. Leave them out, or set max_epochs higher."
        )
    if epochs[0] == 0 and callback.source.runs_the_step and callback.keep != "random":
        rank_zero_warn(
            f"{callback.display_name}(score={callback.score!r}) scores at initialisation, before the module has learnt "
            "anything. Scores taken there hardly agree with later ones; GraNd follows the norm of the input (arXiv "
            "2303.14753). Set epoch to some epochs of training."
        )
    most = max(share for _, share in callback.rounds)
    if most > _TOO_MUCH and callback.keep == "hard" and callback.select == "top":
        rank_zero_warn(
            f"{callback.display_name} keeps only the hardest {100 * (1 - most):.0f} % of the samples. At such rates the "
            "hardest alone do worse than a random choice (arXiv 2210.15809): use select='ccs', or RepeatedRandomSubset."
        )


def score_settings(callback: DataPruning) -> list[str]:
    """Return the names of the settings on which the scores depend."""
    if isinstance(callback.source, (Chance, FileScores)):
        return ["score_files"]
    names = ["score", "score_fn", "score_dataset", "loss_index", "loss_fn", "outputs_fn", "scores_by"]
    return [*names, "seed"] if callback.source.name == "prototypes" else names


def refuse_unrecorded(callback: DataPruning, saved: Mapping[str, Any], next_epoch: int) -> None:
    """Raise if a score that is recorded over epochs cannot be recorded before the next round.

    Args:
        callback: Which begins to record in this fit.
        saved: The settings in the checkpoint; empty if there is none.
        next_epoch: The first epoch of which every batch will be recorded.

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
        f"{callback.display_name} resumes with {named}={plain(callback.settings[named])!r}{was}, and the checkpoint has "
        f"no record for this score, which takes at least {counted(needed, 'whole epoch')} of training before a round. "
        f"{keep} epoch to {next_epoch + needed} or later; until then all samples are trained on."
    )
