"""Batch statistics of small parts of a batch. The rule is :func:`lightning_grad.functional.ghost_batch_norm`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_grad.core import GradCallback, check_count, wrap_method
from lightning_grad.core.compatibility import Compatibility, yes
from lightning_grad.core.samples.loader_batch_size import loader_batch_size
from lightning_grad.functional import ghost_batch_norm
from lightning_grad.functional.choices import hint_for
from lightning_grad.utilities.parameters import as_names, clean_name, matches, selects
from lightning_grad.utilities.reporting import counted, listed


class GhostBatchNorm(GradCallback):
    r"""Normalize large batches in small chunks, whose noisy statistics generalize better (Ghost Batch Normalization).

    .. math::
        \hat x_i = \frac{x_i - \mu_{i \bmod k}}{\sqrt{\sigma_{i \bmod k}^2 + \epsilon}}

    In training, each BatchNorm layer divides its batch into k equal chunks of at most ``size`` samples and normalizes
    each by its own mean and variance. Sample i belongs to chunk :math:`i \bmod k`. Running statistics are updated
    once for each chunk. Evaluation does not change, and a batch of at most ``size`` samples is normalized as before.

    Each rank, and each batch that gradient accumulation adds up, already has statistics of its own. So ``size`` counts
    the samples of one rank in one forward pass.

    Args:
        size: Largest number of samples in a chunk, at least 2 (128 in the paper).
            Chunks differ by at most one sample; three samples with size 2 are one chunk.
        include: Names or wildcards of BatchNorm layers, or of modules that contain them. Default: all.
        exclude: Names or wildcards of layers or modules to leave as they are.
        name: Name of this instance, needed if two are used.

    Raises:
        ValueError: In the constructor if size is below 2. Before the first batch with SyncBatchNorm or
            ``Trainer(sync_batchnorm=True)``, if the module has no BatchNorm layer, if a pattern matches none, and if
            two instances choose one layer.

    **Hooks.** ``on_fit_start`` wraps the ``forward`` of each layer on the instance.

    **Logs.** None.

    **State.** None: buffers and keys of the module stay the same.

    **Cost.** A contiguous batch is normalized by one call, without a copy. Uneven chunks, other memory formats such
    as channels_last, and layers with their own ``forward`` take one call for each chunk, and a copy of the outputs.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.GhostBatchNorm
                  init_args:
                    size: 128

    References:
        Hoffer et al., "Train longer, generalize better: closing the generalization gap in large batch training of
        neural networks", NeurIPS 2017, arXiv 1705.08741, section 4 and algorithm 1. The paper does not say which samples
        form a chunk, and how to divide a batch that is no multiple of the size.
    """

    namespace: ClassVar[str] = "batch_size"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        accumulation=yes("Each accumulated batch is divided by itself."),
        ddp=yes("Each rank divides its own batch."),
        compiled=yes("The compiler traces the chunks; another number of chunks is compiled again."),
    )
    trial: ClassVar[Mapping[str, Any]] = {"size": 4}
    neutral: ClassVar[Mapping[str, Any] | str] = {"size": 1_000_000}

    def __init__(
        self,
        size: int = 128,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.size = check_count(size, 2, "size")
        self.include = as_names(include)
        self.exclude = as_names(exclude)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self._refuse_synchronized(pl_module, is_asked=getattr(trainer.strategy, "_layer_sync", None) is not None)

    def _refuse_synchronized(self, pl_module: pl.LightningModule, is_asked: bool) -> None:
        layers = [name for name, child in pl_module.named_modules() if isinstance(child, nn.SyncBatchNorm)]
        if layers or is_asked:
            which = f" ({clean_name(layers[0])})" if layers else ""
            raise ValueError(
                f"{self.display_name} computes statistics over parts of the batch of a rank, and SyncBatchNorm{which} over "
                "all ranks. Keep one: drop the callback, or set sync_batchnorm=False and use BatchNorm."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_synchronized(pl_module, is_asked=False)  # of a module that makes its layers in configure_model
        chosen = self._choose(pl_module)
        for name, layer in chosen.items():
            self._refuse_second(trainer, name)
            self.undo.push(wrap_method(layer, "forward", partial(_in_chunks, layer, self.size)))
        words = f"normalizes batches of {counted(len(chosen), 'layer')} in chunks of at most {self.size} samples"
        self.announce(words, "layers", list(chosen))

    def _choose(self, pl_module: pl.LightningModule) -> dict[str, _BatchNorm]:
        """Return the layers by name."""
        layers = {clean_name(name): m for name, m in pl_module.named_modules() if isinstance(m, _BatchNorm)}
        if not layers:
            raise ValueError(
                f"{self.display_name} finds no BatchNorm layer in {type(pl_module).__name__}. Drop the callback."
            )
        for argument, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns or ():
                if not any(matches(name, [pattern]) for name in layers):
                    raise ValueError(
                        f"{self.display_name}({argument}=...): no BatchNorm layer is named {pattern!r}."
                        f"{hint_for(pattern, layers)} Layers: {listed(list(layers), most=8)}."
                    )
        chosen = {name: layer for name, layer in layers.items() if selects(name, self.include, self.exclude)}
        if not chosen:
            raise ValueError(f"{self.display_name} chooses no BatchNorm layer. Include more, or exclude fewer.")
        return chosen

    def _refuse_second(self, trainer: pl.Trainer, name: str) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is self:
                return
            if isinstance(other, GhostBatchNorm) and name in other.chosen().names:
                raise ValueError(
                    f"{other.display_name} and {self.display_name} would both divide the batches of {name!r}. Set "
                    "include= or exclude= so that they choose different layers."
                )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        samples = loader_batch_size(trainer)
        if samples is not None and samples <= self.size:
            self.tell_once(
                "small",
                rank_zero_info,
                f"batches have {samples} samples, no more than size={self.size}, so layers that see one row for each "
                "sample normalize as before. Set a smaller size.",
            )


def _in_chunks(layer: _BatchNorm, size: int, inner: Callable[..., Tensor], input: Tensor) -> Tensor:
    """Wrap the ``forward`` of a layer. The name of the input is that of torch, for calls by keyword."""
    return ghost_batch_norm(layer, input, size, inner) if layer.training else inner(input)
