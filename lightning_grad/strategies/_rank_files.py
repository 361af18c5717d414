"""What each rank keeps for itself, in files next to the checkpoint.

Lightning writes one file, from rank 0. Residuals differ from rank to rank, so each rank writes its own to
``<checkpoint>.ranks/<save>/<rank>.pt``, and the checkpoint itself holds a manifest that says which save and how many
ranks. A save has a name of its own, so that a checkpoint which is written over, and interrupted, still finds the files
that belong to it. Each file carries its identity (see ``_rank_identity.py``), which is compared when it is read. What must
be equal on all ranks (counts, a message in flight) is taken from rank 0 on resuming, as the weights are. Everything goes
through the Trainer's ``CheckpointIO``.
"""

import os
import posixpath
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_grad.strategies._rank_identity import IDENTITY, OWN, SHARED, Parameters, identity_of, misfit

MANIFEST_KEY = "lightning_grad_ranks"
_GRACE_SECONDS = 5.0  # for other ranks to write theirs, when an exception is under way and nobody can be waited for

_MISSING, _OTHER_RANKS, _UNUSABLE = "missing", "other ranks", "unusable"
_RESET = "set residual_policy='reset' to continue without the rank files (the gradient that was not sent is lost)."
_WAYS_OUT = {
    _MISSING: f"Copy {{folder}} along with the checkpoint, or {_RESET}",
    _OTHER_RANKS: "Each rank holds gradient that it has not sent: set residual_policy='mean' to spread it over the new ranks, "
    "or 'reset' to drop it.",
    _UNUSABLE: f"Put the right file back, resume from another checkpoint, or {_RESET}",
}

State = tuple[dict[str, Any], dict[str, Any]]  # a rank's own, and what is shared
Problem = tuple[str, str]  # of one of the kinds in _WAYS_OUT, in words
Agree = Callable[[Problem | None], Problem | None]


class UnusableFileError(Exception):
    """A rank file that cannot be read, or is not the one that the checkpoint means."""


class RankFiles:
    """Writes and reads the state of one rank of a run.

    Args:
        display_name: Class whose state it is.
        run: Name of the run, the same on all ranks.
        rank: This rank.
        ranks: How many there are.
    """

    def __init__(self, display_name: str, run: str, rank: int, ranks: int) -> None:
        self._display_name, self._run, self._rank, self._ranks = display_name, run, rank, ranks
        self._saves = 0
        self._written: dict[str, str] = {}

    def write(self, io: CheckpointIO, path: str, state: State, parameters: Parameters) -> dict[str, Any]:
        """Write the state of this rank for a checkpoint, and return the manifest for it.

        Args:
            io: The Trainer's. One that writes later is asked for the one inside it, which does so at once: a checkpoint must
                not be there before its rank files.
            path: Of the checkpoint.
            state: What is this rank's, and what is the same on all.
            parameters: Of the module.
        """
        self._saves += 1
        save = f"{self._run}-{self._saves}"
        folder = posixpath.basename(_folder(path))
        manifest = {"strategy": self._display_name, "ranks": self._ranks, "save": save, "folder": folder}
        identity = identity_of(manifest, self._rank, state[0]["memory"], parameters)
        content = {IDENTITY: identity, OWN: dict(state[0]), SHARED: dict(state[1])}
        at_once = io.checkpoint_io if isinstance(io, AsyncCheckpointIO) else io
        assert at_once is not None
        at_once.save_checkpoint(content, _file(_folder(path), save, self._rank))
        return manifest

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
        kept, filesystem = {manifest["save"], before if is_late else None}, get_filesystem(path)
        for save in _saves(path, _folder(path)):
            if save not in kept:
                filesystem.rm(posixpath.join(_folder(path), save), recursive=True)

    def remove(self, path: str) -> None:
        """Remove all rank files of a checkpoint, if it has any."""
        self._written.pop(path, None)
        filesystem, folder = get_filesystem(path), _folder(path)
        if filesystem.exists(folder):
            filesystem.rm(folder, recursive=True)

    def find(self, path: str, manifest: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Return the files of all ranks that belong to a checkpoint, and those of them that are missing.

        They are looked for next to the checkpoint as it is named now, then under the name with which it was written: a copy of
        it or a link to it (``save_last="link"``) has no folder of its own.
        """
        filesystem = get_filesystem(path)
        found = []
        for folder in _candidates(path, manifest):
            files = [_file(folder, manifest["save"], rank) for rank in range(manifest["ranks"])]
            found.append((files, [file for file in files if not filesystem.exists(file)]))
        return min(found, key=lambda pair: len(pair[1]))

    def read(
        self, io: CheckpointIO, path: str, manifest: Mapping[str, Any], policy: str, layouts: Parameters, agree: Agree
    ) -> tuple[State | None, str]:
        """Return the state with which this rank continues, or ``None`` to begin empty, and why it is ``None``.

        Args:
            io: The Trainer's.
            path: From where the checkpoint was loaded.
            manifest: From the checkpoint.
            policy: 'strict', 'mean' or 'reset'.
            layouts: Of the parameters of the module.
            agree: Returns the first problem of any rank, so that all raise the same or begin empty together.

        Raises:
            FileNotFoundError: If files are missing, unless the policy is 'reset'.
            ValueError: If a file cannot be read, or is not the one that the checkpoint means, unless the policy is 'reset'; if
                the number of ranks has changed, with policy 'strict'.
        """
        (files, missing), before = self.find(path, manifest), manifest["ranks"]
        state: State | None = None
        problem = self._problem_of_missing(path, manifest, missing)
        if problem is None and before != self._ranks and policy != "mean":
            problem = _OTHER_RANKS, f"it would continue on {self._ranks} rank(s) what was saved on {before}"
        if problem is None:
            try:
                state = self._load(io, files, manifest, layouts)
            except UnusableFileError as error:
                problem = (_UNUSABLE, str(error))
        problem = agree(problem)
        if problem is None:
            return state, ""
        kind, text = problem
        if policy == "reset":
            return None, text
        error_class = FileNotFoundError if kind == _MISSING else ValueError
        way_out = _WAYS_OUT[kind].format(folder=manifest["folder"])
        raise error_class(f"{self._display_name} cannot resume from {path}: {text}. {way_out}")

    def _problem_of_missing(self, path: str, manifest: Mapping[str, Any], missing: list[str]) -> Problem | None:
        if not missing:
            return None
        few = f"{len(missing)} of the {manifest['ranks']} files"
        text = f"{few} with what each rank has not sent yet are missing, {missing[0]} first"
        others = {save for folder in _candidates(path, manifest) for save in _saves(path, folder)} - {manifest["save"]}
        if others:
            text += f" (next to it are files of other checkpoints: save {', '.join(sorted(others))})"
        return _MISSING, text

    def _load(self, io: CheckpointIO, files: list[str], manifest: Mapping[str, Any], parameters: Parameters) -> State:
        def load(rank: int) -> dict[str, Any]:
            return _load(io, files[rank], rank, manifest, parameters)

        first = load(0)
        if manifest["ranks"] == self._ranks:
            mine = first if self._rank == 0 else load(self._rank)
            return mine[OWN], first[SHARED]
        return _mean(first[OWN], (load(rank)[OWN] for rank in range(1, len(files))), len(files)), first[SHARED]


def _load(io: CheckpointIO, file: str, rank: int, manifest: Mapping[str, Any], layouts: Parameters) -> dict[str, Any]:
    try:
        content = io.load_checkpoint(file, weights_only=True)
    except Exception as error:  # torn, empty or of another kind: each reader has errors of its own for them
        reason = " ".join(str(error).split())[:200]
        raise UnusableFileError(
            f"the rank file {file} cannot be read ({type(error).__name__}{f': {reason}' if reason else ''})"
        ) from error
    wrong = misfit(content, manifest, rank, layouts)
    if wrong:
        raise UnusableFileError(f"the rank file {file} {wrong}")
    return dict(content)


def _mean(first: dict[str, Any], others: Iterator[dict[str, Any]], ranks: int) -> dict[str, Any]:
    """Return a state with the mean of all memories, so that the mean over ranks stays what it was."""
    for state in others:
        for name, kept in state["memory"].items():
            for key, value in kept.items():
                mine = first["memory"].setdefault(name, {})
                mine[key] = mine[key].add_(value) if key in mine else value
    for kept in first["memory"].values():
        for value in kept.values():
            value.div_(ranks)
    return first


def _saves(path: str, folder: str) -> list[str]:
    filesystem = get_filesystem(path)
    entries = filesystem.ls(folder, detail=False) if filesystem.exists(folder) else []
    return [posixpath.basename(_with_slashes(str(entry)).rstrip("/")) for entry in entries]


def _candidates(path: str, manifest: Mapping[str, Any]) -> list[str]:
    folder = _folder(path)
    written = posixpath.join(posixpath.dirname(folder), manifest["folder"])
    resolved = path if "://" in path else os.path.realpath(path)
    return list(dict.fromkeys((written, folder, _folder(resolved))))


def _folder(path: str) -> str:
    return f"{_with_slashes(path)}.ranks"


def _file(folder: str, save: str, rank: int) -> str:
    return posixpath.join(folder, save, f"{rank}.pt")


def _with_slashes(path: str) -> str:
    return path.replace("\\", "/")
