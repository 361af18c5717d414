"""Noticing that the training data is not what it was: made again in mid-fit, or another one when a run resumes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from lightning_grad.data import fingerprint
from lightning_grad.data.fingerprints import Fingerprint
from lightning_grad.data.list_items import ListItems

_SAMPLES = 16  # items may be slow to read; those of score files, which travel further, are more
_WORDS = (
    "{who} knows samples by their index, and the training set {name}, {when}, holds other samples than {before}. "
    "Not the same: {what}. {advice}"
)
_RELOADED = (
    "Make the samples once, in setup or with a fixed seed, so that they stay the same, or set "
    "reload_dataloaders_every_n_epochs=0, which loads them once."
)
_RESUMED = (
    "Resume with the data of that run. To train on these, give {who} another name=: then it begins without the "
    "checkpoint's scores and choices."
)


def mark_of(dataset: Any) -> Fingerprint:
    """Return the fingerprint of a data set; of one whose items cannot be read here, its length and class.

    Random streams and the data set are left as they are: files that it opens when it is first read are opened by a copy, so
    that workers started later do not share them.
    """
    try:
        return fingerprint(_copied(dataset), _SAMPLES)
    except Exception:  # of the user's data set, which may be made to be read by workers only
        return replace(fingerprint(dataset, samples=0), items=None)


def _copied(dataset: Any) -> Any:
    try:
        other = copy.copy(dataset)
        inner = vars(other).get("dataset") if hasattr(other, "__dict__") else None
        if hasattr(inner, "__getitem__") and hasattr(inner, "__len__"):
            other.dataset = _copied(inner)
    except Exception:  # some can only be made once
        return dataset
    return other


def resume_advice(needed_by: str) -> str:
    """Return what to do about a checkpoint that knows other samples, for an error."""
    return _RESUMED.format(who=needed_by.partition("[")[0])


def refuse_other_data(known: Fingerprint, dataset: Any, needed_by: str, reloaded: bool) -> Fingerprint:
    """Raise unless a data set may be the one that is known.

    Args:
        known: The fingerprint of that.
        dataset: What is trained on now.
        needed_by: Who asks, for errors.
        reloaded: Whether it was loaded again in this fit, or else for a run that resumes.

    Returns:
        Fingerprint: Of the data set.

    Raises:
        ValueError: If they differ.
    """
    found = mark_of(dataset)
    differences = known.differences(found)
    if differences:
        name = type(dataset.dataset if isinstance(dataset, ListItems) else dataset).__name__
        raise ValueError(
            _WORDS.format(
                who=needed_by,
                name=name,
                when="loaded again" if reloaded else "in this run",
                before="at the start of the fit" if reloaded else "in the run of the checkpoint",
                what=" and ".join(differences),
                advice=_RELOADED if reloaded else resume_advice(needed_by),
            )
        )
    return found
