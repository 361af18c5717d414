"""What a resumed fit may take from a checkpoint that other settings of ``DataPruning`` have written.

Scores that the present settings would have given are used again, and the samples to keep are chosen from them. Scores of
another kind are dropped, and the round that is due is done again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_grad.callbacks.data_pruning._sources import Chance, FileScores, PrototypeScores
from lightning_grad.utilities.arguments import plain
from lightning_grad.utilities.reporting import counted

if TYPE_CHECKING:
    from lightning_grad.callbacks.data_pruning.data_pruning import DataPruning

_CHOICE = ("keep", "offset", "balance", "class_floor", "select", "strata", "seed")


def score_settings(callback: DataPruning) -> dict[str, Any]:
    """Return what the scores depend on."""
    names = ["score", "score_fn", "score_dataset", "loss"]
    if isinstance(callback._source, (Chance, FileScores)):
        names = ["score_files"]
    elif isinstance(callback._source, PrototypeScores):
        names.append("seed")
    return {"source": callback._source.name, **{name: plain(getattr(callback, name)) for name in names}}


def choice_settings(callback: DataPruning) -> dict[str, Any]:
    """Return what the choice of samples depends on, apart from the scores."""
    rounds = [[epoch, float(share)] for epoch, share in callback._rounds]
    return {"rounds": rounds, **{name: plain(getattr(callback, name)) for name in _CHOICE}}


def refuse_unrecorded(callback: DataPruning, saved: dict[str, Any] | None, next_epoch: int) -> None:
    """Raise if a score that is recorded over epochs cannot be recorded before the next round.

    Args:
        callback: Which begins to record in this fit.
        saved: What the scores in the checkpoint depend on; ``None`` if there are none.
        next_epoch: The first epoch of which every batch will be recorded.

    Raises:
        ValueError: If a round comes too early.
    """
    needed = callback._source.epochs_needed
    if not needed or min(epoch for epoch, _ in callback._rounds) >= next_epoch + needed:
        return
    now = score_settings(callback)
    changed = [name for name in now if saved is not None and name != "source" and saved.get(name) != now[name]]
    named = changed[0] if changed else "score"
    was = f" (was {saved.get(named)!r})" if saved is not None else ""
    keep = "Keep the settings of the checkpoint, or set" if saved is not None else "Set"
    raise ValueError(
        f"{callback.label} resumes with {named}={now[named]!r}{was}, and the checkpoint has no record for this score, which "
        f"takes at least {counted(needed, 'whole epoch')} of training before a round. {keep} epoch to "
        f"{next_epoch + needed} or later; until then all samples are trained on."
    )
