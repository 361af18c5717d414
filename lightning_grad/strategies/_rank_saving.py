"""DDP that also saves what each rank keeps for itself. Used by ``compressed_ddp.py``; the files are ``_rank_files.py``'s."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_grad.strategies._rank_files import MANIFEST_KEY, RankFiles

ResidualPolicy = Literal["strict", "mean", "reset"]


class RankSavingDDP(DDPStrategy, ABC):
    """Writes a file for each rank with every full checkpoint, and reads it when a fit resumes.

    Attributes:
        residual_policy: What is done if the files do not fit the run that resumes.
    """

    residual_policy: ResidualPolicy
    _loaded_from: str | None = None
    _files: RankFiles | None = None

    @property
    @abstractmethod
    def label(self) -> str:
        """The class, for messages, configs and checkpoints."""

    @property
    @abstractmethod
    def is_neutral(self) -> bool:
        """Whether there is nothing to keep in this run."""

    @property
    @abstractmethod
    def has_state(self) -> bool:
        """Whether there is something to save now."""

    @abstractmethod
    def rank_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what is this rank's own, and what is the same on all ranks, of which that of rank 0 counts."""

    @abstractmethod
    def load_rank_state(self, own: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
        """Go on with what :meth:`rank_state` returned."""

    @abstractmethod
    def forget_rank_state(self) -> None:
        """Begin empty."""

    def begin_files(self) -> None:
        """Get ready for the saves of a fit."""
        run = str(self.broadcast(uuid.uuid4().hex[:8]))
        self._files = RankFiles(self.label, run, self.global_rank, self.world_size)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        self._loaded_from = str(checkpoint_path)
        return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        manifest = checkpoint.get(MANIFEST_KEY)
        self.forget_rank_state()
        if not self.is_neutral:
            self._restore(manifest)
        elif manifest is not None:
            rank_zero_warn(f"{self.label} sends everything now; what {manifest['strategy']} had not sent is lost.")

    def _restore(self, manifest: Mapping[str, Any] | None) -> None:
        if manifest is None:
            rank_zero_info(f"{self.label} begins with nothing unsent.")
            return
        if manifest["strategy"] != self.label:
            rank_zero_warn(
                f"{self.label} begins with nothing unsent: the checkpoint is of {manifest['strategy']}, whose residuals mean "
                "something else, and are lost."
            )
            return
        assert self._loaded_from is not None
        assert self._files is not None
        state = self._files.read(self.checkpoint_io, self._loaded_from, manifest, self.residual_policy)
        if state is None:
            rank_zero_warn(f"{self.label} begins with nothing unsent: what the saved run had not sent is lost.")
        else:
            self.load_rank_state(*state)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        if not self.has_state or "optimizer_states" not in checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if self._trainer.interrupted:
            self._save_on_the_way_out(checkpoint, str(filepath), storage_options)
            return
        assert self._files is not None
        path = str(self.broadcast(str(filepath)))  # names may hold metrics, which differ by rank
        checkpoint[MANIFEST_KEY] = manifest = self._files.write(self.checkpoint_io, path, *self.rank_state())
        self.barrier("all rank files are written before the checkpoint that names them")
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self.is_global_zero:
            self._files.forget_earlier(self.checkpoint_io, path, manifest)

    def _save_on_the_way_out(self, checkpoint: dict[str, Any], path: str, storage_options: Any | None) -> None:
        """Save after an exception, when other ranks may be anywhere: nobody can be asked, and rank 0 only looks for files."""
        assert self._files is not None
        checkpoint[MANIFEST_KEY] = manifest = self._files.write(self.checkpoint_io, path, *self.rank_state())
        if self.is_global_zero:
            if not self._files.are_complete(path, manifest) and get_filesystem(path).exists(path):
                # One that lacks files of other ranks must not take the place of one that can be resumed.
                rank_zero_warn(f"{self.label} keeps the former {path}: other ranks have not written theirs.")
                return
            super().save_checkpoint(checkpoint, path, storage_options)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero and self._files is not None:
            self._files.remove(str(filepath))

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer
