"""Local SGD: ranks train apart, and average their weights once in a while. Read ``_local_steps.py`` first."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, ClassVar

from typing_extensions import override

from lightning_grad.strategies._local_steps import Compression, LocalStepsDDP
from lightning_grad.strategies._outer_model import OuterRule
from lightning_grad.strategies._rank_saving import DEFAULT_TIMEOUT, ResidualPolicy, StartMethod


class LocalSGDStrategy(LocalStepsDDP):
    r"""Train on each rank alone, and average the weights every few steps instead of the gradients in each (local SGD).

    .. math::
        \Delta_r = \theta - \theta_r, \qquad \theta \leftarrow \theta - \frac 1 N \sum_r \Delta_r, \qquad
        \theta_r \leftarrow \theta

    Here :math:`\theta` is the outer model, which all ranks share, and :math:`\theta_r` the weights of rank :math:`r` of
    :math:`N` after H = ``sync_every_n_steps`` steps of the module's own optimizer. With ``dense_fraction``, the first
    share of the run is plain DDP (post-local SGD). The state of the optimizer stays on its rank. With SGD without
    momentum and ``sync_every_n_steps=1``, the weights are those of DDP, up to rounding.

    Args:
        sync_every_n_steps: Optimizer steps between two exchanges.
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
        ValueError: For counts below 1, shares outside of 0 to 1; in ``setup`` for manual optimization, an fp16
            GradScaler, weight averaging, SyncBatchNorm, complex parameters; when training starts for ranks with
            different numbers of batches; on resume for rank files that do not fit.

    **Hooks**: no DDP is wrapped around the module, so a backward pass does not communicate and every parameter may
    be unused. After the last optimizer step of a round, ranks exchange what they moved. The outer model, which
    validation, checkpoints and the end of the fit have, is the one that the last exchange left; the last optimizer
    step of the run always ends a round. Float buffers, such as BatchNorm's statistics, are averaged, and other
    buffers are rank 0's.

    **Logs** at the first log step after an exchange: ``comm/bytes_sent`` (bytes that this rank passed to collectives
    in the last exchange), ``comm/ratio`` (bytes of the gradients of all steps divided by the bytes sent),
    ``comm/move_norm`` (2-norm of the mean move), ``comm/agreement`` (squared norm of the mean move divided by the
    mean squared norm of the ranks' moves: 1 if all moved alike, 1 / N if their moves are orthogonal), and
    ``comm/residual_norm`` with compression. At the end: ``local_sgd_strategy.png``, ``local_sgd_strategy.csv``, and
    ``comm/final_ratio`` and ``comm/total_megabytes`` in the summary.

    **State**: each rank saves its optimizer's state, its residual and, within a round, its weights in
    ``<checkpoint>.ranks``; a fit resumes bit for bit. The checkpoint itself is DDP's, with the outer model and rank
    0's optimizer state: it loads under DDP and on one device.

    **Cost**: one number in memory per weight (two with compression); one message every H steps. With overlap, the
    start of the round and a copy of the message on top.

    A non-finite weight of one rank reaches all ranks with the next exchange, like a non-finite gradient under DDP.
    :class:`~lightning_grad.callbacks.SkipNonFinite` skips such a step on its rank alone.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = LocalSGDStrategy(sync_every_n_steps=8, dense_fraction=0.5)
        >>> trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)

        .. code-block:: yaml

            trainer:
              devices: 2
              strategy:
                class_path: lightning_grad.strategies.LocalSGDStrategy
                init_args:
                  sync_every_n_steps: 8
                  dense_fraction: 0.5

    References:
        - Stich (2019), Local SGD Converges Fast and Communicates Little, arXiv 1805.09767.
        - Lin et al. (2020), Don't Use Large Mini-Batches, Use Local SGD, arXiv 1808.07217: post-local SGD. They switch at
          the first decay of the learning rate. ``sync_every_n_steps=8`` is a choice of this library.
        - Sarfi et al. (2025), Communication Efficient LLM Pre-training with SparseLoCo, arXiv 2508.15706:
          ``compression='topk'`` with a ``residual_decay`` below 1 in place of an outer momentum. They send 1 to 3 % of the
          entries, chunk by chunk and with 2-bit values; here the values are float32 and the selection is by weight.
        - Shen et al. (2019), Faster Distributed Deep Net Training: Computation and Communication Decoupled Stochastic
          Gradient Descent, arXiv 1906.12043: ``overlap``.
    """

    trial: ClassVar[Mapping[str, Any]] = {"sync_every_n_steps": 4}
    neutral: ClassVar[Mapping[str, Any] | str] = {"dense_fraction": 1.0}

    def __init__(
        self,
        sync_every_n_steps: int = 8,
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

    @property
    @override
    def outer_rule(self) -> OuterRule:
        return OuterRule(delayed=self.overlap)
