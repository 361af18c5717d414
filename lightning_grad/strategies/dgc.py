"""Deep Gradient Compression: send one gradient entry in a thousand, and the others once they have grown.

The mathematics is in ``functional/communication``: ``topk_selection`` (which entries are sent), ``error_feedback``
(what is kept), ``sparse_messages`` (pairs in a buffer), ``wire`` (densities and costs). Read ``compressed_ddp.py``
first.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import SGD, Optimizer
from typing_extensions import override

from lightning_grad.core.compatibility import Compatibility, yes
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.functional import communication as rules
from lightning_grad.functional.communication.error_feedback import as_sent
from lightning_grad.functional.communication.wire import PAPER_WARMUP, RELEASED_WARMUP, kept_count, warmup_density
from lightning_grad.functional.shuffling import hashed_seed
from lightning_grad.strategies._adaptive import LEVEL_FACTORS, Adapt, AdaptiveDDP
from lightning_grad.strategies._buckets import Gradient
from lightning_grad.strategies._local_clip import LocallyClippedDDP, clip_before
from lightning_grad.strategies._local_momentum import LocalMomentum, why_not_moved
from lightning_grad.strategies._rank_saving import DEFAULT_TIMEOUT, ResidualPolicy, StartMethod
from lightning_grad.strategies._scheme import Message
from lightning_grad.strategies.compressed_ddp import CompressedDDPStrategy
from lightning_grad.utilities.checks import check_count, check_finite_above, check_ratio
from lightning_grad.utilities.parameters import check_patterns, first_match

Correction = Literal["auto", "momentum", "error_feedback"]
Selector = Literal["auto", "exact", "sampled", "chunk"]
ValueType = Literal["float32", "float16", "bfloat16"]

_WARMUPS = {"paper": PAPER_WARMUP, "released": RELEASED_WARMUP}
_PAIRS = "pairs"
_RESIDUAL, _VELOCITY = "residual", "velocity"


class DGCStrategy(AdaptiveDDP, LocallyClippedDDP):
    r"""Send only the largest entries of the accumulated gradient, and keep the others until they are large enough (DGC).

    .. math::
        u_r \leftarrow m u_r + g_r, \qquad v_r \leftarrow v_r + u_r, \qquad I_r = \operatorname{top}_k |v_r|

    .. math::
        \bar g = \frac{1}{N} \sum_r \operatorname{sparse}(v_r[I_r]), \qquad
        v_r[I_r] \leftarrow 0, \qquad u_r[I_r] \leftarrow 0

    Here :math:`g_r` is the gradient of rank :math:`r` of :math:`N`, :math:`u_r` its velocity, :math:`v_r` its
    residual (what it has not sent), :math:`m` the momentum, and :math:`k = \lceil \rho n \rceil` for a tensor of
    :math:`n` entries and density :math:`\rho`. Every rank sends pairs of index and value, and adds up the pairs of
    all ranks. Vectors and small tensors are averaged as in DDP.

    The momentum of ``torch.optim.SGD`` moves into the compressor (momentum correction), while the optimizer keeps the
    momentum of its weight decay. Param groups are read in every step, so schedules of learning rate, momentum and
    weight decay work, and the optimizer looks unchanged. Any other optimizer gets the sparse mean of plain error
    feedback.

    Args:
        ratio: Share of the entries of each large gradient to send per step (paper: 0.001); 1 is DDP.
        warmup: Higher shares for the first epochs: 'paper', 'released', a list of shares, or None.
        warmup_steps: Optimizer steps per share of the warm-up. Default: one epoch.
        correction: Where momentum is applied: 'auto', 'momentum' or 'error_feedback'.
            'momentum' applies SGD's momentum before the selection; 'error_feedback' leaves the optimizer unchanged;
            'auto' is 'momentum' for SGD, and 'error_feedback', with a printed note, for other optimizers.
        momentum_masking: Whether the velocity of an entry is set to zero when the entry is sent.
        local_clip: Norm to which the mean gradient would be clipped; None does not clip.
            Each rank clips its own gradient to this norm times the square root of the number of ranks, before it is
            accumulated.
        selector: How to find the largest entries: 'exact', 'sampled', 'chunk' or 'auto'.
            'exact' is top-k, 'sampled' estimates a threshold from a sample, 'chunk' takes the largest entry of each
            chunk. 'auto' is the fastest that finds the same magnitudes as top-k: it first finds the largest entry of
            each block for shares up to 0.002; above, it is 'exact' below a million entries and 'sampled' from there on.
        value_dtype: Dtype of the sent values; the rounding error stays in the residual.
        layer_ratios: Shares by parameter name or wildcard, used instead of ratio; 1 sends dense.
            The first match applies.
        adapt: Choose the share of each layer from its gradients: 'lgreco' or 'lgreco_feedback'.
            None gives all layers the same share. Plans send least at the total squared error of ``ratio`` everywhere:
            'lgreco' counts the error of one message, as published, 'lgreco_feedback' what stays unsent over many
            steps, which changes the training less. Shares lie between an eighth and eight times ``ratio``.
            Layers with their own share in ``layer_ratios`` keep it; the warm-up raises planned shares like ``ratio``.
        adapt_every: Optimizer steps between two plans of the shares. Default: one epoch.
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
        ValueError: For shares outside (0, 1], an empty warm-up, a ``local_clip`` that is not positive and finite,
            unknown choices, an ``adapt_every`` below 1 or without ``adapt``; in ``setup`` for
            ``Trainer(gradient_clip_val)``, an optimizer other than SGD or one with dampening (with
            ``correction='momentum'``), several optimizers, manual optimization, an fp16 GradScaler, sparse or complex
            gradients; on resume for rank files that do not fit.

    **Hooks**: DDP's communication hook, which exchanges all gradients after the last bucket of a backward pass; a
    pre-hook and a post-hook of the optimizer's step, between which it updates without momentum.

    **Logs** at log steps, from rank 0: ``comm/bytes_sent``, ``comm/ratio``, ``comm/residual_norm``,
    ``comm/compress_ms``, ``comm/density`` (current share), and ``comm/noise_scale`` if enabled. With ``adapt``,
    ``comm/plan_bytes`` (bytes of the planned shares divided by those of ``ratio`` everywhere), ``comm/plan_ms``
    (milliseconds of the last plan) and, from the second plan on, ``comm/plan_error`` (error that the plan before had on
    the gradients since, divided by that of ``ratio`` everywhere); ``comm/density`` is then the share of all entries
    with planned shares. At the end: ``dgc_strategy.png``, ``dgc_strategy.csv``, ``dgc_strategy_layers.csv``, and
    ``comm/final_ratio`` and ``comm/total_megabytes`` in the summary.

    **State**: each rank saves residual and velocity of each compressed gradient in ``<checkpoint>.ranks``, with
    ``adapt`` also the planned shares and the sum of the gradients since the last plan. The checkpoint itself is DDP's:
    it loads under DDP and on one device.

    **Cost**: two numbers in memory per compressed entry. A pair takes 8 bytes (6 with float16), and an all-gather
    transmits it N - 1 times, so dense gradients need :math:`8 / (N \rho b)` times the traffic, with b bytes per pair.
    'sampled' waits for the device once or twice per large tensor, and so does 'auto' where it samples; 'exact' and
    'chunk' do not. With ``adapt``, one more number in memory per compressed entry, which each step adds to; a plan
    sorts the largest 8 ``ratio`` of the entries of each layer, sends 8 bytes per layer and possible share, and waits for
    the device.

    A single rank also trains on compressed gradients.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = DGCStrategy(ratio=0.001, warmup="paper")
        >>> trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)

        .. code-block:: yaml

            trainer:
              devices: 2
              strategy:
                class_path: lightning_grad.strategies.DGCStrategy
                init_args:
                  ratio: 0.001
                  warmup: paper

    References:
        - Alimohammadi et al. (2022), L-GreCo: Layerwise-Adaptive Gradient Compression for Efficient and Accurate Deep
          Learning, arXiv 2210.17357, for ``adapt='lgreco'``. Differences: errors are measured on each rank's own sum of
          gradients and averaged over the ranks.
        - Lin et al. (2018), Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed Training,
          arXiv 1712.01887; sections 3.1 to 3.3. Defaults: ratio 0.001 and the warm-up of section 3.3;
          ``warmup='released'`` is the warm-up of the released code (github.com/synxlin/deep-gradient-compression).
          Differences: all pairs of a step go into one message after the last bucket, and clipping uses the norm of
          the whole local gradient.
    """

    compatibility: ClassVar[Compatibility] = CompressedDDPStrategy.compatibility.but(
        gradient_clip_val=clip_before(
            "DGCStrategy", "accumulates gradients over many steps, and {} would clip what it has accumulated"
        ),
        no_second_moment=yes("Optimizers other than SGD get error feedback, and a printed line says so."),
    )
    trial: ClassVar[Mapping[str, Any]] = {"ratio": 0.05, "warmup": [0.5, 0.2], "warmup_steps": 3, "min_numel": 100}
    neutral: ClassVar[Mapping[str, Any] | str] = {"ratio": 1.0}
    level_word: ClassVar[str] = "share"
    plan_settings: ClassVar[frozenset[str]] = frozenset({"adapt", "ratio", "layer_ratios", "value_dtype"})

    _momentum = during_fit[LocalMomentum | None](lambda _: None)
    _sent = during_fit.of(list[tuple[Tensor, Tensor]])
    _moves_momentum = until_next_fit.of(bool)  # still needed when the fit is over and the optimizer is released
    _feedback_because = until_next_fit.of(str)
    _shares = until_next_fit.of(dict[str, float])

    def __init__(
        self,
        ratio: float = 0.001,
        warmup: Literal["paper", "released"] | Sequence[float] | None = "paper",
        warmup_steps: int | None = None,
        correction: Correction = "auto",
        momentum_masking: bool = True,
        local_clip: float | None = None,
        selector: Selector = "auto",
        value_dtype: ValueType = "float32",
        layer_ratios: Mapping[str, float] | None = None,
        adapt: Adapt | None = None,
        adapt_every: int | None = None,
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
        self.ratio = check_ratio(ratio, "ratio")
        self.layer_ratios = {n: check_ratio(share, f"layer_ratios[{n!r}]") for n, share in (layer_ratios or {}).items()}
        if warmup is not None and not warmup:
            raise ValueError("warmup must have at least one share; got []. Use None for no warm-up.")
        shares = _WARMUPS[warmup] if isinstance(warmup, str) else warmup or ()
        self._warmup_densities = [check_ratio(share, f"warmup[{place}]") for place, share in enumerate(shares)]
        self.warmup = warmup if isinstance(warmup, str) or warmup is None else list(self._warmup_densities)
        self.warmup_steps = check_count(warmup_steps, 1, "warmup_steps")
        self.correction = correction
        self.momentum_masking = momentum_masking
        self.local_clip = check_finite_above(local_clip, 0.0, "local_clip")
        self.selector = selector
        self.value_dtype = value_dtype
        self.check_adapt(adapt, adapt_every)
        self._value_type: torch.dtype = getattr(torch, value_dtype)

    # The fit begins.

    @property
    @override
    def syncs_per_step(self) -> str:
        if self.selector == "sampled":
            return "entries above the sampled threshold must be counted before they can be selected"
        return super().syncs_per_step

    @property
    @override
    def wants_to_compress(self) -> bool:
        return min([self.ratio, *self.layer_ratios.values()]) < 1.0

    @property
    @override
    def gradient_holds_momentum(self) -> bool:
        return self._momentum is not None and any(group["momentum"] for group in self.optimizers[0].param_groups)

    @override
    def compresses(self, name: str, parameter: Tensor) -> bool:
        return super().compresses(name, parameter) and self._ratio_of(name) < 1.0

    def _ratio_of(self, name: str) -> float:
        shares = self._shares
        if name not in shares:  # looked up in every step
            pattern = first_match(self.names_of(name), self.layer_ratios)
            shares[name] = self.ratio if pattern is None else self.layer_ratios[pattern]
        return shares[name]

    @override
    def refuse(self, trainer: pl.Trainer) -> None:
        super().refuse(trainer)
        check_patterns(trainer.lightning_module, self.display_name, layer_ratios=self.layer_ratios)

    @override
    def connect_optimizer(self, optimizer: Optimizer) -> None:
        super().connect_optimizer(optimizer)
        if self.correction == "error_feedback" or not self.wants_to_compress:
            return
        why = why_not_moved(optimizer)
        if why and self.correction == "momentum":
            raise ValueError(
                f"{self.display_name}(correction='momentum') moves the momentum of torch.optim.SGD, but {why}. Set "
                "correction='error_feedback', which leaves the optimizer as it is and gives it the sparse mean gradient, or "
                "train with torch.optim.SGD without dampening."
            )
        self._feedback_because = why
        if not why and not self.is_neutral:
            compressed = {key for key, name in self._names.items() if name in self._chosen}
            self._momentum = LocalMomentum(cast(SGD, optimizer), compressed)
            self._momentum.attach(self.undo)
            self._moves_momentum = True

    @property
    @override
    def remark(self) -> str:
        if not self._feedback_because:
            return ""
        return f" correction='auto' chose error feedback, because {self._feedback_because}."

    @property
    @override
    def message_settings(self) -> dict[str, Any]:
        # 'auto' may mean something else for another optimizer.
        return {**super().message_settings, "correction": "momentum" if self._moves_momentum else "error_feedback"}

    @override
    def load_rank_state(self, own: Mapping[str, Any], shared: Mapping[str, Any], changed: set[str]) -> None:
        super().load_rank_state(own, shared, changed)
        if self._momentum is not None:
            return
        if [name for name, kept in self.memory.items() if kept.pop(_VELOCITY, None) is not None]:
            rank_zero_warn(
                f"{self.display_name} no longer moves the momentum into the compressor: the momentum of compressed "
                "gradients starts at zero in the optimizer."
            )

    # One step.

    @property
    def density(self) -> float:
        """Current share of entries to send, for parameters without their own share."""
        if not self.levels:
            return self._now(self.ratio)
        sizes = {name: self._shapes[name][0].numel() for name in self.levels}
        return sum(self._count(name, size) for name, size in sizes.items()) / sum(sizes.values())

    def _now(self, ratio: float) -> float:
        position = self._trainer.current_epoch if self.warmup_steps is None else self.step // self.warmup_steps
        return warmup_density(position, self._warmup_densities, ratio)

    def _count(self, name: str, numel: int) -> int:
        return kept_count(numel, self._now(self.level_of(name)))

    @override
    def is_adapted(self, name: str) -> bool:
        if not self.layer_ratios:  # asked in every step
            return super().is_adapted(name)
        return super().is_adapted(name) and first_match(self.names_of(name), self.layer_ratios) is None

    @override
    def uniform_level(self, name: str) -> float:
        return self._ratio_of(name)

    @override
    def possible_levels(self, name: str) -> list[float]:
        shape, itemsize = self._shapes[name]
        most = itemsize / self._pair_bytes  # a larger share takes more bytes than the dense gradient
        shares = [share for factor in LEVEL_FACTORS if (share := self.ratio * factor) < most]
        numbers = {kept_count(shape.numel(), share): share for share in [*shares, self.ratio]}
        return [numbers[count] for count in sorted(numbers)]

    @override
    def level_bytes(self, name: str, level: float) -> int:
        return kept_count(self._shapes[name][0].numel(), level) * self._pair_bytes

    @override
    def level_errors(self, name: str, seen: Tensor, levels: Sequence[float]) -> Tensor:
        return rules.sparse_errors(seen, [kept_count(len(seen), level) for level in levels])

    @property
    def _pair_bytes(self) -> int:
        return 4 + self._value_type.itemsize

    @override
    def accumulate(self, gradients: Sequence[Gradient]) -> None:
        super().accumulate(gradients)
        kept, local = self.memory, self._momentum
        for gradient in gradients:
            memory, values = kept.setdefault(gradient.name, {}), gradient.values
            kind = torch.promote_types(values.dtype, torch.float32)  # half precision would drop small gradients
            if _RESIDUAL not in memory:
                memory[_RESIDUAL] = torch.zeros_like(values, dtype=kind)
            momentum, nesterov = (0.0, False) if local is None else local.of(gradient.parameter)
            if momentum and _VELOCITY not in memory:
                memory[_VELOCITY] = torch.zeros_like(values, dtype=kind)
            rules.accumulate_residual_(memory[_RESIDUAL], values, memory.get(_VELOCITY), momentum, nesterov)

    @override
    def send(self, gradients: Sequence[Gradient]) -> Message:
        counts = self._counts(gradients)
        self._sent = [self._select(gradient.name, count) for gradient, count in zip(gradients, counts, strict=True)]
        indices, values = zip(*self._sent, strict=True)
        return {_PAIRS: self.ranks.gather(rules.pack_pairs(indices, values, counts, self._value_type))}

    def _select(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        kept = self.memory[name][_RESIDUAL]
        start = hashed_seed(self.global_rank, f"{name}/{self.step}")
        index = rules.select_largest(kept, count, self.selector, start)
        return index, as_sent(kept[index], self._value_type)

    def _counts(self, gradients: Sequence[Gradient]) -> list[int]:
        return [self._count(gradient.name, gradient.values.numel()) for gradient in gradients]

    @override
    def settle(self, gradients: Sequence[Gradient], message: Message, arrived: Tensor) -> None:
        sent, self._sent = self._sent, []
        unknown = None if arrived.is_cpu else arrived  # on a CPU this test needs no sync
        if unknown is None and not arrived.numpy():
            return
        for gradient, (indices, values) in zip(gradients, sent, strict=True):
            memory = self.memory[gradient.name]
            velocity = memory.get(_VELOCITY) if self.momentum_masking else None
            rules.remove_sent_(memory[_RESIDUAL], indices, values, velocity, unknown)

    @override
    def write(self, gradients: Sequence[Gradient], message: Message, failure: Tensor) -> None:
        counts, everyone = self._counts(gradients), message[_PAIRS]
        torch._foreach_zero_([gradient.values for gradient in gradients])
        for pairs in everyone:  # all ranks add in rank order and so get the same bits
            indices, values = zip(*rules.unpack_pairs(pairs, counts, self._value_type), strict=True)
            failed = torch.split(torch.cat(values) + failure.to(self._value_type), counts)
            for gradient, index, value in zip(gradients, indices, failed, strict=True):
                rules.add_pairs_(gradient.values, index, value, 1.0 / len(everyone))

    @override
    def unsent(self) -> Iterator[Tensor]:
        for kept in self.memory.values():
            yield kept[_RESIDUAL]

    @override
    def figures(self) -> dict[str, float]:
        return {**super().figures(), "density": self.density}

    @override
    def sent_bytes(self, name: str, shape: torch.Size, itemsize: int) -> int:
        return self._count(name, shape.numel()) * self._pair_bytes

    # The fit ends.

    @override
    def release_optimizer(self) -> None:
        if self._momentum is not None:
            self._momentum.give_back()
