"""Base class of strategies that exchange weights once in a while instead of gradients in every step.

Ranks train apart: no DDP is wrapped around the module, so a backward pass does not communicate. After
``sync_every_n_steps`` optimizer steps, ``_outer_model.py`` exchanges what the ranks have moved. Read it next. For the
first share of the run, ``dense_fraction``, the strategy is plain DDP.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core.callback import Chosen, GradCallback
from lightning_grad.core.compatibility import Compatibility, manual, no
from lightning_grad.core.dispatch import wrap_method
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.progress import run_progress
from lightning_grad.strategies._collectives import interrupts_deferred
from lightning_grad.strategies._local_refusals import (
    refuse_averages,
    refuse_endless,
    refuse_synchronized_statistics,
    refuse_uneven_batches,
)
from lightning_grad.strategies._move_codecs import Int8, MoveCodec, TopK
from lightning_grad.strategies._outer_model import OuterModel, OuterRule
from lightning_grad.strategies._rank_files import State
from lightning_grad.strategies._rank_saving import (
    DEFAULT_TIMEOUT,
    ONE_STRATEGY_EACH,
    RankSavingDDP,
    ResidualPolicy,
    StartMethod,
    clean_parameters,
)
from lightning_grad.strategies._used_parameters import explain_unused_parameters
from lightning_grad.utilities.checks import check_between, check_count, check_ratio
from lightning_grad.utilities.parameters import clean_name
from lightning_grad.utilities.reporting import is_log_step, log_many

Compression = Literal["none", "topk", "int8"]

_NO_SCALER = no(
    "lets each rank train on its own, and {} would change its scale and skip steps on each rank alone",
    "Use precision='bf16-mixed', or strategy='ddp'",
)


class LocalStepsDDP(RankSavingDDP):
    """Trains ranks apart and lets a rule of the subclass bring them together again.

    Args:
        sync_every_n_steps: Optimizer steps of a round.
        dense_fraction: First share of the run that is plain DDP.
        compression: How to compress the moves.
        ratio: Share of entries of a compressed move.
        residual_decay: Factor of the residual per exchange.
        min_numel: Smaller moves are not compressed.
        overlap: Whether ranks train on while a message is on its way.
        average_frozen: Whether to exchange parameters that no optimizer holds.
    """

    kept: ClassVar[str] = "local states"
    exchanged: ClassVar[str] = "weights of round"
    when_neutral: ClassVar[str] = "is plain DDP now"

    compatibility: ClassVar[Compatibility] = Compatibility(
        fp16=_NO_SCALER,
        fused_fp16=_NO_SCALER,
        **ONE_STRATEGY_EACH,
        **manual(
            no(
                "counts optimizer steps, and under {} ranks could take different numbers of them",
                "Use automatic optimization, or strategy='ddp'",
            )
        ),
        weight_averaging=no(
            "lets ranks train apart, and {} would average the weights of each rank alone",
            "Remove it (the weights of an exchange are an average already), or use strategy='ddp'",
        ),
        complex_parameters=no("averages only real weights, and {} has complex ones", "Use strategy='ddp'"),
    )

    memory = until_next_fit.of(dict[str, dict[str, Tensor]])
    _outer = until_next_fit[OuterModel](lambda self: OuterModel(self.outer_rule, self._codec, self.memory))
    _taken = until_next_fit.of(int)  # steps in this round
    _is_dense = until_next_fit[bool](lambda self: self.dense_fraction > 0)
    _bytes_of_step = until_next_fit.of(int)
    _is_unlogged = until_next_fit.of(bool)  # the last exchange
    _held = during_fit.of(list[int])
    _chosen = during_fit.of(dict[str, Tensor])

    def __init__(
        self,
        sync_every_n_steps: int,
        dense_fraction: float = 0.0,
        compression: Compression = "none",
        ratio: float = 0.03,
        residual_decay: float = 1.0,
        min_numel: int = 1024,
        overlap: bool = False,
        average_frozen: bool = False,
        residual_policy: ResidualPolicy = "strict",
        start_method: StartMethod = "popen",
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        broadcast_buffers: bool = True,
        find_unused_parameters: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(**RankSavingDDP.own_arguments(locals()))
        self.sync_every_n_steps = check_count(sync_every_n_steps, 1, "sync_every_n_steps")
        self.dense_fraction = check_between(dense_fraction, 0.0, 1.0, "dense_fraction")
        self.compression = compression
        self.ratio = check_ratio(ratio, "ratio")
        self.residual_decay = check_between(residual_decay, 0.0, 1.0, "residual_decay")
        self.min_numel = check_count(min_numel, 1, "min_numel")
        self.overlap = overlap
        self.average_frozen = average_frozen
        self._sends_buffers = broadcast_buffers

    # What a strategy defines.

    @property
    @abstractmethod
    def outer_rule(self) -> OuterRule:
        """How the outer model moves."""

    @property
    def _codec(self) -> MoveCodec | None:
        if self.compression == "topk":
            return TopK(self.ratio, self.min_numel, self.residual_decay)
        return Int8(self.min_numel, self.residual_decay) if self.compression == "int8" else None

    @property
    @override
    def is_neutral(self) -> bool:
        return self.dense_fraction >= 1.0

    @property
    def has_local_steps(self) -> bool:
        """Whether ranks train apart at any time in the run."""
        return not self.is_neutral

    @property
    def gradient_is_local(self) -> bool:
        """Whether ``.grad`` is now the gradient of this rank alone."""
        return self.has_local_steps and not self._is_dense

    @override
    def works_with(self) -> Compatibility:
        return PLAIN if self.is_neutral else self.compatibility

    # The fit begins.

    @override
    def refuse(self, trainer: pl.Trainer) -> None:
        super().refuse(trainer)
        if self.is_neutral:
            return
        refuse_synchronized_statistics(self.display_name, trainer.lightning_module, self._layer_sync is not None)

    @override
    def configure_ddp(self) -> None:
        if self._is_dense:
            super().configure_ddp()
        else:
            assert self.model is not None
            _sync_module_states(self.model)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if trainer.strategy is self and trainer.state.fn == "fit" and not self.is_neutral:
            self.undo.push(wrap_method(trainer.fit_loop, "on_run_end", self._before_the_end))
            self.undo.push(wrap_method(trainer.fit_loop.epoch_loop.val_loop, "run", self._show_everywhere))
            self.undo.push(wrap_method(trainer, "save_checkpoint", self._show))

    def _show_everywhere(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._catch_up()
        return self._show(inner, *args, **kwargs)

    def _show(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.memory:
            self._adopt()  # a module may have replaced buffers by new ones since
        with self._outer.shown(self._taken > 0):
            return inner(*args, **kwargs)

    @override
    def announce(self) -> None:
        self._choose()
        rank_zero_info(f"{self.display_name} {self._words}.")

    def chosen(self) -> Chosen:
        """Return the parameters that ranks exchange in this fit, as a sentence and a list.

        Raises:
            RuntimeError: Before ``setup`` of a fit.
        """
        if not self._held:
            raise self.asked_too_early("what ranks exchange")
        return Chosen(self._words, "parameters", list(self._chosen))

    @property
    def _words(self) -> str:
        if self.is_neutral:
            return "exchanges gradients in every step at this setting: it is plain DDP"
        numel = sum(parameter.numel() for parameter in self._chosen.values())
        start = f", after the first {100 * self.dense_fraction:g} % of the run" if self._is_dense else ""
        return (
            f"exchanges {len(self._chosen)} weights, {numel:,} entries, over {self.world_size} rank(s) every "
            f"{self.sync_every_n_steps} steps{start}. In between, gradients, clipping and logged norms are those of one "
            "rank, and validation and checkpoints have the model of the last exchange"
        )

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self.is_neutral:
            return
        refuse_averages(self.display_name, self._trainer)
        if self._is_dense:
            refuse_endless(self.display_name, self._trainer, self.dense_fraction)
        refuse_uneven_batches(self.display_name, self._trainer, self.ranks)

    # One step.

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.is_neutral:
            return
        has_others = self._choose()
        if not self._is_dense:
            if self._outer.misses_constants:
                self._catch_up()
            if has_others or not self.memory:
                self._adopt()

    def _choose(self) -> bool:
        """Note which parameters take part, and return whether they are others than before.

        A callback may freeze or unfreeze some. One that is frozen within a round is exchanged once more.
        """
        held = [id(p) for o in self.optimizers for group in o.param_groups for p in group["params"] if p.requires_grad]
        if held == self._held:
            return False
        assert self.lightning_module is not None
        named, owned = clean_parameters(self.lightning_module), set(held)
        is_apart = self._taken > 0 or self._outer.pending is not None
        self._chosen = {
            name: p
            for name, p in named.items()
            if id(p) in owned or (self.average_frozen and p.is_floating_point()) or (is_apart and name in self.memory)
        }
        self._held = held
        self._bytes_of_step = sum(p.numel() * p.element_size() for p in self._chosen.values() if id(p) in owned)
        return True

    def _adopt(self) -> None:
        self._outer.adopt(self._chosen, self._buffers())

    def _buffers(self) -> dict[str, Tensor]:
        """Return the buffers to exchange: those in the module's state; all others can be derived, and stay on their rank."""
        return self._saved_buffers() if self._sends_buffers else {}

    def _saved_buffers(self) -> dict[str, Tensor]:
        assert self.lightning_module is not None
        found: dict[int, tuple[str, Tensor]] = {}
        for place, module in self.lightning_module.named_modules():
            for name in module._buffers.keys() - module._non_persistent_buffers_set:
                buffer = module._buffers[name]
                if buffer is not None and not buffer.is_complex():
                    found.setdefault(id(buffer), (clean_name(f"{place}.{name}" if place else name), buffer))
        return dict(sorted(found.values(), key=lambda pair: pair[0]))

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if not self.is_neutral:
            self._after_step()
        return output

    def _after_step(self) -> None:
        progress = run_progress(self._trainer, steps_ahead=1)
        if self._is_dense:
            self._count_dense_step()
            if progress >= self.dense_fraction:
                self._leave_ddp()
        else:
            self._taken += 1
            if self._taken >= self.sync_every_n_steps or progress >= 1.0:
                self._exchange(last=progress >= 1.0)
        if self._is_unlogged and (is_log_step(self._trainer) or progress >= 1.0):
            self._catch_up()
            self._log_step(self._trainer)

    def _count_dense_step(self) -> None:
        self.ledger.open(self._bytes_of_step)
        self.ledger.step_sent = self._bytes_of_step
        self.ledger.close()
        self._is_unlogged = True

    def _leave_ddp(self) -> None:
        """Train apart from now on. Ranks have equal weights, and rank 0's buffers are sent once more."""
        self._is_dense = False
        assert isinstance(self.model, DistributedDataParallel)
        self.model._remove_autograd_hooks()  # type: ignore[no-untyped-call]
        self.model = self.lightning_module
        assert self.model is not None
        _sync_module_states(self.model)

    @torch.no_grad()
    def _exchange(self, last: bool) -> None:
        """Exchange what the ranks moved in this round, and begin the next."""
        with interrupts_deferred():
            self.ledger.open(self._taken * self._bytes_of_step)
            self._outer.adopt(self._chosen, self._buffers())
            self._outer.exchange(self.ranks, last)
            self.ledger.close()
            self._taken = 0
            self._is_unlogged = True
            if len(self._chosen) > len(self._held):
                self._held = []  # look again for parameters that were frozen meanwhile

    def _catch_up(self) -> None:
        """Exchange buffers that began to change, at a time when waiting for the device does no harm."""
        if self.memory:
            with interrupts_deferred():
                before = self.ledger.step_sent
                self._adopt()  # a module may have replaced buffers by new ones since
                self._outer.catch_up(self.ranks, self._taken > 0)
                self.ledger.sent_bytes += self.ledger.step_sent - before

    def _before_the_end(self, inner: Callable[[], Any]) -> Any:
        """Bring the ranks together before anything that runs at the end of the training."""
        if self._taken:
            self._exchange(last=True)
        elif self.memory:
            self._adopt()
            self._outer.finish()
        self._catch_up()
        if self._is_unlogged:
            self._log_step(self._trainer)
        return inner()

    def _log_step(self, trainer: pl.Trainer) -> None:
        self._is_unlogged = False
        values = {"bytes_sent": float(self.ledger.step_sent), "ratio": self.ledger.ratio}
        if self._outer.statistics is not None:
            moved, unsent, mean = self._outer.statistics.tolist()
            values |= {"move_norm": mean**0.5, "agreement": mean / moved if moved else 1.0}
            if self.compression != "none":
                values["residual_norm"] = unsent**0.5
        log_many(trainer, {self.log_key(key): value for key, value in values.items()})
        megabytes = {"megabytes": self.ledger.sent_bytes / 1e6, "dense_megabytes": self.ledger.dense_bytes / 1e6}
        self.ledger.record.add({"step": trainer.global_step, **values, **megabytes})
        self.ledger.record.save(trainer, self)

    # Loading and saving.

    @override
    def named_tensors(self) -> dict[str, Tensor]:
        return {**super().named_tensors(), **self._saved_buffers()}

    @property
    @override
    def has_state(self) -> bool:
        return super().has_state or self._taken > 0

    @override
    def rank_state(self) -> State:
        own, shared = self._outer.state(self._taken > 0)
        shared |= {"taken": self._taken, "is_dense": self._is_dense, "ledger": self.ledger.state_dict()}
        if own["pending"]:
            own["pending"]["ranks"] = self.world_size
        return own, shared if self.is_global_zero else {}

    @override
    def state_beyond(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        # Optimizers and our callbacks see the steps of their rank only, so their states differ.
        own = {c.state_key for c in self._trainer.callbacks if isinstance(c, GradCallback)}  # type: ignore[attr-defined]
        states = {key: state for key, state in checkpoint["callbacks"].items() if key in own}
        return {"optimizers": checkpoint["optimizer_states"], "callbacks": states}

    @override
    def forget_rank_state(self) -> None:
        self.memory.clear()
        self._taken = 0
        if self.dense_fraction > 0 and not self._is_dense:  # a learning rate finder has trained before the run
            self._is_dense = True
            self.configure_ddp()

    @override
    def load_rank_state(self, own: Mapping[str, Any], shared: Mapping[str, Any], changed: set[str]) -> None:
        self.ledger.load_state_dict(shared["ledger"])
        DDPStrategy.load_optimizer_state_dict(self, {"optimizer_states": own["optimizers"]})
        if not self.is_global_zero:
            for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
                if callback.state_key in own["callbacks"]:
                    callback.load_state_dict(own["callbacks"][callback.state_key])
        if self._is_dense and not shared["is_dense"]:
            self._leave_ddp()
        self._taken = shared["taken"]
        if self._is_dense or not shared["outer"]:
            return
        self._outer.load(own, shared, self.named_tensors())
        self._held = []
        self._choose()
        self._adopt()
        if own["pending"] and own["pending"]["ranks"] == self.world_size and not changed:
            self._outer.send_again(self.ranks, own["pending"], self.root_device)
        elif own["pending"]:
            rank_zero_warn(
                f"{self.display_name} has new settings or ranks: the moves that were on their way are lost, those of one "
                "round."
            )

    # The fit ends.

    @override
    def explain(self, exception: BaseException) -> None:
        assert self.lightning_module is not None
        explain_unused_parameters(exception, self.display_name, clean_parameters(self.lightning_module))

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self.is_neutral or not self.ledger.steps:
            return
        summary = {"final_ratio": self.ledger.ratio, "total_megabytes": self.ledger.sent_bytes / 1e6}
        self.ledger.record.report(self._trainer, self, summary=summary, figure="summary")

    @override
    def teardown(self) -> None:
        super().teardown()
        # Like Lightning's optimizers: a checkpoint that is written after the fit still contains them.
        for kept in self.memory.values():
            kept.update({key: value.cpu() for key, value in kept.items()})


PLAIN = Compatibility(**ONE_STRATEGY_EACH)
