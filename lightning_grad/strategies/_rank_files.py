"""Saves the state of each rank in files next to the checkpoint.

Lightning writes one file, from rank 0. Residuals differ between ranks, so each rank writes its own to
``<checkpoint>.ranks/<save>/<rank>.pt``, and the checkpoint holds a manifest with the save and the number of ranks.
Each save has its own name: if overwriting a checkpoint is interrupted, the old checkpoint still finds its files. Each
file carries its identity (see ``_rank_identity.py``), which is checked when it is read. On resuming, state that must
be equal on all ranks (counts, a message in flight) comes from rank 0, as the weights do. All files are read and
written through the Trainer's ``CheckpointIO``.
"""

import os
import posixpath
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor

from lightning_grad.strategies._rank_identity import IDENTITY, OWN, SHARED, Parameters, identity_of, misfit

MANIFEST_KEY = "lightning_grad_ranks"
_GRACE_SECONDS = 5.0  # time for other ranks to write their files after an exception, when there is no barrier

_MISSING, _OTHER_RANKS, _UNUSABLE = "missing", "other ranks", "unusable"
_RESET = "set residual_policy='reset' to continue without the rank files ({kept} are lost)."
_WAYS_OUT = {
    _MISSING: f"Copy {{folder}} along with the checkpoint, or {_RESET}",
    _OTHER_RANKS: "Each rank has {kept}: set residual_policy='mean' to spread them over the new ranks, "
    "or 'reset' to drop them.",
    _UNUSABLE: f"Put the right file back, resume from another checkpoint, or {_RESET}",
}

State = tuple[dict[str, Any], dict[str, Any]]  # state of this rank, and state shared by all ranks
Problem = tuple[str, str]  # a key of _WAYS_OUT, and a description
Agree = Callable[[Problem | None], Problem | None]


class UnusableFileError(Exception):
    """A rank file cannot be read or does not belong to the checkpoint."""


class RankFiles:
    """Writes and reads the state of one rank of a run.

    Args:
        display_name: Name of the strategy.
        run: Name of the run, the same on all ranks.
        rank: This rank.
        ranks: Number of ranks.
        kept: What a rank keeps, in the plural, for messages.
    """

    def __init__(self, display_name: str, run: str, rank: int, ranks: int, kept: str) -> None:
        self._display_name, self._run, self._rank, self._ranks = display_name, run, rank, ranks
        self._kept = kept
        self._saves = 0
        self._written: dict[str, str] = {}

    def write(self, io: CheckpointIO, path: str, state: State, parameters: Parameters) -> dict[str, Any]:
        """Write the state of this rank for a checkpoint and return the manifest.

        Args:
            io: The Trainer's ``CheckpointIO``. An asynchronous one is bypassed in favor of the one it wraps: the rank
                files must exist before the checkpoint does.
            path: Path of the checkpoint.
            state: State of this rank, and state shared by all ranks.
            parameters: Layouts of the module's parameters.
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
        """Wait up to five seconds for the files of all ranks and return whether they exist."""
        filesystem, end = get_filesystem(path), time.monotonic() + _GRACE_SECONDS
        files = [_file(_folder(path), manifest["save"], rank) for rank in range(self._ranks)]
        while not all(map(filesystem.exists, files)):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def remove_earlier(self, io: CheckpointIO, path: str, manifest: Mapping[str, Any]) -> None:
        """Remove the rank files of earlier saves to the same path, once the new checkpoint exists."""
        before, self._written[path] = self._written.get(path), manifest["save"]
        is_late = isinstance(io, AsyncCheckpointIO)  # the old checkpoint may still be in place
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
        """Return the files of all ranks that belong to a checkpoint, and which of them are missing.

        Searches next to the checkpoint's present path, then under the name with which it was written: a copied or
        linked checkpoint (``save_last="link"``) has no folder of its own.
        """
        filesystem = get_filesystem(path)
        found = []
        for folder in _candidates(path, manifest):
            files = [_file(folder, manifest["save"], rank) for rank in range(manifest["ranks"])]
            found.append((files, [file for file in files if not filesystem.exists(file)]))
        return min(found, key=lambda pair: len(pair[1]))

    def read(
        self,
        io: CheckpointIO,
        path: str,
        manifest: Mapping[str, Any],
        policy: str,
        layouts: Parameters,
        agree: Agree,
        weights_only: bool = True,
    ) -> tuple[State | None, str]:
        """Return the state with which this rank continues, or ``None`` to start empty and the reason.

        Args:
            io: The Trainer's ``CheckpointIO``.
            path: Path from which the checkpoint was loaded.
            manifest: Manifest in the checkpoint.
            policy: 'strict', 'mean' or 'reset'.
            layouts: Layouts of the module's parameters.
            agree: Returns the first problem of any rank, so that all ranks raise the same error or all start empty.
            weights_only: Whether the checkpoint itself was loaded with ``weights_only``. A file may contain states of
                optimizers and callbacks, which can be any objects.

        Raises:
            FileNotFoundError: If files are missing, unless the policy is 'reset'.
            ValueError: If a file cannot be read or belongs to another checkpoint, unless the policy is 'reset'; if
                the number of ranks has changed and the policy is 'strict'.
        """
        (files, missing), before = self.find(path, manifest), manifest["ranks"]
        state: State | None = None
        problem = self._problem_of_missing(path, manifest, missing)
        if problem is None and before != self._ranks and policy != "mean":
            problem = _OTHER_RANKS, f"it was saved on {before} rank(s), and this run has {self._ranks}"
        if problem is None:
            try:
                state = self._load(io, files, manifest, layouts, weights_only)
            except UnusableFileError as error:
                problem = (_UNUSABLE, str(error))
        problem = agree(problem)
        if problem is None:
            return state, ""
        kind, text = problem
        if policy == "reset":
            return None, text
        error_class = FileNotFoundError if kind == _MISSING else ValueError
        way_out = _WAYS_OUT[kind].format(folder=manifest["folder"], kept=self._kept)
        raise error_class(f"{self._display_name} cannot resume from {path}: {text}. {way_out}")

    def _problem_of_missing(self, path: str, manifest: Mapping[str, Any], missing: list[str]) -> Problem | None:
        if not missing:
            return None
        few = f"{len(missing)} of the {manifest['ranks']} files"
        text = f"{few} with the {self._kept} are missing, the first is {missing[0]}"
        others = {save for folder in _candidates(path, manifest) for save in _saves(path, folder)} - {manifest["save"]}
        if others:
            text += f" (found files of other checkpoints next to it: save {', '.join(sorted(others))})"
        return _MISSING, text

    def _load(
        self,
        io: CheckpointIO,
        files: list[str],
        manifest: Mapping[str, Any],
        parameters: Parameters,
        weights_only: bool,
    ) -> State:
        def load(rank: int) -> dict[str, Any]:
            return _load(io, files[rank], rank, manifest, parameters, weights_only)

        first = load(0)
        if manifest["ranks"] == self._ranks:
            mine = first if self._rank == 0 else load(self._rank)
            return mine[OWN], first[SHARED]
        return _mean(first[OWN], (load(rank)[OWN] for rank in range(1, len(files))), len(files)), first[SHARED]


def _load(
    io: CheckpointIO, file: str, rank: int, manifest: Mapping[str, Any], layouts: Parameters, weights_only: bool
) -> dict[str, Any]:
    try:
        content = io.load_checkpoint(file, weights_only=weights_only)
    except Exception as error:  # each CheckpointIO raises its own errors for truncated, empty or foreign files
        reason = " ".join(str(error).split())[:200]
        raise UnusableFileError(
            f"the rank file {file} cannot be read ({type(error).__name__}{f': {reason}' if reason else ''})"
        ) from error
    wrong = misfit(content, manifest, rank, layouts)
    if wrong:
        raise UnusableFileError(f"the rank file {file} {wrong}")
    return dict(content)


def _mean(first: dict[str, Any], others: Iterator[dict[str, Any]], ranks: int) -> dict[str, Any]:
    """Return a state whose float tensors are the mean over all ranks; everything else is the first rank's.

    The sum of unsent gradients stays the same in the mean. A parameter may have a memory on some ranks only.
    """
    for state in others:
        _add(first, state)
    _divide(first, ranks)
    return first


def _add(sums: Any, state: Any) -> None:
    if isinstance(sums, dict):
        for key, value in state.items():
            if key not in sums:
                sums[key] = value
            elif _is_float(value):
                sums[key].add_(value)
            else:
                _add(sums[key], value)
    elif isinstance(sums, list):
        for one, other in zip(sums, state, strict=False):
            _add(one, other)


def _divide(state: Any, ranks: int) -> None:
    for value in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
        if _is_float(value):
            value.div_(ranks)
        else:
            _divide(value, ranks)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


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
