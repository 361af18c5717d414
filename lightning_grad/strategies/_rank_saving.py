"""DDP that also saves what each rank keeps for itself. Used by ``_scheme.py``; the files are ``_rank_files.py``'s."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_grad.core.fit import FitScope, until_next_fit
from lightning_grad.strategies._rank_files import MANIFEST_KEY, Problem, RankFiles, State
from lightning_grad.strategies._rank_identity import Parameters
from lightning_grad.utilities.arguments import changed_settings, follow_settings

ResidualPolicy = Literal["strict", "mean", "reset"]


class RankSavingDDP(FitScope, DDPStrategy, ABC):
    """Writes a file for each rank with every full checkpoint, and reads it when a fit resumes.

    Attributes:
        residual_policy: What is done if the files do not fit the run that resumes.
    """

    residual_policy: ResidualPolicy
    _loaded_from = ""
    _files = until_next_fit[RankFiles]()

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

    @property
    @abstractmethod
    def message_settings(self) -> dict[str, Any]:
        """The settings that a checkpoint holds, and that are compared when a fit resumes."""

    @property
    @abstractmethod
    def parameters(self) -> Parameters:
        """Sizes and strides of the module's parameters by name, which are compared too."""

    @abstractmethod
    def rank_state(self) -> State:
        """Return what is this rank's own, and what is the same on all ranks, of which that of rank 0 counts."""

    @abstractmethod
    def load_rank_state(self, own: Mapping[str, Any], shared: Mapping[str, Any], changed: set[str]) -> None:
        """Continue with what :meth:`rank_state` returned, although some settings may have changed."""

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
        saved = manifest.get("settings", {})
        follow_settings(self.label, saved, self.message_settings, {})
        policy, parameters = self.residual_policy, self.parameters
        state, why = self._files.read(
            self.checkpoint_io, self._loaded_from, manifest, policy, parameters, _first_problem
        )
        if state is None:
            lost = "begins with nothing unsent: what the saved run had not sent is lost"
            rank_zero_warn(f"{self.label} {lost}, because {why}.")
        else:
            self.load_rank_state(*state, set(changed_settings(saved, self.message_settings)))

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        if not self.has_state or "optimizer_states" not in checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if self._trainer.interrupted:
            self._save_on_the_way_out(checkpoint, str(filepath), storage_options)
            return
        path = str(self.broadcast(str(filepath)))  # names may hold metrics, which differ by rank
        manifest = self._write_rank_file(checkpoint, path)
        self.barrier("all rank files are written before the checkpoint that names them")
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self.is_global_zero:
            self._files.forget_earlier(self.checkpoint_io, path, manifest)

    def _write_rank_file(self, checkpoint: dict[str, Any], path: str) -> dict[str, Any]:
        manifest = self._files.write(self.checkpoint_io, path, self.rank_state(), self.parameters)
        checkpoint[MANIFEST_KEY] = {**manifest, "settings": self.message_settings}
        return manifest

    def _save_on_the_way_out(self, checkpoint: dict[str, Any], path: str, storage_options: Any | None) -> None:
        """Save after an exception, when other ranks may be anywhere: nobody can be asked, and rank 0 only looks for files."""
        manifest = self._write_rank_file(checkpoint, path)
        if self.is_global_zero:
            if not self._files.are_complete(path, manifest) and get_filesystem(path).exists(path):
                # One that lacks files of other ranks must not take the place of one that can be resumed.
                rank_zero_warn(f"{self.label} keeps the former {path}: other ranks have not written theirs.")
                return
            super().save_checkpoint(checkpoint, path, storage_options)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero and hasattr(self, "_files"):
            self._files.remove(str(filepath))

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer


def _first_problem(problem: Problem | None) -> Problem | None:
    problems: list[Problem | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((one for one in problems if one is not None), None)
