"""Base class of all strategies: DDP whose gradients are exchanged in compressed form. Read this first.

DDP passes its buckets of gradients to a communication hook. The hook here only collects them. After the last bucket
of a backward pass, all gradients are known, and one exchange follows: a small dense message (biases, norms, small
tensors, and a flag for non-finite gradients), and the scheme's messages for the large tensors. A scheme is therefore
four methods on named, flat gradients. It sees no buckets, futures or streams; its collectives run in the same order
on all ranks; its memory is keyed by parameter name.

- ``_scheme.py`` defines the interface of a scheme and its saved state; ``dgc.py`` and ``powersgd.py`` are schemes.
- ``_buckets.py`` is the hook, ``_used_parameters.py`` tracks which parameters got a gradient.
- ``_collectives.py`` communicates with other ranks, ``_ledger.py`` measures.
- ``_rank_saving.py`` begins and ends a fit and saves the memory of each rank, ``_report.py`` draws the figure.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_grad.core import Chosen, check_count, during_fit, is_log_step
from lightning_grad.core.compatibility import Compatibility, manual, no
from lightning_grad.core.record import RunRecord
from lightning_grad.strategies._buckets import BucketCollector, Gradient, all_finite, concatenated, write_dense
from lightning_grad.strategies._collectives import interrupts_deferred
from lightning_grad.strategies._ledger import measure_noise
from lightning_grad.strategies._rank_saving import (
    DEFAULT_TIMEOUT,
    ONE_STRATEGY_EACH,
    RankSavingDDP,
    ResidualPolicy,
    StartMethod,
)
from lightning_grad.strategies._report import draw
from lightning_grad.strategies._scheme import Message, SchemeDDP
from lightning_grad.strategies._used_parameters import UsedParameters, explain_unused_parameters
from lightning_grad.utilities.checks import owned_ids
from lightning_grad.utilities.parameters import as_names, check_patterns
from lightning_grad.utilities.reporting import log_many, log_table, output_file

__all__ = ["CompressedDDPStrategy", "Gradient", "Message", "ResidualPolicy"]

_DENSE, _USED = "dense", "used"

_NO_SCALER = no(
    "adds up gradients over steps, and {} changes their scale between steps",
    "Use precision='bf16-mixed', or strategy='ddp'",
)


class CompressedDDPStrategy(SchemeDDP):
    r"""DDP that exchanges compressed gradients, and keeps and saves the unsent part on each rank.

    Subclasses implement ``accumulate``, ``send``, ``settle`` and ``write``. Together they replace the all-reduce of
    the tensors that :meth:`compresses` selects; DDP's average is used for all others. Every scheme has these
    properties:

    - ``memory[name]`` is the scheme's dictionary of tensors for a parameter (a residual, a velocity, a factor). Each
      rank saves its own in ``<checkpoint>.ranks``; a fit that resumes restores it bit for bit.
    - A non-finite gradient on one rank makes every gradient NaN on all ranks, so a guard
      (:class:`~lightning_grad.callbacks.SkipNonFinite`) skips the step everywhere. The gradient never enters the
      memory, and nothing counts as sent in such a step.
    - Resuming is exact after an exception too. Ctrl-C is deferred to the end of an exchange. If an exchange has
      finished but its update has not, the checkpoint holds the message, and the repeated batch uses it. If another
      rank was lost during an exchange, the checkpoint records that the gradient is already in the memory.
    - Gradients of parameters that no optimizer holds are sent dense.
    - With ``find_unused_parameters=True`` or ``static_graph=True``, a parameter that no rank used in a step sends
      nothing and keeps its memory and its gradient, as under DDP. If only some ranks used it, the others contribute
      zeros.

    Args:
        exclude: Names or wildcards of parameters or modules whose gradients are sent dense.
        min_numel: Gradients with fewer entries are sent dense.
        residual_policy: What to do if rank files do not fit on resume: 'strict', 'mean' or 'reset'.
            'strict' raises if the number of ranks differs or files are missing; 'mean' gives every rank the mean over
            the old ranks; 'reset' starts without unsent gradients.
        log_noise_scale: Log comm/noise_scale at log steps; costs one more small all-reduce in each.
        start_method: How Lightning starts the ranks of a node: 'popen', 'spawn', 'fork' or 'forkserver'.
        static_graph: DDP's option of the same name.
        gradient_as_bucket_view: DDP's option of the same name: saves one copy of the gradients.
        broadcast_buffers: DDP's option of the same name: send rank 0's buffers before each forward pass.
        find_unused_parameters: DDP's option of the same name: some parameters may get no gradient.
        process_group_backend: 'nccl' or 'gloo'; by default chosen for the device.
        timeout: Time limit of a collective.

    Raises:
        ValueError: For invalid arguments; in ``setup`` for what cannot be compressed: manual optimization, several
            optimizers, an fp16 GradScaler, sparse or complex gradients.

    **Logs** at log steps, from rank 0: ``comm/bytes_sent`` (bytes that this rank passes to collectives in the step),
    ``comm/ratio`` (bytes of the gradients divided by ``bytes_sent``), ``comm/residual_norm`` (2-norm of what this
    rank has not sent), ``comm/compress_ms`` (milliseconds of the exchange, without waiting), and ``comm/noise_scale``
    (in batches of one rank) if enabled. At the end: a figure, a table of layers, and ``comm/final_ratio`` and
    ``comm/total_megabytes`` in the summary.
    """

    compatibility: ClassVar[Compatibility] = Compatibility(
        fp16=_NO_SCALER,
        fused_fp16=_NO_SCALER,
        **ONE_STRATEGY_EACH,
        **manual(
            no(
                "does not work with {}: a backward pass must end in one optimizer step",
                "Use strategy='ddp', or automatic optimization",
            )
        ),
        sparse_gradients=no(
            "needs dense gradients, and {} creates sparse ones", "Build it with sparse=False, or use strategy='ddp'"
        ),
        complex_parameters=no("compresses only real gradients, and {} has complex ones", "Use strategy='ddp'"),
    )

    _used = during_fit[UsedParameters](lambda _: UsedParameters({}))
    _measured = during_fit.of(dict[str, float])
    _buckets = during_fit[BucketCollector](lambda self: BucketCollector({}, self._exchange))

    def __init__(
        self,
        exclude: Sequence[str] | None = None,
        min_numel: int = 1024,
        residual_policy: ResidualPolicy = "strict",
        log_noise_scale: bool = False,
        start_method: StartMethod = "popen",
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        broadcast_buffers: bool = True,
        find_unused_parameters: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(**RankSavingDDP.own_arguments(locals()))
        self.exclude = as_names(exclude)
        self.min_numel = check_count(min_numel, 1, "min_numel")
        self.log_noise_scale = log_noise_scale
        self._finds_unused, self._is_static = find_unused_parameters or static_graph, static_graph

    def base_arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the base class from the ``locals()`` of a subclass's constructor."""
        return CompressedDDPStrategy.own_arguments(given)

    # The fit begins.

    @override
    def refuse(self, trainer: pl.Trainer) -> None:
        super().refuse(trainer)
        check_patterns(trainer.lightning_module, self.display_name, exclude=self.exclude)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        if len(self.optimizers) != 1:
            raise ValueError(
                f"{self.display_name} works with one optimizer, but "
                f"{type(trainer.lightning_module).__name__}.configure_optimizers returned {len(self.optimizers)}. Put "
                "their parameters into groups of one optimizer, or use strategy='ddp'."
            )
        if isinstance(self.optimizers[0], LBFGS):
            raise ValueError(
                f"{self.display_name} needs one backward pass per step, but LBFGS runs several. Use another optimizer, or "
                "strategy='ddp'."
            )
        self.connect_optimizer(self.optimizers[0])

    def connect_optimizer(self, optimizer: Optimizer) -> None:
        """Raise for an optimizer that does not fit the scheme; otherwise attach to it and register the undo.

        Raises:
            ValueError: With the reason and what to do instead.
        """

    @override
    def _register_ddp_hooks(self) -> None:
        # Lightning registers communication hooks on CUDA only, and does not warn on other devices.
        assert isinstance(self.model, DistributedDataParallel)
        self._inspect(self.model)
        if self.is_neutral:
            return
        self._buckets = BucketCollector(self._names, self._exchange)
        self._buckets.register(self.model)
        self.undo.push(self._buckets.clear)
        self._used = UsedParameters({name: self._parameters[name] for name in self._shapes}, self._is_static)
        if self._finds_unused:
            self._used.attach(self.undo)

    def chosen(self) -> Chosen:
        """Return the parameters whose gradients are compressed in this fit, as a sentence and a list.

        Raises:
            RuntimeError: Before ``setup`` of a fit.
        """
        if not self._shapes:
            raise self.asked_too_early("what it compresses")
        names = [name for name in self._shapes if name in self._chosen]
        return Chosen(self._words, "parameters", names)

    @property
    def _words(self) -> str:
        if not self.wants_to_compress:
            return "compresses nothing at this setting: it is plain DDP"
        if self.is_neutral:
            return "has nothing to compress and is plain DDP"
        total = sum(shape.numel() for shape, _ in self._shapes.values())
        inside = sum(self._shapes[name][0].numel() for name in self._chosen)
        return (
            f"compresses {len(self._chosen)} of {len(self._shapes)} gradients, {inside:,} of {total:,} entries, over "
            f"{self.world_size} rank(s); the others go dense"
        )

    @override
    def announce(self) -> None:
        if self.wants_to_compress and self.is_neutral:
            rank_zero_warn(
                f"{self.display_name} {self._words}: every parameter of two or more dimensions is excluded or "
                f"has fewer than min_numel={self.min_numel} entries. Lower min_numel, or exclude less."
            )
        else:
            rank_zero_info(f"{self.display_name} {self._words}.{self.remark if self.wants_to_compress else ''}")

    # One step.

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._in_flight = None  # of a step that the module skipped

    @torch.no_grad()
    def _exchange(self, gradients: list[Gradient]) -> None:
        if self._in_flight is not None:
            raise RuntimeError(
                f"{self.display_name} needs one backward pass per step, but this step ran a second. Use an optimizer "
                "that runs one, or strategy='ddp'."
            )
        with interrupts_deferred():
            order = self._order
            self._exchange_at_once(sorted(gradients, key=lambda gradient: order[gradient.name]))

    def _exchange_at_once(self, gradients: list[Gradient]) -> None:
        """Exchange the gradients, or replay the message of an interrupted run, and write the result into them."""
        measured = is_log_step(self._trainer)
        self._watch.start(measured)
        message, self._replayed = self._replayed, None
        self.step = self.ledger.steps - (message is not None)  # a replayed message was already counted
        owned = owned_ids(self.optimizers[0])
        noise: dict[str, float] = {}
        if message is None:
            self.ledger.open(sum(g.values.numel() * g.values.element_size() for g in gradients))
            used = {_USED: self._used.agree(self.ranks, self.root_device, owned)} if self._finds_unused else {}
            compressed, dense = self._split(gradients, owned, used)
            noise = self._measure_noise(gradients) if measured else {}
            finite = self.prepare_([g for g in (*compressed, *dense) if id(g.parameter) in owned])
            message = {**self._communicate(compressed, dense, finite), **used}
            self.ledger.close()
        else:
            compressed, dense = self._split(gradients, owned, message)
            self._used.forget()
        if compressed:
            self.write(compressed, message, message[_DENSE][-1])
        write_dense(dense, message[_DENSE])
        if _USED in message:
            _, past_ddp = self._used.names(message[_USED])
            for gradient in (*compressed, *dense):
                if gradient.name in past_ddp and gradient.parameter.grad is not None:
                    gradient.parameter.grad.copy_(gradient.shaped)
        self._in_flight = message
        self._watch.stop()
        self._measured = self._measure(noise) if measured else {}

    def _measure(self, noise: Mapping[str, float]) -> dict[str, float]:
        own = {"ratio": self.ledger.step_ratio, "residual_norm": self.residual_norm(), **self.figures(), **noise}
        own |= {"bytes_sent": float(self.ledger.step_sent), "compress_ms": 1000 * self._watch.seconds}
        # Residuals differ between ranks, but monitored values must not: all ranks log the values of rank 0. They are
        # broadcast here, where all ranks are: an exception may keep some ranks from reaching the end of the update.
        return dict(self.broadcast(own))

    def _split(
        self, gradients: Sequence[Gradient], owned: Collection[int], message: Message
    ) -> tuple[list[Gradient], list[Gradient]]:
        """Return the gradients to compress and those to send dense, without parameters that no rank used."""
        if _USED in message:
            used, _ = self._used.names(message[_USED])
            gradients = [gradient for gradient in gradients if gradient.name in used]
        # Gradients that no optimizer holds are never zeroed, so their residuals would grow without bound: send them dense.
        chosen = self._chosen if self.is_active else set()
        compressed = [g for g in gradients if g.name in chosen and id(g.parameter) in owned]
        names = {gradient.name for gradient in compressed}
        return compressed, [gradient for gradient in gradients if gradient.name not in names]

    def _communicate(self, compressed: Sequence[Gradient], dense: Sequence[Gradient], finite: Tensor) -> Message:
        """Start to average the dense gradients, and meanwhile accumulate and send the compressed ones."""
        flat = concatenated([gradient.values for gradient in dense], torch.where(finite, 0.0, torch.nan))
        finish = self.ranks.begin_mean_(flat)
        # After an exception during the exchange the memory has them already, except those that only the repeated step uses.
        fresh = [g for g in compressed if not self._is_accumulated or g.name not in self.memory]
        if fresh:
            self.accumulate(fresh)
        self._is_accumulated = True
        message = self.send(compressed) if compressed else {}
        finish()
        if compressed:
            self.settle(compressed, message, flat[-1].isfinite())
        self._is_accumulated = False
        return {**message, _DENSE: flat}

    def prepare_(self, gradients: Sequence[Gradient]) -> Tensor:
        """Zero the gradients of this rank if any is non-finite; return whether all are finite, as a 0-dimensional tensor."""
        if not any(gradient.values.numel() for gradient in gradients):  # this step uses no parameter of an optimizer
            return torch.ones((), dtype=torch.bool, device=self.root_device)
        finite = all_finite([gradient.values for gradient in gradients])
        # On a CPU this test needs no sync, and it usually avoids rewriting all gradients.
        if not finite.is_cpu or not finite.numpy():
            for gradient in gradients:
                gradient.values.masked_fill_(~finite, 0.0)
        return finite

    def _measure_noise(self, gradients: Sequence[Gradient]) -> dict[str, float]:
        if not self.log_noise_scale or self.world_size < 2:
            return {}
        flat = [gradient.values for gradient in gradients]
        self._noise = measure_noise(self._noise, flat, self.world_size, self.ranks.mean_)
        noise, signal = self._noise.tolist()
        return {"noise_scale": noise / signal if signal > 0 else math.inf}

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
            log_many(trainer, {self.log_key(key): value for key, value in self._measured.items()})
            kept = {key: self._measured[key] for key in ("bytes_sent", "ratio", "residual_norm")}
            self.ledger.record.add({"step": trainer.global_step, **kept})
            self.ledger.record.save(trainer, self)

    # The fit ends.

    @override
    def on_train_end(self) -> None:
        if not self.ledger.steps:
            return
        trainer, layers, record = self._trainer, self._layers(), self.ledger.record
        if not record.count:  # the run was shorter than log_every_n_steps
            record = RunRecord()
            own = {"bytes_sent": float(self.ledger.step_sent), "ratio": self.ledger.step_ratio}
            record.add({"step": trainer.global_step, **own, "residual_norm": self.residual_norm()})
        summary = {"final_ratio": self.ledger.ratio, "total_megabytes": self.ledger.sent_bytes / 1e6}
        figure = partial(draw, self.display_name, self.ledger, record, layers)
        record.report(trainer, self, figure, summary=summary, figure="summary")
        log_table(trainer, self.log_key("layers"), layers, output_file(trainer, self.display_name, "_layers.csv"))

    def _layers(self) -> list[dict[str, Any]]:
        rows = []
        for name, (shape, itemsize) in self._shapes.items():
            dense = shape.numel() * itemsize
            sent = self.sent_bytes(name, shape, itemsize) if name in self._chosen else dense
            rows.append({"layer": name, "entries": shape.numel(), "bytes": sent, "ratio": dense / max(sent, 1)})
        return rows

    @override
    def explain(self, exception: BaseException) -> None:
        explain_unused_parameters(exception, self.display_name, self._parameters)

    @override
    def teardown(self) -> None:
        super().teardown()
        # Like Lightning's optimizers: a checkpoint that is written after the fit still contains them.
        self.memory = {name: {key: v.cpu() for key, v in kept.items()} for name, kept in self.memory.items()}
