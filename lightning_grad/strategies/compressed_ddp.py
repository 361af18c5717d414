"""The base of every strategy here: DDP whose gradients are exchanged in compressed form. Read this first.

DDP hands its buckets of gradients to a communication hook. The hook here only collects them; at the last bucket of a
backward pass all gradients are known, and one exchange follows: a small dense message (biases, norms, small tensors,
and one number that says whether a gradient was not finite) and whatever the scheme sends for the large ones. So a
scheme is four methods on named, flat gradients; it sees no buckets, futures or streams, its collectives come in the
same order on all ranks, and its memory is keyed by parameter name. Beside this file: ``dgc.py`` and ``powersgd.py``
are the schemes, ``_buckets.py`` is the hook, ``_collectives.py`` talks to other ranks, ``_ledger.py`` counts bytes,
``_rank_files.py`` knows where the memory of each rank is saved, ``_refusals.py`` says what cannot work, ``_noise.py``
measures, ``_report.py`` draws.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.functional import total_norm
from lightning_grad.strategies import _report
from lightning_grad.strategies._buckets import BucketCollector, Gradient
from lightning_grad.strategies._collectives import Collectives, explain_lost_rank
from lightning_grad.strategies._interrupts import interrupts_deferred
from lightning_grad.strategies._ledger import ByteLedger, Stopwatch
from lightning_grad.strategies._noise import GradientNoise
from lightning_grad.strategies._rank_saving import RankSavingDDP, ResidualPolicy
from lightning_grad.strategies._refusals import refuse_optimizers, refuse_run
from lightning_grad.utilities.arguments import CheckedArguments
from lightning_grad.utilities.checks import check_choice, check_count, owned_ids
from lightning_grad.utilities.parameters import (
    all_names,
    as_names,
    check_patterns,
    clean_name,
    matches,
    parameter_names,
)
from lightning_grad.utilities.reporting import is_log_step, log_many, log_settings, log_summary

__all__ = ["CompressedDDPStrategy", "Gradient", "Message", "ResidualPolicy"]

Message = dict[str, Tensor]
StartMethod = Literal["popen", "spawn", "fork", "forkserver"]

_DENSE = "dense"
DEFAULT_TIMEOUT = timedelta(minutes=30)  # Lightning's
_MOST_ENTRIES = 2**31  # of a compressed tensor: an index has four bytes


class CompressedDDPStrategy(CheckedArguments, RankSavingDDP):
    r"""DDP that exchanges compressed gradients, keeps what was not sent, and saves that for each rank.

    A scheme derives from it and writes ``accumulate``, ``send``, ``settle`` and ``write``, which together replace the
    all-reduce of the tensors that :meth:`compresses` names. All others are averaged as DDP does. What holds for every
    scheme:

    - ``memory[name]`` is the scheme's dictionary of tensors for a parameter (a residual, a velocity, a factor). It is
      saved for each rank in ``<checkpoint>.ranks`` and restored bit for bit, on a fit that resumes.
    - A gradient that is not finite on one rank puts NaN into every gradient of all of them, so that a guard
      (:class:`~lightning_grad.callbacks.SkipNonFinite`) skips the step everywhere; it never enters the memory, and
      nothing counts as sent in such a step.
    - Resuming is exact after an exception too. Ctrl-C waits for the end of an exchange. The checkpoint holds a message
      that was exchanged but not used by an update, for the batch that is run again; and of a gradient that was taken into
      the memory, but not exchanged because another rank was lost, that it is there already.
    - What no optimizer moves goes dense.

    Args:
        exclude: Names or wildcards of parameters or modules whose gradients are sent dense.
        min_numel: Entries below which a gradient is sent dense.
        residual_policy: On resuming with other ranks or without all rank files: 'strict' raises, 'mean' gives every rank
            the mean over the old ranks, 'reset' begins empty.
        gradient_noise: Log comm/gradient_noise at log steps, for one small all-reduce more in each.
        start_method: How Lightning starts the ranks of a node: 'popen', 'spawn', 'fork' or 'forkserver'.
        static_graph: DDP's option of that name.
        gradient_as_bucket_view: DDP's option of that name, which saves the memory of one copy of the gradients.
        broadcast_buffers: DDP's option of that name: send rank 0's buffers before each forward pass.
        find_unused_parameters: DDP's option of that name; True is refused.
        process_group_backend: 'nccl' or 'gloo'; default by device.
        timeout: How long a collective may take.

    Raises:
        ValueError: For arguments that cannot be; in ``setup`` for what cannot be compressed: manual optimization, several
            optimizers, an fp16 GradScaler, sparse or complex gradients.

    **Logs** at log steps, from rank 0: ``comm/bytes_sent`` (bytes that this rank hands to collectives in the step),
    ``comm/ratio`` (bytes of the gradients to that), ``comm/residual_norm`` (2-norm of what this rank has not sent),
    ``comm/compress_ms`` (milliseconds of the exchange that are not waiting), and ``comm/gradient_noise`` (in batches
    of one rank) if asked for. At the end a figure, a table of layers, and ``comm/final_ratio`` and
    ``comm/total_megabytes`` in the summary.
    """

    namespace: ClassVar[str] = "comm"

    def __init__(
        self,
        exclude: Sequence[str] | None = None,
        min_numel: int = 1024,
        residual_policy: ResidualPolicy = "strict",
        gradient_noise: bool = False,
        start_method: StartMethod = "popen",
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        broadcast_buffers: bool = True,
        find_unused_parameters: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
    ) -> None:
        check_count(min_numel, 1, "min_numel")
        check_choice(residual_policy, ("strict", "mean", "reset"), "residual_policy")
        if find_unused_parameters:
            raise ValueError(
                f"{self.label} needs a gradient of every parameter in every step: one that is unused would send its old "
                "residual as if it were new. Set find_unused_parameters=False, and freeze what is not used."
            )
        ddp: dict[str, Any] = {} if broadcast_buffers else {"broadcast_buffers": False}  # torch 2.13 deprecates it
        super().__init__(
            start_method=start_method,
            process_group_backend=process_group_backend,
            timeout=timeout,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
            **ddp,
        )
        self.exclude = as_names(exclude, "exclude")
        self.min_numel = min_numel
        self.residual_policy = residual_policy
        self.gradient_noise = gradient_noise
        self._reset()

    def _reset(self) -> None:
        self.memory: dict[str, dict[str, Tensor]] = {}
        self.ledger = ByteLedger()
        self._noise = GradientNoise()
        self._names: dict[int, str] = {}
        self._tied: dict[str, list[str]] = {}
        self._order: dict[str, int] = {}
        self._shapes: dict[str, tuple[torch.Size, int]] = {}
        self._chosen: set[str] = set()
        self._buckets = BucketCollector({}, self._exchange)
        self._in_flight: Message | None = None
        self._replayed: Message | None = None
        self._is_accumulated = False
        self._measured: dict[str, float] = {}
        self.step = 0  # exchanges before the present one

    # What a scheme says and writes.

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

    def compresses(self, name: str, parameter: Tensor) -> bool:
        """Say whether a parameter's gradient is compressed; the same on all ranks and in all steps."""
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

    def disconnect(self) -> None:
        """Take back what was attached to the optimizer; called however a fit ends, perhaps twice."""

    # The fit begins.

    @property
    def label(self) -> str:
        """The class, for messages, configs and checkpoints."""
        return type(self).__name__

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments that are this technique's own."""
        constructors = [vars(cls)["__init__"] for cls in type(self).__mro__ if "__init__" in vars(cls)]
        ours = constructors[: constructors.index(CompressedDDPStrategy.__init__) + 1]
        names = dict.fromkeys(name for init in reversed(ours) for name in inspect.signature(init).parameters)
        return {name: getattr(self, name) for name in names if name not in _OF_DDP and hasattr(self, name)}

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        self._reset()
        self.refuse(trainer)
        self._watch = Stopwatch(self.root_device)
        self.ranks = Collectives(self.label, self.global_rank, self.world_size, self.ledger, self._watch)
        super().setup(trainer)
        self.begin_files()
        log_settings(trainer, self.label, self.settings)
        self._announce()

    def refuse(self, trainer: pl.Trainer) -> None:
        """Raise for what cannot be compressed, before anything is built.

        Raises:
            ValueError: With what to do instead.
        """
        refuse_run(trainer, self.label)
        check_patterns(self.exclude or [], parameter_names(trainer.lightning_module), "exclude")

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        refuse_optimizers(self.optimizers, trainer.lightning_module, self.label)
        self.connect_optimizer(self.optimizers[0])

    def connect_optimizer(self, optimizer: Optimizer) -> None:
        """Raise for an optimizer that does not fit the scheme, or attach to it.

        Raises:
            ValueError: With what to do instead.
        """

    @override
    def _register_ddp_hooks(self) -> None:
        # Lightning registers hooks on CUDA only, and says nothing elsewhere.
        assert isinstance(self.model, DistributedDataParallel)
        named = [(clean_name(name), parameter) for name, parameter in self.model.module.named_parameters()]
        self._names = {id(parameter): name for name, parameter in named}
        self._tied = {names[0]: names for names in all_names(self.model.module).values()}
        self._order = {name: place for place, (name, _) in enumerate(named)}
        self._chosen = {name for name, p in named if p.requires_grad and self.compresses(name, p)}
        self._shapes = {name: (p.shape, p.element_size()) for name, p in named if p.requires_grad}
        if not self.is_neutral:
            self._buckets = BucketCollector(self._names, self._exchange)
            self._buckets.register(self.model)

    def _announce(self) -> None:
        total = sum(shape.numel() for shape, _ in self._shapes.values())
        inside = sum(self._shapes[name][0].numel() for name in self._chosen)
        if not self.wants_to_compress:
            rank_zero_info(f"{self.label} compresses nothing at this setting: it is DDP.")
        elif self.is_neutral:
            rank_zero_warn(
                f"{self.label} has nothing to compress, and is DDP: no parameter of two or more dimensions has min_numel="
                f"{self.min_numel} entries and is not excluded."
            )
        else:
            rank_zero_info(
                f"{self.label} compresses {len(self._chosen)} of {len(self._shapes)} gradients, {inside:,} of {total:,} "
                f"entries, over {self.world_size} rank(s); the others go dense."
            )

    # One step.

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._in_flight = None  # of a step that the module has left out

    @torch.no_grad()
    def _exchange(self, gradients: list[Gradient]) -> None:
        if self._in_flight is not None:
            raise RuntimeError(
                f"{self.label} needs one backward pass a step, and this step has made a second. Use an optimizer that makes "
                "one, or strategy='ddp'."
            )
        with interrupts_deferred():
            self._exchange_at_once(sorted(gradients, key=lambda gradient: self._order[gradient.name]))

    def _exchange_at_once(self, gradients: list[Gradient]) -> None:
        measured = is_log_step(self._trainer)
        self._watch.start(measured)
        message, self._replayed = self._replayed, None
        self.step = self.ledger.steps - (message is not None)  # a message that is used again was counted already
        owned = owned_ids(self.optimizers[0])
        compressed, dense = self._shared_out(gradients, owned)
        noise: dict[str, float] = {}
        if message is None:
            self.ledger.open(sum(g.values.numel() * g.values.element_size() for g in gradients))
            noise = self._measure_noise(gradients) if measured else {}
            message = self._communicate(compressed, dense, owned)
            self.ledger.close()
        if compressed:
            self.write(compressed, message, message[_DENSE][-1])
        _write_dense(dense, message[_DENSE])
        self._in_flight = message
        self._watch.stop()
        self._measured = self._measure(noise) if measured else {}

    def _measure(self, noise: Mapping[str, float]) -> dict[str, float]:
        own = {"ratio": self.ledger.step_ratio, "residual_norm": self.residual_norm(), **self.figures(), **noise}
        own |= {"bytes_sent": float(self.ledger.step_sent), "compress_ms": 1000 * self._watch.seconds}
        # Residuals differ by rank, and what is monitored must not: everyone logs what rank 0 has. Asked for here, where all
        # ranks are, and not after the update, which an exception may keep some of them from.
        return dict(self.broadcast(own))

    def _shared_out(
        self, gradients: Sequence[Gradient], owned: Collection[int]
    ) -> tuple[list[Gradient], list[Gradient]]:
        # What no optimizer moves goes dense: nobody zeroes such gradients, and a residual of them would grow for nothing.
        chosen = self._chosen if self.is_active else set()
        compressed = [g for g in gradients if g.name in chosen and id(g.parameter) in owned]
        names = {gradient.name for gradient in compressed}
        return compressed, [gradient for gradient in gradients if gradient.name not in names]

    def _communicate(
        self, compressed: Sequence[Gradient], dense: Sequence[Gradient], owned: Collection[int]
    ) -> Message:
        finite = self.prepare_([gradient for gradient in (*compressed, *dense) if id(gradient.parameter) in owned])
        flat = _concatenated([gradient.values for gradient in dense], torch.where(finite, 0.0, torch.nan))
        finish = self.ranks.begin_mean_(flat)
        if not self._is_accumulated:
            self.accumulate(compressed)
        self._is_accumulated = True
        message = self.send(compressed) if compressed else {}
        finish()
        if compressed:
            self.settle(compressed, message, flat[-1].isfinite())
        self._is_accumulated = False
        return {**message, _DENSE: flat}

    def prepare_(self, gradients: Sequence[Gradient]) -> Tensor:
        """Zero the gradients of this rank if one of them is not finite, and return whether all are, a 0-dimensional tensor."""
        finite = _all_finite([gradient.values for gradient in gradients])
        # A look at the CPU waits for nobody, and saves a pass over everything.
        if not finite.is_cpu or not finite.numpy():
            for gradient in gradients:
                gradient.values.masked_fill_(~finite, 0.0)
        return finite

    def _measure_noise(self, gradients: Sequence[Gradient]) -> dict[str, float]:
        if not self.gradient_noise or self.world_size < 2:
            return {}
        flat = [gradient.values for gradient in gradients]
        return {"gradient_noise": self._noise.measure(flat, self.world_size, self.ranks.mean_)}

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        self._buckets.clear()
        try:
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        except BaseException:
            self.release_optimizer()
            raise
        if self._in_flight is not None:
            self._in_flight = None
            self._log_step(self._trainer)
        return output

    def _log_step(self, trainer: pl.Trainer) -> None:
        if self._measured:
            log_many(trainer, {f"{self.namespace}/{key}": value for key, value in self._measured.items()})
            kept = {key: self._measured[key] for key in ("bytes_sent", "ratio", "residual_norm")}
            self.ledger.note({"step": float(trainer.global_step), **kept})

    def residual_norm(self) -> float:
        """Return the 2-norm of what this rank has not sent."""
        residuals = list(self.unsent())
        return float(total_norm(residuals)) if residuals else 0.0

    # Checkpoints: written and read by RankSavingDDP.

    @property
    @override
    def has_state(self) -> bool:
        return not self.is_neutral and (self.ledger.steps > 0 or self._is_accumulated)

    @override
    def rank_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        memory = {name: {key: value.clone() for key, value in kept.items()} for name, kept in self.memory.items()}
        batches: Any = self._trainer.fit_loop.epoch_loop.batch_progress.current
        is_under_way = self._trainer.interrupted and batches.started > batches.processed  # so that the batch runs again
        shared = {
            "in_flight": self._in_flight if is_under_way else None,
            "settings": self._settings_of_messages,
            "ledger": self.ledger.state_dict(),
            "noise": self._noise.state_dict(),
        }
        return {"memory": memory, "is_accumulated": self._is_accumulated}, shared

    @property
    def _settings_of_messages(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.settings.items() if name not in ("residual_policy", "gradient_noise")
        }

    @override
    def load_rank_state(self, own: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
        to, saved = self.root_device, own["memory"]
        self.memory = {
            name: {key: v.to(to) for key, v in saved[name].items()} for name in saved if name in self._chosen
        }
        if len(self.memory) < len(saved):
            lost = ", ".join(sorted(saved.keys() - self._chosen))
            rank_zero_warn(f"{self.label} no longer compresses {lost}: what was not sent of them is lost.")
        self._is_accumulated = own["is_accumulated"]
        message = shared["in_flight"]
        if message is not None and shared["settings"] != self._settings_of_messages:
            rank_zero_warn(f"{self.label} has new settings: the gradient that was exchanged but not used yet is lost.")
            message = None
        self._replayed = None if message is None else {key: value.to(to) for key, value in message.items()}
        self.ledger.load_state_dict(shared["ledger"])
        self._noise.load_state_dict(shared["noise"])

    @override
    def forget_rank_state(self) -> None:
        self.memory, self._replayed, self._is_accumulated = {}, None, False
        self.ledger.load_state_dict(ByteLedger().state_dict())
        self._noise.load_state_dict(None)

    # The fit ends.

    @override
    def on_train_end(self) -> None:
        if not self.ledger.steps:
            return
        trainer = self._trainer
        megabytes = self.ledger.sent_bytes / 1e6
        log_summary(
            trainer,
            {f"{self.namespace}/final_ratio": self.ledger.ratio, f"{self.namespace}/total_megabytes": megabytes},
        )
        _report.report(trainer, self.label, self.ledger, self._layers())

    def _layers(self) -> list[dict[str, Any]]:
        rows = []
        for name, (shape, itemsize) in self._shapes.items():
            dense = shape.numel() * itemsize
            sent = self.sent_bytes(name, shape, itemsize) if name in self._chosen else dense
            rows.append({"layer": name, "entries": shape.numel(), "bytes": sent, "ratio": dense / max(sent, 1)})
        return rows

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        explain_lost_rank(exception, self.label)
        self.disconnect()

    @override
    def teardown(self) -> None:
        self.disconnect()
        self._buckets.clear()
        super().teardown()
        # As Lightning does with optimizers: a checkpoint that is written after the fit still holds them.
        self.memory = {name: {key: v.cpu() for key, v in kept.items()} for name, kept in self.memory.items()}


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    # Neither sums, which overflow, nor maximum norms, which take the CPU twenty times as long.
    extremes = [extreme for tensor in tensors if tensor.numel() for extreme in torch.aminmax(tensor)]
    return torch.stack([extreme.isfinite() for extreme in extremes]).all()


def _concatenated(flat: Sequence[Tensor], last: Tensor) -> Tensor:
    kind = flat[0].dtype if flat else torch.float32
    return torch.cat([*flat, last.to(kind).view(1)])


def _write_dense(gradients: Sequence[Gradient], flat: Tensor) -> None:
    start = 0
    for gradient in gradients:
        end = start + gradient.values.numel()
        torch.add(flat[start:end], flat[-1], out=gradient.values)
        start = end


_OF_DDP = (
    "self",
    "start_method",
    "static_graph",
    "gradient_as_bucket_view",
    "broadcast_buffers",
    "find_unused_parameters",
    "process_group_backend",
    "timeout",
)
