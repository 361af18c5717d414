"""What each rank keeps for itself, in files beside the checkpoint.

Lightning writes one file, from rank 0. Residuals differ from rank to rank, so each rank writes its own to
``<checkpoint>.ranks/<save>/<rank>.pt``, and the checkpoint itself holds a manifest that says which save and how many ranks.
A save has a name of its own, so that a checkpoint which is written over, and interrupted, still finds the files that belong
to it. Everything goes through the Trainer's ``CheckpointIO``.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

MANIFEST_KEY = "lightning_grad_ranks"


def make_manifest(path: str, save: str, strategy: str, ranks: int) -> dict[str, Any]:
    """Return what the checkpoint says about its rank files.

    Args:
        path: Of the checkpoint.
        save: Name of this save.
        strategy: Class whose state it is.
        ranks: How many files there are.
    """
    return {"strategy": strategy, "ranks": ranks, "save": save, "folder": posixpath.basename(folder_of(path))}


def folder_of(path: str) -> str:
    """Return the folder of a checkpoint's rank files."""
    return f"{_with_slashes(path)}.ranks"


def rank_file(folder: str, save: str, rank: int) -> str:
    """Return where a rank writes."""
    return posixpath.join(folder, save, f"{rank}.pt")


def find_rank_files(path: str, manifest: Mapping[str, Any], technique: str) -> list[str]:
    """Return the files of all ranks that belong to a checkpoint.

    They are looked for beside the checkpoint as it is named now, then under the name with which it was written: a copy of the
    checkpoint or a link to it (``save_last="link"``) has no folder of its own.

    Args:
        path: From where the checkpoint was loaded.
        manifest: From the checkpoint.
        technique: Who asks, for the error.

    Raises:
        FileNotFoundError: If some are missing; every rank finds the same and raises.
    """
    filesystem, folder = get_filesystem(path), folder_of(path)
    beside = posixpath.join(posixpath.dirname(folder), manifest["folder"])
    for candidate in dict.fromkeys((folder, beside, folder_of(_resolved(path)))):
        files = [rank_file(candidate, manifest["save"], rank) for rank in range(manifest["ranks"])]
        missing = [file for file in files if not filesystem.exists(file)]
        if not missing:
            return files
        if len(missing) < len(files):
            break
    else:
        candidate, missing = folder, [rank_file(folder, manifest["save"], rank) for rank in range(manifest["ranks"])]
    raise FileNotFoundError(
        f"{technique} cannot resume from {path}: {len(missing)} of the {manifest['ranks']} files with what each rank has "
        f"not sent yet are missing, {missing[0]} first. Copy {posixpath.basename(candidate)} along with the checkpoint, "
        "or set residual_policy='reset' to go on without them (some gradient is lost)."
    )


def remove_other_saves(path: str, kept: Collection[str | None]) -> None:
    """Remove the rank files of saves to the same path, but for some."""
    filesystem, folder = get_filesystem(path), folder_of(path)
    if not filesystem.exists(folder):  # nothing is written yet
        return
    for entry in filesystem.ls(folder, detail=False):
        if posixpath.basename(_with_slashes(str(entry)).rstrip("/")) not in kept:
            filesystem.rm(entry, recursive=True)


def remove_rank_files(path: str) -> None:
    """Remove all rank files of a checkpoint, if it has any."""
    filesystem, folder = get_filesystem(path), folder_of(path)
    if filesystem.exists(folder):
        filesystem.rm(folder, recursive=True)


def read_state(
    io: CheckpointIO, files: list[str], rank: int, ranks: int, technique: str, policy: str
) -> dict[str, Any]:
    """Return what a rank goes on with: its own state, or the mean of all if their number has changed.

    Args:
        io: What wrote the files.
        files: Of all ranks of the saved run.
        rank: Of this run.
        ranks: Of this run.
        technique: Who asks, for the error.
        policy: 'strict' or 'mean'.

    Raises:
        ValueError: If the number of ranks has changed, with policy 'strict'.
    """
    if len(files) == ranks:
        return io.load_checkpoint(files[rank], weights_only=True)
    if policy == "strict":
        raise ValueError(
            f"{technique} resumes on {ranks} rank(s) what was saved on {len(files)}. Each rank holds gradient that it has "
            "not sent: set residual_policy='mean' to spread it over the new ranks, or 'reset' to drop it."
        )
    return _mean_state(io.load_checkpoint(file, weights_only=True) for file in files)


def _mean_state(states: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Return the first rank's state with the mean of all memories, so that the mean over ranks stays what it was."""
    mean, count = next(states), 1
    for state in states:
        count += 1
        for name, kept in state["memory"].items():
            for key, value in kept.items():
                mean["memory"][name][key] += value
    for kept in mean["memory"].values():
        for value in kept.values():
            value.div_(count)
    return mean


def _with_slashes(path: str) -> str:
    return path.replace("\\", "/")


def _resolved(path: str) -> str:
    return path if "://" in path else os.path.realpath(path)
