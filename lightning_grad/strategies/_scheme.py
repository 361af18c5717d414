"""What a compression scheme is: four methods on named gradients, and a memory that is saved for each rank.

``compressed_ddp.py`` calls the methods, and has the run around them; the files of ranks are those of ``_rank_files.py``.
"""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_grad.core.fit import FitScope, during_fit, until_next_fit
from lightning_grad.core.switch import Switchable, is_named
from lightning_grad.core.undo import UndoList
from lightning_grad.functional import total_norm
from lightning_grad.strategies._buckets import Gradient
from lightning_grad.strategies._ledger import ByteLedger
from lightning_grad.strategies._rank_files import MANIFEST_KEY, Problem, RankFiles, State
from lightning_grad.strategies._rank_identity import Layout, layout_of
from lightning_grad.utilities.arguments import changed_settings, follow_settings, plain
from lightning_grad.utilities.parameters import all_names, clean_name, matches

Message = dict[str, Tensor]
ResidualPolicy = Literal["strict", "mean", "reset"]

_MOST_ENTRIES = 2**31  # of a compressed tensor: an index has four bytes
_OF_THE_LAUNCH = ("residual_policy", "log_noise_scale")  # may differ at each start, and change no message


class SchemeDDP(Switchable, FitScope, DDPStrategy, ABC):
    """What a scheme may ask for, what it writes, and what of it is saved: a file for each rank with every full checkpoint.

    Attributes:
        residual_policy: What is done if the files do not fit the run that resumes.
        memory: By parameter, what the scheme keeps.
        ledger: Counts bytes and exchanges.
        step: Exchanges before the present one.
        undo: Takes back what was attached to the optimizer or the module, when the fit ends, however it ends.
    """

    exclude: list[str] | None
    min_numel: int
    residual_policy: ResidualPolicy

    undo = during_fit.of(UndoList)

    # A checkpoint that is written after the fit, or after an exception, needs these.
    memory = until_next_fit.of(dict[str, dict[str, Tensor]])
    ledger = until_next_fit.of(ByteLedger)
    step = until_next_fit.of(int)
    _noise = until_next_fit[Tensor | None](lambda _: None)  # averages
    _parameters = until_next_fit.of(dict[str, Tensor])
    _names = until_next_fit.of(dict[int, str])
    _tied = until_next_fit.of(dict[str, list[str]])
    _order = until_next_fit.of(dict[str, int])
    _shapes = until_next_fit.of(dict[str, tuple[torch.Size, int]])
    _chosen = until_next_fit.of(set[str])
    _in_flight = until_next_fit[Message | None](lambda _: None)
    _replayed = until_next_fit[Message | None](lambda _: None)
    _is_accumulated = until_next_fit.of(bool)
    _files = until_next_fit[RankFiles]()
    _loaded_from = ""

    @override
    def switch_off(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == "fit":
            self.begin_fit()
        trainer._accelerator_connector.strategy = PlainDDP(self)

    # What a scheme says and writes.

    @property
    @override
    def display_name(self) -> str:
        """The class, for messages, configs and checkpoints."""
        return type(self).__name__

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments that are this technique's own."""

    @property
    def message_settings(self) -> dict[str, Any]:
        """The settings that decide what is sent: a checkpoint holds them, and they are compared when a fit resumes."""
        return {name: plain(value) for name, value in self.settings.items() if name not in _OF_THE_LAUNCH}

    @property
    def gradient_is_compressed(self) -> bool:
        """Whether callbacks see gradients of another scale than the mean gradient's: clippers refuse those."""
        return False

    @property
    def gradient_holds_momentum(self) -> bool:
        """Whether the optimizer, once it is connected, gets gradients with their momentum, and applies none itself."""
        return False

    @property
    def wants_to_compress(self) -> bool:
        """Whether the arguments leave anything to compress."""
        return True

    @property
    def is_neutral(self) -> bool:
        """Whether this module leaves nothing to compress, so that this is DDP and nothing else."""
        return not self._chosen

    @property
    def is_active(self) -> bool:
        """Whether the present step is compressed; if not, everything goes dense."""
        return True

    @property
    def remark(self) -> str:
        """What else the line says that is printed when a fit begins: a sentence with a space before it, or nothing."""
        return ""

    def compresses(self, name: str, parameter: Tensor) -> bool:
        """Return whether a parameter's gradient is compressed; the same on all ranks and in all steps."""
        large = parameter.dim() > 1 and self.min_numel <= parameter.numel() < _MOST_ENTRIES
        return large and not matches(self.names_of(name), self.exclude or [])

    def names_of(self, name: str) -> list[str]:
        """Return every name of the parameter that has this one; a tied parameter has several."""
        return self._tied.get(name, [name])

    @abstractmethod
    def accumulate(self, gradients: Sequence[Gradient]) -> None:
        """Take the gradients of this rank into the memory; not called again for a batch that is run again."""

    @abstractmethod
    def send(self, gradients: Sequence[Gradient]) -> Message:
        """Return what all ranks send of their memories, the same on each.

        Whatever goes to other ranks goes through ``self.ranks``, which counts its bytes.
        """

    @abstractmethod
    def settle(self, gradients: Sequence[Gradient], message: Message, arrived: Tensor) -> None:
        """Take what was sent out of the memory, unless ``arrived``, a 0-dimensional bool tensor, is false."""

    @abstractmethod
    def write(self, gradients: Sequence[Gradient], message: Message, failure: Tensor) -> None:
        """Write the mean that ``message`` stands for into the gradients, each with ``failure`` in it: 0, or NaN to be seen."""

    @abstractmethod
    def unsent(self) -> Iterator[Tensor]:
        """Yield the residuals of this rank."""

    @abstractmethod
    def sent_bytes(self, name: str, shape: torch.Size, itemsize: int) -> int:
        """Return the bytes that a compressed gradient takes in the messages of one step."""

    def figures(self) -> dict[str, float]:
        """Return what else is worth logging at a log step."""
        return {}

    def release_optimizer(self) -> None:
        """Give back what an update that has failed holds of the optimizer."""

    def residual_norm(self) -> float:
        """Return the 2-norm of what this rank has not sent."""
        residuals = list(self.unsent())
        return float(total_norm(residuals)) if residuals else 0.0

    # What it knows of the module.

    def _look_at(self, model: DistributedDataParallel) -> None:
        named = [(clean_name(name), parameter) for name, parameter in model.module.named_parameters()]
        self._parameters = dict(named)
        self._names = {id(parameter): name for name, parameter in named}
        self._tied = {names[0]: names for names in all_names(model.module).values()}
        self._order = {name: place for place, (name, _) in enumerate(named)}
        self._chosen = {name for name, p in named if p.requires_grad and self.compresses(name, p)}
        self._shapes = {name: (p.shape, p.element_size()) for name, p in named if p.requires_grad}

    @property
    def parameters(self) -> dict[str, Layout]:
        """Sizes and strides of the module's parameters by name, which are compared too when a fit resumes."""
        return {name: layout_of(parameter) for name, parameter in self._parameters.items()}

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    # What is saved of it.

    def rank_state(self) -> State:
        """Return what is this rank's own, and what is the same on all ranks, of which that of rank 0 counts."""
        memory = {name: {key: value.clone() for key, value in kept.items()} for name, kept in self.memory.items()}
        batches: Any = self._trainer.fit_loop.epoch_loop.batch_progress.current
        is_under_way = self._trainer.interrupted and batches.started > batches.processed  # so that the batch runs again
        in_flight = self._in_flight if is_under_way else None
        shared = {"in_flight": in_flight, "ledger": self.ledger.state_dict(), "noise": self._noise}
        return {"memory": memory, "is_accumulated": self._is_accumulated}, shared

    def load_rank_state(self, own: Mapping[str, Any], shared: Mapping[str, Any], changed: set[str]) -> None:
        """Continue with what :meth:`rank_state` returned, although some settings may have changed."""
        to, saved = self.root_device, own["memory"]
        self.memory = {n: {key: v.to(to) for key, v in kept.items()} for n, kept in saved.items() if n in self._chosen}
        if len(self.memory) < len(saved):
            lost = ", ".join(sorted(saved.keys() - self._chosen))
            rank_zero_warn(f"{self.display_name} no longer compresses {lost}: what was not sent of them is lost.")
        self._is_accumulated = own["is_accumulated"]
        message = shared["in_flight"]
        if message is not None and changed:
            rank_zero_warn(
                f"{self.display_name} has new settings: the gradient that was exchanged but not used yet is lost."
            )
            message = None
        self._replayed = None if message is None else {key: value.to(to) for key, value in message.items()}
        self.ledger.load_state_dict(shared["ledger"])
        self._noise = shared["noise"]

    # When it is saved.

    def begin_files(self) -> None:
        """Get ready for the saves of a fit."""
        run = str(self.broadcast(uuid.uuid4().hex[:8]))
        self._files = RankFiles(self.display_name, run, self.global_rank, self.world_size)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        self._loaded_from = str(checkpoint_path)
        return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        manifest = checkpoint.get(MANIFEST_KEY)
        self.memory, self._replayed, self._noise, self._is_accumulated = {}, None, None, False
        self.ledger.load_state_dict(ByteLedger().state_dict())
        if not self.is_neutral:
            self._restore(manifest)
        elif manifest is not None:
            rank_zero_warn(
                f"{self.display_name} sends everything now; what {manifest['strategy']} had not sent is lost."
            )

    def _restore(self, manifest: Mapping[str, Any] | None) -> None:
        if manifest is None:
            rank_zero_info(f"{self.display_name} begins with nothing unsent.")
            return
        if manifest["strategy"] != self.display_name:
            rank_zero_warn(
                f"{self.display_name} begins with nothing unsent: the checkpoint is of {manifest['strategy']}, whose "
                "residuals mean something else, and are lost."
            )
            return
        saved = manifest.get("settings", {})
        follow_settings(self.display_name, saved, self.message_settings, {})
        io, policy, parameters = self.checkpoint_io, self.residual_policy, self.parameters
        state, why = self._files.read(io, self._loaded_from, manifest, policy, parameters, _first_problem)
        if state is None:
            lost = "begins with nothing unsent: what the saved run had not sent is lost"
            rank_zero_warn(f"{self.display_name} {lost}, because {why}.")
        else:
            self.load_rank_state(*state, set(changed_settings(saved, self.message_settings)))

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        has_state = not self.is_neutral and (self.ledger.steps > 0 or self._is_accumulated)
        if not has_state or "optimizer_states" not in checkpoint:
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
                rank_zero_warn(f"{self.display_name} keeps the former {path}: other ranks have not written theirs.")
                return
            super().save_checkpoint(checkpoint, path, storage_options)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero and hasattr(self, "_files"):
            self._files.remove(str(filepath))


class PlainDDP(DDPStrategy):
    """Stand in a Trainer for a scheme that is turned off, until the run ends.

    Args:
        scheme: The strategy whose place this takes, and whose attributes it shares.
    """

    def __init__(self, scheme: SchemeDDP) -> None:
        self.__dict__ = scheme.__dict__
        self._scheme = scheme
        # Lightning refuses a module that logs with another function than in an earlier fit.
        self.reduce = scheme.reduce  # type: ignore[method-assign]

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if is_named(type(self._scheme)):
            super().setup(trainer)
        else:  # an exception in a callback's on_exception left this behind
            self._give_back()
            trainer.strategy.setup(trainer)

    @override
    def teardown(self) -> None:
        super().teardown()
        self._give_back()

    def _give_back(self) -> None:
        assert self.lightning_module is not None
        del self.__dict__["reduce"]
        self.lightning_module.trainer._accelerator_connector.strategy = self.__dict__.pop("_scheme")


def _first_problem(problem: Problem | None) -> Problem | None:
    problems: list[Problem | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((one for one in problems if one is not None), None)
