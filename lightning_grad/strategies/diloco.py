"""DiLoCo: ranks train apart, and a momentum moves the shared weights. Read ``_local_steps.py`` first."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, ClassVar

from typing_extensions import override

from lightning_grad.strategies._local_steps import Compression, LocalStepsDDP
from lightning_grad.strategies._outer_model import OuterRule
from lightning_grad.strategies._rank_saving import DEFAULT_TIMEOUT, ResidualPolicy, StartMethod
from lightning_grad.utilities.checks import check_finite_above, check_share


class DiLoCoStrategy(LocalStepsDDP):
    r"""Train on each rank alone for many steps, then move the shared weights along the mean with momentum (DiLoCo).

    .. math::
        \bar\Delta = \frac 1 N \sum_r (\theta - \theta_r), \qquad v \leftarrow \mu v + \bar\Delta, \qquad
        \theta \leftarrow \theta - \eta \, (\bar\Delta + \mu v), \qquad \theta_r \leftarrow \theta

    Here :math:`\theta` is the outer model, which all ranks share, :math:`\theta_r` the weights of rank :math:`r` of
    :math:`N` after H = ``sync_every_n_steps`` steps of the module's own optimizer, :math:`v` the outer velocity,
    :math:`\eta` = ``outer_lr`` and :math:`\mu` = ``outer_momentum``. The state of the module's optimizer stays on its
    rank.

    Args:
        sync_every_n_steps: Optimizer steps between two exchanges (500 in the paper's main runs).
        outer_lr: Learning rate of the outer step (paper: 0.7).
        outer_momentum: Nesterov momentum of the outer step (paper: 0.9).
        dense_fraction: First share of the run that is plain DDP: 0 never, 1 always.
        compression: How to compress the moves: 'none', 'topk' or 'int8', with error feedback.
            'topk' sends the largest entries of each move as pairs, 'int8' sends one byte per entry. What is not sent is
            added to the next move.
        ratio: Share of the entries of each large move that 'topk' sends.
        residual_decay: Factor by which what was not sent shrinks per exchange; 1 keeps all of it.
        min_numel: Moves of weights with fewer entries are not compressed.
        overlap: Train on while the moves are on their way; their mean arrives one round later.
        average_frozen: Also exchange parameters that no optimizer trains, such as those of an EMA teacher.
        residual_policy: What to do if rank files do not fit on resume: 'strict', 'mean' or 'reset'.
            'strict' raises if the number of ranks differs or files are missing; 'mean' gives every rank the mean over
            the old ranks; 'reset' starts a round from the weights of the checkpoint.
        start_method: How Lightning starts the ranks of a node: 'popen', 'spawn', 'fork' or 'forkserver'.
        static_graph: DDP's option of the same name, for dense steps.
        gradient_as_bucket_view: DDP's option of the same name, for dense steps.
        broadcast_buffers: Send rank 0's buffers in dense steps, and average buffers in exchanges.
        find_unused_parameters: DDP's option of the same name, for dense steps; local steps do not need it.
        process_group_backend: 'nccl' or 'gloo'; by default chosen for the device.
        timeout: Time limit of a collective.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For counts below 1, shares outside of 0 to 1, an ``outer_lr`` that is not positive and finite; in
            ``setup`` for manual optimization, an fp16 GradScaler, weight averaging, SyncBatchNorm, complex
            parameters; when training starts for ranks with different numbers of batches; on resume for rank files
            that do not fit.

    **Hooks**: no DDP is wrapped around the module, so a backward pass does not communicate and every parameter may
    be unused. After the last optimizer step of a round, ranks exchange what they moved. The outer model, which
    validation, checkpoints and the end of the fit have, is the one that the last exchange left; the last optimizer
    step of the run always ends a round. Float buffers, such as BatchNorm's statistics, are averaged, and other
    buffers are rank 0's.

    **Logs** at the first log step after an exchange: ``comm/bytes_sent`` (bytes that this rank passed to collectives
    in the last exchange), ``comm/ratio`` (bytes of the gradients of all steps divided by the bytes sent),
    ``comm/move_norm`` (2-norm of the mean move), ``comm/agreement`` (squared norm of the mean move divided by the
    mean squared norm of the ranks' moves: 1 if all moved alike, 1 / N if their moves are orthogonal), and
    ``comm/residual_norm`` with compression. At the end: ``di_lo_co_strategy.png``, ``di_lo_co_strategy.csv``, and
    ``comm/final_ratio`` and ``comm/total_megabytes`` in the summary.

    **State**: each rank saves its optimizer's state, its residual and, within a round, its weights in
    ``<checkpoint>.ranks``; a fit resumes bit for bit. The checkpoint itself is DDP's, with the outer model and rank
    0's optimizer state: it loads under DDP and on one device.

    **Cost**: two numbers in memory per weight (three with compression); one message every H steps. With overlap, the
    start of the round and a copy of the message on top.

    A non-finite weight of one rank reaches all ranks with the next exchange, like a non-finite gradient under DDP.
    :class:`~lightning_grad.callbacks.SkipNonFinite` skips such a step on its rank alone.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = DiLoCoStrategy(sync_every_n_steps=100)
        >>> trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)

        .. code-block:: yaml

            trainer:
              devices: 2
              strategy:
                class_path: lightning_grad.strategies.DiLoCoStrategy
                init_args:
                  sync_every_n_steps: 100

    References:
        - Douillard et al. (2023), DiLoCo: Distributed Low-Communication Training of Language Models, arXiv 2311.08105,
          algorithm 1; outer learning rate 0.7 and Nesterov momentum 0.9 with H = 500 and AdamW on each rank.
        - Douillard et al. (2025), Streaming DiLoCo with overlapping communication, arXiv 2501.18512. They exchange parts
          of the model in turn, in 4-bit values; ``overlap`` and ``compression='int8'`` send the whole model at once.
        - Sarfi et al. (2025), Communication Efficient LLM Pre-training with SparseLoCo, arXiv 2508.15706:
          ``compression='topk'``; they replace the outer momentum by the residual (``LocalSGDStrategy``).
    """

    trial: ClassVar[Mapping[str, Any]] = {"sync_every_n_steps": 4}
    neutral: ClassVar[Mapping[str, Any] | str] = {"dense_fraction": 1.0}

    def __init__(
        self,
        sync_every_n_steps: int = 500,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
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
        super().__init__(**LocalStepsDDP.own_arguments(locals()))
        self.outer_lr = check_finite_above(outer_lr, 0.0, "outer_lr")
        self.outer_momentum = check_share(outer_momentum, "outer_momentum")

    @property
    @override
    def outer_rule(self) -> OuterRule:
        return OuterRule(self.outer_lr, self.outer_momentum, self.overlap)
