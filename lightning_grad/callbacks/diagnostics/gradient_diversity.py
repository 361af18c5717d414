"""Measure how many different directions the gradients of the samples have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.core import (
    WHOLE_WEIGHTS,
    Compatibility,
    LossRequest,
    ProbeCallback,
    ProbeLook,
    Reading,
    RunRecord,
    check_count,
    manual,
    no,
    yes,
)
from lightning_grad.core.losses.given_functions import LOSS_FN
from lightning_grad.core.probe_samples import Split
from lightning_grad.core.record import panels, style_axis
from lightning_grad.functional import RademacherProjection, vendi_score
from lightning_grad.utilities.checks import check_only_one

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class GradientDiversity(ProbeCallback):
    r"""Measure the diversity of the samples' gradients (G-Vendi): the effective number of different directions.

    .. math::
        V = \exp\Bigl(-\sum_i \lambda_i \log \lambda_i\Bigr), \qquad
        \lambda = \operatorname{eig}\bigl(\hat G \hat G^T / n\bigr)

    where the rows of :math:`\hat G` are the normalized gradients of n training samples, projected to ``dim`` entries. V
    is 1 if all samples pull in the same direction, and n if each pulls in its own.

    Args:
        samples: Number of samples n, spread evenly over the set, or their indices.
        dim: Entries of a projected gradient, a multiple of 64.
            Cosines have a standard error of up to sqrt(2 / dim).
        every_n_epochs: Look at the end of every n-th epoch. Default: 1.
        every_n_steps: Look after every n-th optimizer step instead.
        split: Set that the samples are from, "train" or "val".
        dataset: Callable (trainer) -> data set to read from, for example one without augmentation.
        loader_key: Key or list position of the loader to use, if there are several.
        loss_fn: Callable (module, batch) -> loss of each sample. Use it if the loss of the step cannot be separated.
        loss_index: Index, from 0, of the loss call to use. Default: the loss that the step returns.
        seed: Seed of the projection, which is the same in each look.
        figure: Draw figures (needs matplotlib and a logger with a folder).
        name: Name of this instance, needed if two are used; part of state and log keys.

    Raises:
        ValueError: In the constructor for wrong arguments. In ``setup`` for sharded strategies and manual optimization. After
            the first batch, if there are fewer samples, or fewer than two with a gradient.
        RuntimeError: After the first batch, if the loss cannot be separated into samples, or the loss of a sample depends on
            other samples.

    **Hooks.** Those of :class:`~lightning_grad.core.ProbeCallback`.

    **Logs** under ``diversity/``, in each look: ``g_vendi``; ``share``, G-Vendi divided by the number of samples with a
    gradient; ``mean_cosine``, the mean over all pairs; ``zero_gradients``, the number of samples without a direction; the
    image ``cosines`` between all pairs, sorted by label. At the end: the figure of the run and a table.

    **State.** The scalars of all looks, and whether a look is due.

    **Cost.** About two forward and backward passes of the samples, a few more for the first batch of a look, and
    ``samples * dim`` products for each weight, for the projection. Gradients are projected block by block and never stored.
    See docs/benchmarks.md.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.GradientDiversity
                  init_args:
                    samples: 100

    References:
        Jung et al., "Prismatic Synthesis: Gradient-based Data Diversification Boosts Generalization in LLM Reasoning", 2025,
        arXiv 2505.20161.
    """

    namespace: ClassVar[str] = "diversity"
    way_out: ClassVar[str] = LOSS_FN
    looks_on_all_ranks: ClassVar[bool] = True  # the step may gather tensors from all ranks
    compatibility: ClassVar[Compatibility] = ProbeCallback.compatibility.but(
        compiled=yes("Compiled modules run eagerly in a look."),
        complex_parameters=no("projects real gradients, and {} is complex", "Store it as real and imaginary part"),
        **manual(
            no(
                "differentiates the losses of training_step, which steps the optimizers itself under {}",
                "Set loss_fn to a function (module, batch) -> loss of each sample",
            )
        ),
        **WHOLE_WEIGHTS,
    )
    credits_samples: ClassVar[bool] = True
    trial: ClassVar[Mapping[str, Any]] = {"samples": 6, "dim": 64}

    def __init__(
        self,
        samples: int | Sequence[int] = 100,
        dim: int = 1024,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        split: Split = "train",
        dataset: Callable[[pl.Trainer], Any] | None = None,
        loader_key: str | int | None = None,
        loss_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        loss_index: int | None = None,
        seed: int = 0,
        figure: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(samples, every_n_epochs, every_n_steps, split, dataset, loader_key, figure, name)
        count = self.samples if isinstance(self.samples, int) else len(self.samples)
        if count < 2:
            raise ValueError("samples must be at least 2, because the score compares their gradients; got 1.")
        RademacherProjection(1, dim)  # raises for a wrong dim
        check_only_one({"loss_index": loss_index, "loss_fn": loss_fn}, "choose the loss")
        self.dim = dim
        self.loss_fn = loss_fn
        self.loss_index = check_count(loss_index, 0, "loss_index")
        self.seed = check_count(seed, 0, "seed")

    @override
    def works_with(self) -> Compatibility:
        return self.compatibility if self.loss_fn is None else self.compatibility.but(**manual(yes()))

    @override
    def loss_request(self) -> LossRequest:
        return LossRequest(self.display_name, self.loss_index, self.way_out, self.loss_fn)

    # A look.

    @override
    def probe(self, look: ProbeLook) -> Reading:
        gradients, labels = list[Tensor](), list[Tensor | None]()
        if not self._is_rehearsed:
            look.refuse_moved_rows(lambda part: part.losses().losses)
        for part in look.parts():
            projection = RademacherProjection(len(part.indices), self.dim, self.seed)
            found = part.gradient_rows(projection.add)
            gradients.append(projection.values)
            labels.append(None if found.call is None else found.call.labels)
        score, cosines = vendi_score(torch.cat(gradients))
        count = int(cosines.diagonal().isfinite().sum())
        if count < 2:
            raise ValueError(
                f"{self.display_name} needs two samples with a gradient, but only {count} of {len(cosines)} have one that "
                "is finite and not zero. Check the loss that training_step returns in eval mode, or set samples to others."
            )
        scalars = {
            "g_vendi": score,
            "share": score / count,
            "mean_cosine": float(cosines.nansum() - count) / (count * (count - 1)),
            "zero_gradients": float(len(cosines) - count),
        }
        title = f"{self.display_name}, epoch {look.epoch}, step {look.step}: {score:.1f} directions of {count} samples"
        known = [each for each in labels if each is not None]
        classes = torch.cat(known).cpu() if len(known) == len(labels) else None
        drawn = partial(_draw_cosines, cosines, classes, title)
        return Reading(scalars, pictures={"cosines": drawn} if self.figure else {})

    @override
    def draw(self, record: RunRecord) -> Figure:
        count: int = len(self._indices) or (self.samples if isinstance(self.samples, int) else len(self.samples))
        figure, axes = panels(f"{self.display_name}: directions of the gradients of {count} samples", [2.6, 1.8])
        steps, values = record.series("g_vendi")
        axes[0].plot(steps, values, "o-", color="#0072b2", markersize=3.5)
        axes[0].set_ylabel("G-Vendi: number of\ndifferent directions")
        axes[0].set_ylim(0, 1.1 * max(values))
        share = axes[0].secondary_yaxis(
            "right", functions=(partial(np.multiply, 1 / count), partial(np.multiply, count))
        )
        share.set_ylabel("share of the samples")
        axes[1].plot(*record.series("mean_cosine"), "o-", color="#e69f00", markersize=3.5)
        axes[1].axhline(0, color="0.4", linewidth=0.8)
        axes[1].set_ylabel("mean cosine\nof two samples")
        axes[1].set_xlabel("step")
        for axis in axes:
            style_axis(axis)
        return figure


def _draw_cosines(cosines: Tensor, labels: Tensor | None, title: str) -> Figure:
    """Draw the cosines between the gradients of all pairs, sorted by label. Needs matplotlib."""
    from matplotlib.figure import Figure

    order = torch.arange(len(cosines)) if labels is None else labels.argsort(stable=True)
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    axis = figure.subplots()
    image = axis.imshow(cosines[order][:, order].numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    figure.colorbar(image, label="cosine between gradients")
    if labels is None:
        axis.set_xlabel("sample")
        axis.set_ylabel("sample")
        return figure
    classes, counts = np.unique(labels.numpy(), return_counts=True)
    ends = counts.cumsum()
    for end in ends[:-1].tolist():
        axis.axhline(end - 0.5, color="black", linewidth=0.5)
        axis.axvline(end - 0.5, color="black", linewidth=0.5)
    if len(classes) <= 20:
        places = (ends - counts / 2 - 0.5).tolist()
        axis.set_xticks(places, list(map(str, classes)))
        axis.set_yticks(places, list(map(str, classes)))
    axis.set_xlabel("label of the sample")
    axis.set_ylabel("label of the sample")
    return figure
