"""1-bit Adam: after a warm-up, freeze Adam's variance and exchange the signs of its momentum.

The mathematics is in ``functional/communication``: ``sign_messages`` (one bit an entry) and ``onebit_adam`` (the update);
``_frozen_adam.py`` makes the user's Adam do it. Read ``compressed_ddp.py`` first.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core.compatibility import Compatibility, no
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.functional import gradient_of_momentum, pack_signs, sign_bytes, split_parts, unpack_signs
from lightning_grad.functional.communication.sign_messages import part_numel
from lightning_grad.strategies._buckets import Gradient
from lightning_grad.strategies._frozen_adam import FrozenAdam, why_not_frozen
from lightning_grad.strategies._local_clip import LocallyClippedDDP, clip_before
from lightning_grad.strategies._rank_files import State
from lightning_grad.strategies._rank_saving import DEFAULT_TIMEOUT, ResidualPolicy, StartMethod
from lightning_grad.strategies._scheme import Message
from lightning_grad.strategies.compressed_ddp import CompressedDDPStrategy
from lightning_grad.utilities.checks import check_finite_above

_SIGNS, _RANKS, _COUNTED_FROM = "signs", "ranks", "counted_from"
_WORKER, _SERVER = "worker", "server"  # rank r serves "server/r", so means over ranks keep the parts apart


class OneBitAdamStrategy(LocallyClippedDDP):
    r"""Train with plain Adam for a while, then freeze its variance and exchange the signs of its momentum (1-bit Adam).

    .. math::
        x_r = \beta_1 m_{t-1} + (1 - \beta_1) g_r + e_r, \qquad
        q_r = C(x_r), \qquad e_r \leftarrow x_r - q_r

    .. math::
        y = \frac{1}{N} \sum_r q_r + E, \qquad m_t = C(y), \qquad E \leftarrow y - m_t, \qquad
        \theta \leftarrow \theta - \eta \, \frac{m_t / (1 - \beta_1^t)}{\sqrt{\hat v} + \epsilon}

    Here :math:`g_r` is the gradient of rank :math:`r` of :math:`N`, :math:`e_r` its error (what it has not sent), and
    :math:`C(x)` has the signs of :math:`x` and its mean magnitude. Each rank averages one part of every tensor, so the
    error :math:`E` of the average is split over the ranks. :math:`\hat v` is Adam's bias-corrected variance of the update at
    which a tensor was frozen. An entry needs one bit in each direction, so a rank sends up to 32 times less than float32
    gradients, for any number of ranks. Vectors and small tensors are averaged as in DDP, and Adam updates them as usual.

    Your ``torch.optim.Adam`` or ``AdamW`` stays the optimizer: its momentum and variance keep their places in its state,
    and param groups are read in every step, so schedules work. ``.grad`` holds the gradient with which Adam moves its
    momentum to :math:`m_t`.

    Args:
        freeze_step: Updates of a tensor by plain Adam before its variance is frozen; None never freezes.
            The paper uses 15 to 20 % of the run. None is DDP.
        variance_floor: Least variance of an entry, as a share of the mean variance of its tensor.
        local_clip: Norm to which the mean gradient would be clipped; None does not clip.
            Each rank clips its own gradient to this norm times the square root of the number of ranks, before it is
            exchanged.
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
        TypeError: For an argument of the wrong type.
        ValueError: For a ``freeze_step`` below 1, or a ``variance_floor`` or ``local_clip`` that is not positive and
            finite; in ``setup`` for an optimizer other than Adam and AdamW, ``Trainer(gradient_clip_val)``, a callback that
            resets moments, several optimizers, manual optimization, an fp16 GradScaler, sparse or complex gradients; when
            training starts if a callback has replaced the optimizer; on resume for rank files that do not fit.

    **Hooks**: DDP's communication hook, which exchanges all gradients after the last bucket of a backward pass: one
    all-to-all and one all-gather for the signs, and one all-reduce for the dense gradients; a pre-hook and a post-hook of the
    optimizer's step, between which it updates only what is not frozen.

    **Logs** at log steps, from rank 0: ``comm/bytes_sent``, ``comm/ratio``, ``comm/residual_norm``,
    ``comm/compress_ms``, ``comm/frozen`` (share of the selected tensors that are frozen), and ``comm/noise_scale`` if
    enabled. At the end: ``one_bit_adam_strategy.png``, ``one_bit_adam_strategy.csv``,
    ``one_bit_adam_strategy_layers.csv``, and ``comm/final_ratio`` and ``comm/total_megabytes`` in the summary.

    **State**: each rank saves its error of each frozen tensor, and the error of the part that it averages, in
    ``<checkpoint>.ranks``. The checkpoint itself is DDP's: it loads under DDP and on one device, where Adam goes on.

    **Cost**: 1 + 1/N numbers in memory per frozen entry, and during an exchange three more. The host waits for the device once
    per tensor, when it is frozen.

    A single rank also trains on signs.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = OneBitAdamStrategy(freeze_step=2000)
        >>> trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)

        .. code-block:: yaml

            trainer:
              devices: 2
              strategy:
                class_path: lightning_grad.strategies.OneBitAdamStrategy
                init_args:
                  freeze_step: 2000

    References:
        - Tang et al. (2021), 1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed, arXiv
          2102.02888, algorithm 1. Differences: bias correction stays as in the user's Adam; the magnitude is the mean of
          :math:`|x|`, which has the least squared error, and each rank's part of a tensor has its own; vectors are sent
          dense; the variance has a floor. The released code (DeepSpeed's ``OneBitAdam``) sets the momentum of entries
          that never had a gradient to zero instead. Our defaults: ``freeze_step=1000`` is the memory of a variance with
          :math:`\beta_2 = 0.999`; ``variance_floor=0.01`` limits the step of an entry without a gradient to ten times that
          of an average one.
    """

    compatibility: ClassVar[Compatibility] = CompressedDDPStrategy.compatibility.but(
        gradient_clip_val=clip_before(
            "OneBitAdamStrategy", "exchanges momentum as signs, and {} would clip what the signs decode to"
        ),
        no_second_moment=no(
            "freezes the variance (exp_avg_sq) of Adam, and {} keeps none",
            "Train with torch.optim.Adam or AdamW, or use strategy='ddp_powersgd'",
        ),
    )
    trial: ClassVar[Mapping[str, Any]] = {"freeze_step": 1, "min_numel": 100}
    neutral: ClassVar[Mapping[str, Any] | str] = {"freeze_step": None}

    _adam = during_fit[FrozenAdam]()
    _sent = during_fit.of(dict[str, tuple[Tensor, Tensor]])  # the errors of this exchange, by name

    # Needed by checkpoints that are written after the fit or after an exception.
    _counted_from = until_next_fit.of(dict[str, int])  # updates of tensors that had no gradient until then, by name

    def __init__(
        self,
        freeze_step: int | None = 1000,
        variance_floor: float = 0.01,
        local_clip: float | None = None,
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
        super().__init__(**self.base_arguments(locals()))
        if freeze_step is not None and freeze_step < 1:
            raise ValueError(
                "freeze_step must be at least 1, because the variance must be estimated before it is frozen; got "
                f"{freeze_step}. Use 15 to 20 % of the steps of the run, or None to never freeze it."
            )
        self.freeze_step = freeze_step
        self.variance_floor = check_finite_above(variance_floor, 0.0, "variance_floor")
        self.local_clip = check_finite_above(local_clip, 0.0, "local_clip")

    # The fit begins.

    @property
    @override
    def wants_to_compress(self) -> bool:
        return self.freeze_step is not None

    @override
    def compresses(self, name: str, parameter: Tensor) -> bool:
        return super().compresses(name, parameter) and self.wants_to_compress

    @property
    @override
    def remark(self) -> str:
        return f" Each stays dense for {self.freeze_step} updates, after which its variance is frozen."

    @override
    def refuse(self, trainer: pl.Trainer) -> None:
        super().refuse(trainer)
        resets = [c for c in trainer.callbacks if hasattr(c, "steps_since_reset")]  # type: ignore[attr-defined]
        if resets and self.wants_to_compress:
            raise ValueError(
                f"{self.display_name} freezes Adam's variance, and {type(resets[0]).__name__} would set it to zero, from "
                "which it never recovers. Drop the callback, or use strategy='ddp'."
            )

    @override
    def connect_optimizer(self, optimizer: Optimizer) -> None:
        super().connect_optimizer(optimizer)
        if self.is_neutral:
            return
        self._refuse_other(optimizer)
        self._adam = FrozenAdam(optimizer, self.variance_floor)
        self._adam.attach(self.undo)

    def _refuse_other(self, optimizer: Optimizer) -> None:
        self.compatibility.refuse_optimizer(self.display_name, self._trainer, optimizer)
        if why := why_not_frozen(optimizer):
            raise ValueError(
                f"{self.display_name} replaces the update of torch.optim.Adam or AdamW, but {why}. Train with one of them, or "
                "use strategy='ddp_powersgd', which works with any optimizer."
            )

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self.is_neutral:
            return
        if not self._adam.is_of(self.optimizers[0]):
            raise ValueError(
                f"{self.display_name} uses the optimizer of configure_optimizers, but a callback has replaced it by "
                f"{type(self.optimizers[0]).__name__}. Drop the callback, or use strategy='ddp_powersgd'."
            )
        steps = self._trainer.estimated_stepping_batches
        if self.freeze_step is not None and steps <= self.freeze_step:
            rank_zero_warn(
                f"{self.display_name} freezes variances after {self.freeze_step} updates, but the run has {steps} steps, so "
                "everything is sent dense. Lower freeze_step to 15 to 20 % of the run."
            )

    # One step.

    @override
    def _split(
        self, gradients: Sequence[Gradient], owned: Collection[int], message: Message
    ) -> tuple[list[Gradient], list[Gradient]]:
        self._adam.frozen = set()
        selected, dense = super()._split(gradients, owned, message)
        frozen = [gradient for gradient in selected if self._is_frozen(gradient.name, gradient.parameter)]
        names = {gradient.name for gradient in frozen}
        return frozen, [*dense, *(gradient for gradient in selected if gradient.name not in names)]

    def _is_frozen(self, name: str, parameter: Tensor) -> bool:
        updates = self._adam.updates(parameter)
        if updates == 0 or name in self.memory:
            return updates > 0
        if updates - self._counted_from.get(name, 0) < (self.freeze_step or 0):
            return False
        if self._adam.has_variance(parameter):
            return True
        self._counted_from[name] = updates  # a variance of zero has no floor: estimate it for as long again
        return False

    @override
    def accumulate(self, gradients: Sequence[Gradient]) -> None:
        for gradient in gradients:
            memory, values = self.memory.setdefault(gradient.name, {}), gradient.values
            kind = torch.promote_types(values.dtype, torch.float32)  # half precision would drop small gradients
            if _WORKER not in memory:
                memory[_WORKER] = torch.zeros_like(values, dtype=kind)
            if self._served not in memory:
                memory[self._served] = self._empty_part(memory[_WORKER])
            _, beta1 = self._adam.momentum(gradient.parameter)
            memory[_WORKER].add_(values, alpha=1 - beta1)

    def _empty_part(self, worker: Tensor) -> Tensor:
        return worker.new_zeros(part_numel(worker.numel(), self.world_size))

    @property
    def _served(self) -> str:
        return f"{_SERVER}/{self.global_rank}"

    @override
    def send(self, gradients: Sequence[Gradient]) -> Message:
        counts, parts = [self._counts(g) for g in gradients], self._parts(gradients, self.world_size)
        wanted = [self._with_momentum(gradient) for gradient in gradients]
        signs = pack_signs([split_parts(each, self.world_size) for each in wanted], counts)
        arrived = unpack_signs(self.ranks.swap(signs), parts)
        averages = []
        for gradient, rows in zip(gradients, arrived, strict=True):
            error = self.memory[gradient.name][self._served]
            average = rows.to(error.dtype).mean(0).add_(error)
            average[self._own_count(gradient) :] = 0.0  # padding, whose signs are positive
            averages.append(average)
        mine = slice(self.global_rank, self.global_rank + 1)
        served = pack_signs([average[None] for average in averages], [count[mine] for count in counts])
        to_all, from_here = unpack_signs(signs, parts), unpack_signs(served, parts)
        for place, gradient in enumerate(gradients):
            unsent = wanted[place].sub_(to_all[place].view(-1)[: len(wanted[place])])
            lost = averages[place].sub_(from_here[place][0])
            lost[self._own_count(gradient) :] = 0.0
            self._sent[gradient.name] = unsent, lost
        return {_SIGNS: self.ranks.gather(served[0])}

    def _with_momentum(self, gradient: Gradient) -> Tensor:
        """Return what this rank wants to send: its share of the next momentum, plus its error; flat, in memory order."""
        momentum, beta1 = self._adam.momentum(gradient.parameter)
        wanted = self.memory[gradient.name][_WORKER].clone()
        wanted.as_strided(gradient.shaped.shape, gradient.shaped.stride()).add_(momentum, alpha=beta1)
        return wanted

    def _parts(self, gradients: Sequence[Gradient], ranks: int) -> list[int]:
        return [part_numel(gradient.values.numel(), ranks) for gradient in gradients]

    def _counts(self, gradient: Gradient) -> Tensor:
        """Return the entries of each rank's part without padding, (ranks), on the device of the gradient."""
        numel = gradient.values.numel()
        part = part_numel(numel, self.world_size)
        return (numel - part * torch.arange(self.world_size, device=gradient.values.device)).clamp(0, part)

    def _own_count(self, gradient: Gradient) -> int:
        numel = gradient.values.numel()
        return max(0, numel - self.global_rank * part_numel(numel, self.world_size))

    @override
    def settle(self, gradients: Sequence[Gradient], message: Message, arrived: Tensor) -> None:
        for gradient in gradients:
            memory, (worker, server) = self.memory[gradient.name], self._sent.pop(gradient.name)
            memory[_WORKER] = torch.where(arrived, worker, memory[_WORKER])
            memory[self._served] = torch.where(arrived, server, memory[self._served])

    @override
    def write(self, gradients: Sequence[Gradient], message: Message, failure: Tensor) -> None:
        signs = message[_SIGNS]  # of a run that resumes, with as many rows as it had ranks
        for gradient, parts in zip(gradients, unpack_signs(signs, self._parts(gradients, len(signs))), strict=True):
            before, beta1 = self._adam.momentum(gradient.parameter)
            shape, strides = gradient.shaped.shape, gradient.shaped.stride()
            momentum = parts.as_strided(shape, strides).to(torch.promote_types(before.dtype, torch.float32))
            gradient.shaped.copy_(gradient_of_momentum(momentum, before, beta1).add_(failure))
        self._adam.frozen = {id(gradient.parameter) for gradient in gradients}

    @override
    def unsent(self) -> Iterator[Tensor]:
        for kept in self.memory.values():
            yield from kept.values()

    @override
    def figures(self) -> dict[str, float]:
        return {"frozen": len(self.memory) / max(len(self._chosen), 1)}

    @override
    def sent_bytes(self, name: str, shape: torch.Size, itemsize: int) -> int:
        return sign_bytes(shape.numel(), self.world_size) if name in self.memory else shape.numel() * itemsize

    # The saved state.

    @override
    def rank_state(self) -> State:
        own, shared = super().rank_state()
        return own, {**shared, _RANKS: self.world_size, _COUNTED_FROM: dict(self._counted_from)}

    @override
    def forget_rank_state(self) -> None:
        super().forget_rank_state()
        self._counted_from = {}

    @override
    def load_rank_state(self, own: Mapping[str, Any], shared: Mapping[str, Any], changed: set[str]) -> None:
        super().load_rank_state(own, shared, changed)
        before, self._counted_from = shared[_RANKS], dict(shared[_COUNTED_FROM])
        if before == self.world_size:
            return
        # Parts have other bounds now: what a rank has not sent of its part becomes an error of its own gradients.
        for kept in self.memory.values():
            parts = [kept.pop(f"{_SERVER}/{rank}") for rank in range(before)]
            error = torch.cat(parts)[: kept[_WORKER].numel()]
            kept[_WORKER].add_(error, alpha=before)  # a mean over the old ranks, of which each had one part
            kept[self._served] = self._empty_part(kept[_WORKER])

    # The fit ends.

    @override
    def release_optimizer(self) -> None:
        if hasattr(self, "_adam"):
            self._adam.give_back()
