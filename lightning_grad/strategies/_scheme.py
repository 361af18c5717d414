"""The interface of a compression scheme: four methods on named gradients, and a memory that each rank saves.

``compressed_ddp.py`` calls the methods during a run; ``_rank_files.py`` reads and writes the files of ranks.
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

_MOST_ENTRIES = 2**31  # of a compressed tensor: indices are int32
_PER_LAUNCH = ("residual_policy", "log_noise_scale")  # settings that change no message and may differ on resume


class SchemeDDP(Switchable, FitScope, DDPStrategy, ABC):
    """Interface and saved state of a compression scheme; each rank writes a file with every full checkpoint.

    Attributes:
        residual_policy: What to do if the rank files do not fit the run that resumes.
        memory: Tensors that the scheme keeps for each parameter, by name.
        ledger: Counts bytes and exchanges.
        step: Number of exchanges before the current one.
        undo: Actions that detach the strategy from optimizer and module; they run when the fit ends or fails.
    """

    exclude: list[str] | None
    min_numel: int
    residual_policy: ResidualPolicy

    undo = during_fit.of(UndoList)

    # Needed by checkpoints that are written after the fit or after an exception.
    memory = until_next_fit.of(dict[str, dict[str, Tensor]])
    ledger = until_next_fit.of(ByteLedger)
    step = until_next_fit.of(int)
    _noise = until_next_fit[Tensor | None](lambda _: None)  # running averages of noise and signal
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

    # What a scheme defines.

    @property
    @override
    def display_name(self) -> str:
        """Class name, used in messages, configs and checkpoints."""
        return type(self).__name__

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Constructor arguments of the scheme, without DDP's."""

    @property
    def message_settings(self) -> dict[str, Any]:
        """Settings that affect the messages. They are saved in checkpoints and compared when a fit resumes."""
        return {name: plain(value) for name, value in self.settings.items() if name not in _PER_LAUNCH}

    @property
    def gradient_is_compressed(self) -> bool:
        """Whether the scale of ``.grad`` differs from the mean gradient's; clipping callbacks then raise."""
        return False

    @property
    def gradient_holds_momentum(self) -> bool:
        """Whether ``.grad`` includes momentum and the optimizer applies none; known once an optimizer is connected."""
        return False

    @property
    def wants_to_compress(self) -> bool:
        """Whether the settings compress anything."""
        return True

    @property
    def is_neutral(self) -> bool:
        """Whether nothing in this module is compressed, so the run is plain DDP."""
        return not self._chosen

    @property
    def is_active(self) -> bool:
        """Whether the current step is compressed; otherwise all gradients are sent dense."""
        return True

    @property
    def remark(self) -> str:
        """Sentence appended to the line printed at the start of a fit, with a leading space; may be empty."""
        return ""

    def compresses(self, name: str, parameter: Tensor) -> bool:
        """Return whether a parameter's gradient is compressed. Must not depend on rank or step."""
        large = parameter.dim() > 1 and self.min_numel <= parameter.numel() < _MOST_ENTRIES
        return large and not matches(self.names_of(name), self.exclude or [])

    def names_of(self, name: str) -> list[str]:
        """Return all names of a parameter; a tied parameter has several."""
        return self._tied.get(name, [name])

    @abstractmethod
    def accumulate(self, gradients: Sequence[Gradient]) -> None:
        """Add the gradients of this rank to the memory. Not called again when a batch is repeated after a resume."""

    @abstractmethod
    def send(self, gradients: Sequence[Gradient]) -> Message:
        """Exchange the memories and return the result, identical on all ranks.

        Communicate through ``self.ranks`` only: it counts the bytes.
        """

    @abstractmethod
    def settle(self, gradients: Sequence[Gradient], message: Message, arrived: Tensor) -> None:
        """Remove what was sent from the memory, unless ``arrived``, a 0-dimensional bool tensor, is false."""

    @abstractmethod
    def write(self, gradients: Sequence[Gradient], message: Message, failure: Tensor) -> None:
        """Write the mean that ``message`` encodes into the gradients, and add ``failure`` (0 or NaN) to all values."""

    @abstractmethod
    def unsent(self) -> Iterator[Tensor]:
        """Yield the residuals of this rank."""

    @abstractmethod
    def sent_bytes(self, name: str, shape: torch.Size, itemsize: int) -> int:
        """Return the bytes of a compressed gradient in the messages of one step."""

    def figures(self) -> dict[str, float]:
        """Return additional values to log at log steps."""
        return {}

    def release_optimizer(self) -> None:
        """Restore the optimizer after its update has failed."""

    def residual_norm(self) -> float:
        """Return the 2-norm of the gradients that this rank has not sent."""
        residuals = list(self.unsent())
        return float(total_norm(residuals)) if residuals else 0.0

    # The module's parameters.

    def _inspect(self, model: DistributedDataParallel) -> None:
        named = [(clean_name(name), parameter) for name, parameter in model.module.named_parameters()]
        self._parameters = dict(named)
        self._names = {id(parameter): name for name, parameter in named}
        self._tied = {names[0]: names for names in all_names(model.module).values()}
        self._order = {name: place for place, (name, _) in enumerate(named)}
        self._chosen = {name for name, p in named if p.requires_grad and self.compresses(name, p)}
        self._shapes = {name: (p.shape, p.element_size()) for name, p in named if p.requires_grad}

    @property
    def parameters(self) -> dict[str, Layout]:
        """Sizes and strides of the module's parameters by name; compared when a fit resumes."""
        return {name: layout_of(parameter) for name, parameter in self._parameters.items()}

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    # The saved state.

    def rank_state(self) -> State:
        """Return the state of this rank, and the state that all ranks share (a resumed run reads rank 0's)."""
        memory = {name: {key: value.clone() for key, value in kept.items()} for name, kept in self.memory.items()}
        batches: Any = self._trainer.fit_loop.epoch_loop.batch_progress.current
        is_under_way = self._trainer.interrupted and batches.started > batches.processed  # the batch will be repeated
        in_flight = self._in_flight if is_under_way else None
        shared = {"in_flight": in_flight, "ledger": self.ledger.state_dict(), "noise": self._noise}
        return {"memory": memory, "is_accumulated": self._is_accumulated}, shared

    def load_rank_state(self, own: Mapping[str, Any], shared: Mapping[str, Any], changed: set[str]) -> None:
        """Continue from a :meth:`rank_state`; settings may have changed since."""
        to, saved = self.root_device, own["memory"]
        self.memory = {n: {key: v.to(to) for key, v in kept.items()} for n, kept in saved.items() if n in self._chosen}
        if len(self.memory) < len(saved):
            lost = ", ".join(sorted(saved.keys() - self._chosen))
            rank_zero_warn(f"{self.display_name} no longer compresses {lost}: their unsent gradients are lost.")
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

    # Saving and loading.

    def begin_files(self) -> None:
        """Prepare the rank files of a fit."""
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
                f"{self.display_name} compresses nothing now: the unsent gradients of {manifest['strategy']} are lost."
            )

    def _restore(self, manifest: Mapping[str, Any] | None) -> None:
        """Load the rank files of a checkpoint, or start without unsent gradients and report why."""
        if manifest is None:
            rank_zero_info(f"{self.display_name} starts without unsent gradients.")
            return
        if manifest["strategy"] != self.display_name:
            rank_zero_warn(
                f"{self.display_name} starts without unsent gradients: the checkpoint was saved by {manifest['strategy']}, "
                "whose residuals have another meaning and are lost."
            )
            return
        saved = manifest.get("settings", {})
        follow_settings(self.display_name, saved, self.message_settings, {})
        io, policy, parameters = self.checkpoint_io, self.residual_policy, self.parameters
        state, why = self._files.read(io, self._loaded_from, manifest, policy, parameters, _first_problem)
        if state is None:
            lost = "starts without unsent gradients: the unsent gradients of the saved run are lost"
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
            self._save_after_exception(checkpoint, str(filepath), storage_options)
            return
        path = str(self.broadcast(str(filepath)))  # file names may contain metrics, which differ between ranks
        manifest = self._write_rank_file(checkpoint, path)
        self.barrier("all rank files are written before the checkpoint that names them")
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self.is_global_zero:
            self._files.remove_earlier(self.checkpoint_io, path, manifest)

    def _write_rank_file(self, checkpoint: dict[str, Any], path: str) -> dict[str, Any]:
        manifest = self._files.write(self.checkpoint_io, path, self.rank_state(), self.parameters)
        checkpoint[MANIFEST_KEY] = {**manifest, "settings": self.message_settings}
        return manifest

    def _save_after_exception(self, checkpoint: dict[str, Any], path: str, storage_options: Any | None) -> None:
        """Save after an exception. Other ranks may be anywhere, so there is no barrier: rank 0 only checks for files."""
        manifest = self._write_rank_file(checkpoint, path)
        if self.is_global_zero:
            if not self._files.are_complete(path, manifest) and get_filesystem(path).exists(path):
                # A checkpoint without all rank files must not replace one that can be resumed.
                rank_zero_warn(f"{self.display_name} keeps the earlier {path}: not all ranks have written their files.")
                return
            super().save_checkpoint(checkpoint, path, storage_options)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero and hasattr(self, "_files"):
            self._files.remove(str(filepath))


class PlainDDP(DDPStrategy):
    """Replaces a scheme that is switched off with plain DDP, until the run ends.

    Args:
        scheme: The strategy to replace; its attributes are shared.
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
