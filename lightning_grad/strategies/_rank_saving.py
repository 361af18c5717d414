"""Base class of all strategies: a DDP whose ranks have a state of their own, in files next to the checkpoint.

A strategy derives from it and says what a rank keeps (``rank_state``), what it does not work with (``compatibility``)
and when it is plain DDP (``is_neutral``). The base starts and ends a fit, writes and reads the rank files, explains a
lost rank, and gives way to plain DDP if the environment variable turns the strategy off.
"""

import inspect
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_grad.core.compatibility import Answer, Compatibility, moot, no
from lightning_grad.core.fit import FitScope, during_fit, until_next_fit
from lightning_grad.core.switch import Switchable, is_named, is_switched_off
from lightning_grad.core.undo import UndoList
from lightning_grad.strategies._collectives import Collectives, explain_lost_rank
from lightning_grad.strategies._ledger import ByteLedger, Stopwatch
from lightning_grad.strategies._rank_files import MANIFEST_KEY, Problem, RankFiles, State
from lightning_grad.strategies._rank_identity import Layout, layout_of
from lightning_grad.utilities.arguments import CheckedArguments, changed_settings, follow_settings, plain
from lightning_grad.utilities.parameters import clean_name
from lightning_grad.utilities.reporting import log_settings, say_if_no_figures

ResidualPolicy = Literal["strict", "mean", "reset"]
StartMethod = Literal["popen", "spawn", "fork", "forkserver"]

DEFAULT_TIMEOUT = timedelta(minutes=30)  # Lightning's
_PER_LAUNCH = ("residual_policy", "log_noise_scale")  # settings that change no message and may differ on resume

ONE_STRATEGY = moot("A Trainer has one strategy, and this one trains like DDP.")
ONE_STRATEGY_EACH: Mapping[str, Answer] = {
    **dict.fromkeys(("ddp", "fsdp2", "fsdp1", "deepspeed", "late_gradients", "local_steps"), ONE_STRATEGY),
    "pytorch_lightning": no(
        "does not work with {}, which accepts only strategies from its own namespace and reports an invalid strategy name",
        "Use lightning.pytorch.Trainer",
    ),
}
"""Answers of every strategy about other strategies and Trainers."""


class RankSavingDDP(CheckedArguments, Switchable, FitScope, DDPStrategy, ABC):
    """DDP whose ranks each write a file with every full checkpoint.

    Class attributes:

    - ``kept``: what a rank keeps, in the plural, for messages.
    - ``exchanged``: what ranks exchange, in the plural, and the unit that is counted, for messages.
    - ``when_neutral``: a clause for a setting with which a rank keeps nothing.

    Args:
        residual_policy: What to do if rank files do not fit on resume: 'strict', 'mean' or 'reset'.
        start_method: How Lightning starts the ranks of a node: 'popen', 'spawn', 'fork' or 'forkserver'.
        static_graph: DDP's option of the same name.
        gradient_as_bucket_view: DDP's option of the same name: saves one copy of the gradients.
        broadcast_buffers: DDP's option of the same name: send rank 0's buffers before each forward pass.
        find_unused_parameters: DDP's option of the same name: some parameters may get no gradient.
        process_group_backend: 'nccl' or 'gloo'; by default chosen for the device.
        timeout: Time limit of a collective.

    Attributes:
        ledger: Counts bytes and exchanges.
        undo: Actions that detach the strategy from optimizer and module; they run when the fit ends or fails.
        ranks: The collectives.
    """

    kept: ClassVar[str] = "unsent gradients"
    exchanged: ClassVar[str] = "gradients of step"
    when_neutral: ClassVar[str] = "compresses nothing now"

    namespace: ClassVar[str] = "comm"
    figure: ClassVar[bool] = True
    trial: ClassVar[Mapping[str, Any]]
    neutral: ClassVar[Mapping[str, Any] | str]
    compatibility: ClassVar[Compatibility]

    undo = during_fit.of(UndoList)
    ranks = during_fit[Collectives]()
    _watch = during_fit[Stopwatch]()

    # Needed by checkpoints that are written after the fit or after an exception.
    ledger = until_next_fit.of(ByteLedger)
    _files = until_next_fit[RankFiles]()
    _loaded_from, _weights_only = "", True

    def __init__(
        self,
        residual_policy: ResidualPolicy = "strict",
        start_method: StartMethod = "popen",
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        broadcast_buffers: bool = True,
        find_unused_parameters: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
    ) -> None:
        if timeout is not None and timeout <= timedelta(0):
            raise ValueError(f"timeout must be longer than zero; got {timeout!r}.")
        ddp: dict[str, Any] = {"static_graph": static_graph, "gradient_as_bucket_view": gradient_as_bucket_view}
        if not broadcast_buffers:
            ddp["broadcast_buffers"] = False  # pass it only if set: torch 2.13 deprecates it
        if find_unused_parameters and not static_graph:  # DDP warns about both: a static graph finds them by itself
            ddp["find_unused_parameters"] = True
        super().__init__(start_method=start_method, process_group_backend=process_group_backend, timeout=timeout, **ddp)
        self.residual_policy = residual_policy

    @classmethod
    def own_arguments(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of this class's constructor from the ``locals()`` of a subclass's."""
        return {name: given[name] for name in list(inspect.signature(cls.__init__).parameters)[1:]}

    # What a strategy defines.

    @property
    @override
    def display_name(self) -> str:
        """Class name, used in messages, configs and checkpoints."""
        return type(self).__name__

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments, without DDP's."""
        kinds = [cls for cls in reversed(type(self).__mro__) if issubclass(cls, RankSavingDDP)]
        names = dict.fromkeys(name for kind in kinds for name in inspect.signature(kind.__init__).parameters)
        return {name: getattr(self, name) for name in names if name in vars(self)}  # DDP's options are not attributes

    @property
    def message_settings(self) -> dict[str, Any]:
        """Settings that affect the messages. They are saved in checkpoints and compared when a fit resumes."""
        return {name: plain(value) for name, value in self.settings.items() if name not in _PER_LAUNCH}

    @property
    @abstractmethod
    def is_neutral(self) -> bool:
        """Whether the run is plain DDP."""

    @property
    def has_state(self) -> bool:
        """Whether a rank has anything to save."""
        return self.ledger.steps > 0

    @abstractmethod
    def rank_state(self) -> State:
        """Return the state of this rank, and the state that all ranks share (a resumed run reads rank 0's)."""

    @abstractmethod
    def load_rank_state(self, own: Mapping[str, Any], shared: Mapping[str, Any], changed: set[str]) -> None:
        """Continue from a :meth:`rank_state`; settings may have changed since."""

    def state_beyond(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Return parts of a checkpoint that differ between ranks, for the file of this rank."""
        return {}

    @abstractmethod
    def forget_rank_state(self) -> None:
        """Drop what this rank keeps, before another state is loaded."""

    def works_with(self) -> Compatibility:
        """Return the compatibility of this instance, which may depend on its settings."""
        return self.compatibility

    def log_key(self, quantity: str) -> str:
        """Return the log key of a quantity."""
        return f"{self.namespace}/{quantity}"

    @property
    def layouts(self) -> dict[str, Layout]:
        """Sizes and strides of the module's parameters by name; compared when a fit resumes."""
        return {name: layout_of(parameter) for name, parameter in self.named_tensors().items()}

    def named_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of which a rank may keep a state, by name."""
        assert self.lightning_module is not None
        return clean_parameters(self.lightning_module)

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    # The fit begins.

    @override
    def switch_off(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == "fit":
            self.begin_fit()
        trainer._accelerator_connector.strategy = PlainDDP(self)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if is_switched_off(self, trainer):
            trainer.strategy.setup(trainer)  # PlainDDP by now
            return
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        self._end()  # a fit whose exception did not reach on_exception, because a callback raised there
        self.begin_fit()
        self.refuse(trainer)
        self._watch = Stopwatch(self.root_device)
        ranks = (self.global_rank, self.world_size)
        self.ranks = Collectives(self.display_name, *ranks, self.ledger, self._watch, self.exchanged)
        super().setup(trainer)
        run = str(self.broadcast(uuid.uuid4().hex[:8]))
        self._files = RankFiles(self.display_name, run, *ranks, self.kept)
        log_settings(trainer, self.display_name, self.settings)
        self.announce()
        say_if_no_figures(trainer, self)

    def refuse(self, trainer: pl.Trainer) -> None:
        """Raise for what the strategy does not work with, before the model is wrapped.

        Raises:
            ValueError: With the reason and what to do instead.
        """
        self.works_with().refuse(self.display_name, trainer, trainer.lightning_module)
        self.works_with().refuse_parameters(self.display_name, trainer.lightning_module)

    def asked_too_early(self, choice: str) -> RuntimeError:
        """Return the error of ``chosen()`` before a fit has begun; ``choice`` is what it would return."""
        return RuntimeError(
            f"{self.display_name} chooses {choice} when a fit begins, and no fit has begun. Call chosen() during fit(), for "
            "example in on_fit_start of a callback."
        )

    @abstractmethod
    def announce(self) -> None:
        """Print what the strategy does in this fit."""

    # Loading and saving.

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        self._loaded_from, self._weights_only = str(checkpoint_path), weights_only is not False
        return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        manifest = checkpoint.get(MANIFEST_KEY)
        self.forget_rank_state()
        self.ledger.load_state_dict(ByteLedger().state_dict())
        if not self.is_neutral:
            self._restore(manifest)
        elif manifest is not None:
            whose = f"the {self.kept} of {manifest['strategy']} are lost"
            rank_zero_warn(f"{self.display_name} {self.when_neutral}: {whose}.")

    def _restore(self, manifest: Mapping[str, Any] | None) -> None:
        """Load the rank files of a checkpoint, or start without them and report why."""
        if manifest is None:
            rank_zero_info(f"{self.display_name} starts without {self.kept}.")
            return
        if manifest["strategy"] != self.display_name:
            rank_zero_warn(
                f"{self.display_name} starts without {self.kept}: the checkpoint was saved by {manifest['strategy']}, "
                "whose rank files have another meaning and are ignored."
            )
            return
        saved = manifest.get("settings", {})
        follow_settings(self.display_name, saved, self.message_settings, {})
        given = (self._loaded_from, manifest, self.residual_policy, self.layouts, _first_problem, self._weights_only)
        state, why = self._files.read(self.checkpoint_io, *given)
        if state is None:
            lost = f"starts without {self.kept}: the {self.kept} of the saved run are lost"
            rank_zero_warn(f"{self.display_name} {lost}, because {why}.")
        else:
            self.load_rank_state(*state, set(changed_settings(saved, self.message_settings)))

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        if self.is_neutral or not self.has_state or "optimizer_states" not in checkpoint:
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
        own, shared = self.rank_state()
        state = ({**own, **self.state_beyond(checkpoint)}, shared)
        manifest = self._files.write(self.checkpoint_io, path, state, self.layouts)
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

    # The fit ends.

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self.ledger.record.count:
            self.ledger.record.save(self._trainer, self, now=True)
        explain_lost_rank(exception, self.display_name)
        self.explain(exception)
        self._end()

    def explain(self, exception: BaseException) -> None:
        """Add what the strategy knows about an exception to its message."""

    @override
    def teardown(self) -> None:
        self._end()
        super().teardown()

    def _end(self) -> None:
        self.undo.run()
        self.end_fit()


class PlainDDP(DDPStrategy):
    """Replaces a strategy that is switched off with plain DDP, until the run ends.

    Args:
        scheme: The strategy to replace; its attributes are shared.
    """

    def __init__(self, scheme: RankSavingDDP) -> None:
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


def clean_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a module by name, without the prefixes of ``torch.compile``."""
    return {clean_name(name): parameter for name, parameter in module.named_parameters()}


def _first_problem(problem: Problem | None) -> Problem | None:
    problems: list[Problem | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((one for one in problems if one is not None), None)
