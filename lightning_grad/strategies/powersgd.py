"""PowerSGD: send each gradient matrix as the product of two thin ones; see ``functional/communication/powersgd.py``.

Read ``compressed_ddp.py`` first.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_grad.functional import initial_factor, low_rank_errors, orthonormalize
from lightning_grad.functional.communication.powersgd import (
    batched,
    low_rank_numel,
    matrix_shape,
    subtract_product_,
    thin_product,
    write_product_,
)
from lightning_grad.strategies._adaptive import LEVEL_FACTORS, Adapt, AdaptiveDDP
from lightning_grad.strategies._buckets import Gradient
from lightning_grad.strategies._rank_saving import DEFAULT_TIMEOUT, ResidualPolicy, StartMethod
from lightning_grad.strategies._scheme import Message
from lightning_grad.utilities.checks import check_count, check_finite_above

_ERROR, _RIGHT = "error", "right"
_MORE_COLUMNS = 8  # with which the errors of all ranks are measured


class PowerSGDStrategy(AdaptiveDDP):
    r"""Send a low-rank approximation of each gradient matrix, and add its error to the next gradient.

    .. math::
        M_r = G_r + E_r, \qquad P = \operatorname{orth}\!\Big(\frac{1}{N} \sum_r M_r Q\Big), \qquad
        Q \leftarrow \frac{1}{N} \sum_r M_r^\top P

    .. math::
        \bar G = P Q^\top, \qquad E_r \leftarrow M_r - \bar G

    Here :math:`G_r` (n x m) is the gradient of rank :math:`r` of :math:`N`, reshaped to a matrix (first dimension by
    all others), :math:`E_r` its error (what it has not sent), and :math:`P` (n x k) and :math:`Q` (m x k) the
    factors, with k = ``rank``. This is one step of the power method, starting from the previous step's :math:`Q`.
    Optimizers and callbacks get a dense mean gradient; momentum stays in the optimizer, and any optimizer works. The
    traffic of a rank does not grow with the number of ranks.

    Args:
        rank: Number of columns of the factors (4 in the paper's language model).
        start_step: Number of steps at the beginning in which all gradients are sent dense.
        min_gain: Compress a gradient only if its factors are at least this many times smaller.
            The default matches torch's hook.
        adapt: Choose the rank of each layer from its gradients: 'lgreco' or 'lgreco_feedback'.
            None gives all layers the same rank. Plans send least at the total squared error of ``rank`` everywhere:
            'lgreco' counts the error of one message, as published, 'lgreco_feedback' what stays unsent over many
            steps, which changes the training less. Ranks lie between an eighth and eight times ``rank``.
        adapt_every: Optimizer steps between two plans of the ranks. Default: one epoch.
        exclude: Names or wildcards of parameters or modules whose gradients are sent dense.
        min_numel: Gradients with fewer entries are sent dense.
        residual_policy: What to do if rank files do not fit on resume: 'strict', 'mean' or 'reset'.
            'strict' raises if the number of ranks differs or files are missing; 'mean' gives every rank the mean over
            the old ranks; 'reset' starts without unsent gradients.
        log_noise_scale: Log comm/noise_scale at log steps; costs one more small all-reduce in each.
        seed: Seed of the initial factors, identical on all ranks.
        start_method: How Lightning starts the ranks of a node: 'popen', 'spawn', 'fork' or 'forkserver'.
        static_graph: DDP's option of the same name.
        gradient_as_bucket_view: DDP's option of the same name: saves one copy of the gradients.
        broadcast_buffers: DDP's option of the same name: send rank 0's buffers before each forward pass.
        find_unused_parameters: DDP's option of the same name: some parameters may get no gradient.
        process_group_backend: 'nccl' or 'gloo'; by default chosen for the device.
        timeout: Time limit of a collective.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a rank below 1, a ``min_gain`` that is not positive and finite, a negative ``start_step``, an
            ``adapt_every`` below 1 or without ``adapt``; in ``setup`` for several optimizers, manual optimization, an
            fp16 GradScaler, sparse or complex gradients; on resume for rank files that do not fit.

    **Hooks**: DDP's communication hook, which exchanges all gradients after the last bucket of a backward pass: one
    all-reduce for all left factors, one for all right factors, and one for the dense gradients.

    **Logs** at log steps, from rank 0: ``comm/bytes_sent``, ``comm/ratio``, ``comm/residual_norm``,
    ``comm/compress_ms``, and ``comm/noise_scale`` if enabled. With ``adapt``, ``comm/plan_bytes`` (bytes of the
    planned ranks divided by those of ``rank`` everywhere), ``comm/plan_ms`` (milliseconds of the last plan) and, from
    the second plan on, ``comm/plan_error`` (error that the plan before had on the gradients since, divided by that of
    ``rank`` everywhere). At the end: ``power_sgd_strategy.png``, ``power_sgd_strategy.csv``,
    ``power_sgd_strategy_layers.csv``, and ``comm/final_ratio`` and ``comm/total_megabytes`` in the summary.

    **State**: each rank saves error and right factor of each compressed gradient in ``<checkpoint>.ranks``, with
    ``adapt`` also the planned ranks and the sum of the gradients since the last plan. The checkpoint itself is DDP's:
    it loads under DDP and on one device.

    **Cost**: one number in memory per compressed entry; two thin matrix products in addition to the decompression,
    and a QR decomposition of the left factors. Nothing waits for the device. With ``adapt``, one more number in memory
    per compressed entry, which each step adds to; a plan multiplies each layer six times by a factor of at most
    ``8 rank + 8`` columns, sends 8 bytes per layer and possible rank, and waits for the device.

    A single rank also trains on compressed gradients. Gradient clipping acts on the approximation.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(accelerator="cpu", devices=2, strategy=PowerSGDStrategy(rank=4), logger=False)

        .. code-block:: yaml

            trainer:
              devices: 2
              strategy:
                class_path: lightning_grad.strategies.PowerSGDStrategy
                init_args:
                  rank: 4

    References:
        - Alimohammadi et al. (2022), L-GreCo: Layerwise-Adaptive Gradient Compression for Efficient and Accurate Deep
          Learning, arXiv 2210.17357, for ``adapt='lgreco'``. Differences: errors are measured on each rank's own sum of
          gradients and averaged over the ranks.
        - Vogels et al. (2019), PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization, arXiv
          1905.13727, algorithms 1 and 2; rank 4 is used for its language model. ``min_gain=2`` is
          ``min_compression_rate`` of torch's ``PowerSGDState``. torch's hook sends the first 1000 steps dense; the
          paper does not, and it is not necessary here, because the memory is keyed by parameter.
    """

    trial: ClassVar[Mapping[str, Any]] = {"rank": 2, "min_numel": 100}
    neutral: ClassVar[Mapping[str, Any] | str] = {"exclude": ["*"]}
    level_word: ClassVar[str] = "rank"
    plan_settings: ClassVar[frozenset[str]] = frozenset({"adapt", "rank", "min_gain"})

    def __init__(
        self,
        rank: int = 4,
        start_step: int = 0,
        min_gain: float = 2.0,
        adapt: Adapt | None = None,
        adapt_every: int | None = None,
        exclude: Sequence[str] | None = None,
        min_numel: int = 1024,
        residual_policy: ResidualPolicy = "strict",
        log_noise_scale: bool = False,
        seed: int = 0,
        start_method: StartMethod = "popen",
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        broadcast_buffers: bool = True,
        find_unused_parameters: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(**self.base_arguments(locals()))
        self.rank = check_count(rank, 1, "rank")
        self.start_step = check_count(start_step, 0, "start_step")
        self.min_gain = check_finite_above(min_gain, 0.0, "min_gain")
        self.check_adapt(adapt, adapt_every)
        self.seed = seed

    @override
    def compresses(self, name: str, parameter: Tensor) -> bool:
        factors = low_rank_numel(parameter.shape, self.rank) if parameter.dim() > 1 else parameter.numel()
        if parameter.dim() > 2 and parameter.stride(0) * parameter.shape[0] != parameter.numel():
            return False  # its rows are not contiguous in memory
        return super().compresses(name, parameter) and factors * self.min_gain < parameter.numel()

    @override
    def load_rank_state(self, own: Mapping[str, Any], shared: Mapping[str, Any], changed: set[str]) -> None:
        super().load_rank_state(own, shared, changed)
        if "seed" in changed and self.memory:
            rank_zero_info(
                f"{self.display_name} keeps its factors: the new seed applies only to gradients that have no factors yet."
            )
        if "start_step" in changed and self.ledger.steps < self.start_step:
            rank_zero_info(
                f"{self.display_name} sends everything dense until step {self.start_step}; unsent gradients wait until then."
            )

    @property
    @override
    def is_active(self) -> bool:
        return self.step >= self.start_step

    @override
    def uniform_level(self, name: str) -> float:
        return min(self.rank, *matrix_shape(self._shapes[name][0]))

    @override
    def possible_levels(self, name: str) -> list[float]:
        shape, uniform = self._shapes[name][0], self.uniform_level(name)
        most = min(matrix_shape(shape))
        ranks = {min(most, max(1, round(self.rank * factor))) for factor in LEVEL_FACTORS}
        gains = {rank for rank in ranks if low_rank_numel(shape, rank) * self.min_gain < shape.numel()}
        return sorted(gains | {uniform})

    @override
    def level_bytes(self, name: str, level: float) -> int:
        shape, itemsize = self._shapes[name]
        return low_rank_numel(shape, int(level)) * max(itemsize, 4)

    @override
    def level_errors(self, name: str, seen: Tensor, levels: Sequence[float]) -> Tensor:
        matrix, ranks = _as_matrix(seen, self._parameters[name]), [int(level) for level in levels]
        columns = min(max(ranks) + _MORE_COLUMNS, *matrix.shape)
        start = initial_factor(matrix.shape[1], columns, self.seed, f"errors of {name}")
        return low_rank_errors(matrix, ranks, start.to(matrix.device, matrix.dtype))

    @override
    def accumulate(self, gradients: Sequence[Gradient]) -> None:
        super().accumulate(gradients)
        for gradient in gradients:
            memory = self.memory.setdefault(gradient.name, {})
            if _ERROR not in memory:
                # Half precision would drop small gradients.
                kind = torch.promote_types(gradient.values.dtype, torch.float32)
                memory[_ERROR] = torch.zeros_like(gradient.values, dtype=kind)
            memory[_ERROR].add_(gradient.values)

    @override
    def send(self, gradients: Sequence[Gradient]) -> Message:
        matrices = [_as_matrix(self.memory[g.name][_ERROR], g.parameter) for g in gradients]
        rights = [self._right(gradient) for gradient in gradients]
        left = _joined(batched(thin_product, matrices, rights))
        means = self._parts(gradients, self.ranks.mean_(left), 0)
        lefts = batched(orthonormalize, [mean.to(one.dtype) for mean, one in zip(means, matrices, strict=True)])
        right = _joined(batched(thin_product, [matrix.t() for matrix in matrices], lefts))
        return {"left": _joined(lefts), "right": self.ranks.mean_(right)}

    def _rank_of(self, gradient: Gradient) -> int:
        return int(self.level_of(gradient.name))

    def _right(self, gradient: Gradient) -> Tensor:
        """Return the right factor of a gradient. A new rank keeps its first columns, the strongest directions."""
        memory, rank = self.memory[gradient.name], self._rank_of(gradient)
        kept = memory.get(_RIGHT, memory[_ERROR].new_empty(matrix_shape(gradient.parameter.shape)[1], 0))
        if kept.shape[1] != rank:
            first = initial_factor(len(kept), rank, self.seed, gradient.name).to(kept)
            memory[_RIGHT] = torch.cat([kept[:, :rank], first[:, kept.shape[1] :]], 1)
        return memory[_RIGHT]

    def _parts(self, gradients: Sequence[Gradient], flat: Tensor, side: int) -> list[Tensor]:
        """Split a flat tensor into the left factors (side 0) or the right factors (side 1) of the gradients."""
        shapes = [(matrix_shape(g.parameter.shape)[side], self._rank_of(g)) for g in gradients]
        pieces = torch.split(flat, [length * rank for length, rank in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def _factors(self, gradients: Sequence[Gradient], message: Message) -> Iterator[tuple[Gradient, Tensor, Tensor]]:
        lefts, rights = self._parts(gradients, message["left"], 0), self._parts(gradients, message["right"], 1)
        return zip(gradients, lefts, rights, strict=True)

    @override
    def settle(self, gradients: Sequence[Gradient], message: Message, arrived: Tensor) -> None:
        for gradient, left, right in self._factors(gradients, message):
            memory = self.memory[gradient.name]
            left, right = left.to(memory[_ERROR].dtype), right.to(memory[_ERROR].dtype)
            error = _as_matrix(memory[_ERROR], gradient.parameter)
            subtract_product_(error, left, torch.where(arrived, right, 0.0))
            memory[_RIGHT].copy_(right)

    @override
    def write(self, gradients: Sequence[Gradient], message: Message, failure: Tensor) -> None:
        for gradient, left, right in self._factors(gradients, message):
            kind = gradient.values.dtype
            matrix = _as_matrix(gradient.values, gradient.parameter)
            write_product_(matrix, left.to(kind), right.to(kind), failure.to(kind))

    @override
    def unsent(self) -> Iterator[Tensor]:
        for kept in self.memory.values():
            yield kept[_ERROR]


def _as_matrix(flat: Tensor, parameter: Tensor) -> Tensor:
    """Return a flat gradient in memory order as a matrix; the weight may be transposed in memory."""
    if parameter.dim() == 2:
        return flat.as_strided(parameter.shape, parameter.stride())
    return flat.view(matrix_shape(parameter.shape))


def _joined(matrices: Sequence[Tensor]) -> Tensor:
    return torch.cat([matrix.reshape(-1) for matrix in matrices])
