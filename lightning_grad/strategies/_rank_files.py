"""What each rank keeps for itself, in files beside the checkpoint.

Lightning writes one file, from rank 0. Residuals differ from rank to rank, so each rank writes its own to
``<checkpoint>.ranks/<save>/<rank>.pt``, and the checkpoint itself holds a manifest that says which save and how many
ranks. A save has a name of its own, so that a checkpoint which is written over, and interrupted, still finds the files
that belong to it. What must be equal on all ranks (counts, a message in flight) is taken from rank 0 on resuming, as
the weights are. Everything goes through the Trainer's ``CheckpointIO``.
"""

from __future__ import annotations

import os
import posixpath
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import AsyncCheckpointIO

MANIFEST_KEY = "lightning_grad_ranks"
_GRACE_SECONDS = 5.0  # for other ranks to write theirs, when an exception is under way and nobody can be waited for
_SHARED, _OWN = "shared", "own"


class RankFiles:
    """Writes and reads the state of one rank of a run.

    Args:
        label: Class whose state it is.
        run: Name of the run, the same on all ranks.
        rank: This rank.
        ranks: How many there are.
    """

    def __init__(self, label: str, run: str, rank: int, ranks: int) -> None:
        self._label, self._run, self._rank, self._ranks = label, run, rank, ranks
        self._saves = 0
        self._written: dict[str, str] = {}

    def write(self, io: CheckpointIO, path: str, own: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
        """Write the state of this rank for a checkpoint, and return the manifest for it.

        Args:
            io: The Trainer's. One that writes later is asked for the one inside it, which does so at once: a checkpoint must
                not be there before its rank files.
            path: Of the checkpoint.
            own: What is this rank's.
            shared: What is the same on all.
        """
        self._saves += 1
        save = f"{self._run}-{self._saves}"
        at_once = io.checkpoint_io if isinstance(io, AsyncCheckpointIO) else io
        assert at_once is not None
        at_once.save_checkpoint({_OWN: dict(own), _SHARED: dict(shared)}, _file(_folder(path), save, self._rank))
        return {
            "strategy": self._label,
            "ranks": self._ranks,
            "save": save,
            "folder": posixpath.basename(_folder(path)),
        }

    def are_complete(self, path: str, manifest: Mapping[str, Any]) -> bool:
        """Wait a little for the files of all ranks, and say whether they are there."""
        filesystem, end = get_filesystem(path), time.monotonic() + _GRACE_SECONDS
        files = [_file(_folder(path), manifest["save"], rank) for rank in range(self._ranks)]
        while not all(map(filesystem.exists, files)):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def forget_earlier(self, io: CheckpointIO, path: str, manifest: Mapping[str, Any]) -> None:
        """Remove the rank files of earlier saves to the same path, once the checkpoint is there."""
        before, self._written[path] = self._written.get(path), manifest["save"]
        is_late = isinstance(io, AsyncCheckpointIO)  # the checkpoint of before may still be there
        _remove_others(path, {manifest["save"], before if is_late else None})

    def remove(self, path: str) -> None:
        """Remove all rank files of a checkpoint, if it has any."""
        self._written.pop(path, None)
        filesystem, folder = get_filesystem(path), _folder(path)
        if filesystem.exists(folder):
            filesystem.rm(folder, recursive=True)

    def find(self, path: str, manifest: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Return the files of all ranks that belong to a checkpoint, and those of them that are missing.

        They are looked for beside the checkpoint as it is named now, then under the name with which it was written: a copy of
        it or a link to it (``save_last="link"``) has no folder of its own.
        """
        filesystem, folder = get_filesystem(path), _folder(path)
        beside = posixpath.join(posixpath.dirname(folder), manifest["folder"])
        found = []
        for candidate in dict.fromkeys((beside, folder, _folder(_resolved(path)))):
            files = [_file(candidate, manifest["save"], rank) for rank in range(manifest["ranks"])]
            found.append((files, [file for file in files if not filesystem.exists(file)]))
        return min(found, key=lambda pair: len(pair[1]))

    def read(
        self, io: CheckpointIO, path: str, manifest: Mapping[str, Any], policy: str
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return what this rank goes on with, its own and the shared part, or ``None`` to begin empty.

        Args:
            io: The Trainer's.
            path: From where the checkpoint was loaded.
            manifest: From the checkpoint.
            policy: 'strict', 'mean' or 'reset'.

        Raises:
            FileNotFoundError: If files are missing, unless the policy is 'reset'; every rank finds the same and raises.
            ValueError: If the number of ranks has changed, with policy 'strict'.
        """
        (files, missing), before = self.find(path, manifest), manifest["ranks"]
        if missing and policy != "reset":
            raise FileNotFoundError(
                f"{self._label} cannot resume from {path}: {len(missing)} of the {before} files with what each rank has not "
                f"sent yet are missing, {missing[0]} first. Copy {manifest['folder']} along with the checkpoint, or set "
                "residual_policy='reset' to go on without them (some gradient is lost)."
            )
        if before != self._ranks and policy == "strict":
            raise ValueError(
                f"{self._label} resumes on {self._ranks} rank(s) what was saved on {before}. Each rank holds gradient that it "
                "has not sent: set residual_policy='mean' to spread it over the new ranks, or 'reset' to drop it."
            )
        if missing or (before != self._ranks and policy == "reset"):
            return None
        first = io.load_checkpoint(files[0], weights_only=True)
        if before == self._ranks:
            mine = first if self._rank == 0 else io.load_checkpoint(files[self._rank], weights_only=True)
            return mine[_OWN], first[_SHARED]
        others = (io.load_checkpoint(file, weights_only=True)[_OWN] for file in files[1:])
        return _mean(first[_OWN], others, before), first[_SHARED]


def _mean(first: dict[str, Any], others: Iterator[dict[str, Any]], ranks: int) -> dict[str, Any]:
    """Return a state with the mean of all memories, so that the mean over ranks stays what it was."""
    for state in others:
        for name, kept in state["memory"].items():
            for key, value in kept.items():
                first["memory"][name][key] += value
    for kept in first["memory"].values():
        for value in kept.values():
            value.div_(ranks)
    return first


def _remove_others(path: str, kept: Collection[str | None]) -> None:
    filesystem, folder = get_filesystem(path), _folder(path)
    for entry in filesystem.ls(folder, detail=False):
        if posixpath.basename(_with_slashes(str(entry)).rstrip("/")) not in kept:
            filesystem.rm(entry, recursive=True)


def _folder(path: str) -> str:
    return f"{_with_slashes(path)}.ranks"


def _file(folder: str, save: str, rank: int) -> str:
    return posixpath.join(folder, save, f"{rank}.pt")


def _with_slashes(path: str) -> str:
    return path.replace("\\", "/")


def _resolved(path: str) -> str:
    return path if "://" in path else os.path.realpath(path)
