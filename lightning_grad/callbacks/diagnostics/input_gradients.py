"""Show which entries of its input the answer of a classifier depends on."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_grad.callbacks.diagnostics._explaining import ExplainingProbe, Target
from lightning_grad.callbacks.diagnostics._image_maps import channels_first, is_series
from lightning_grad.core import ProbeLook, Reading, RunRecord, Table, find_input, input_at, with_input
from lightning_grad.core.probe_samples import Split
from lightning_grad.functional import ClassAnswers, OutputCapture
from lightning_grad.functional.plain_tensors import dressed, plain_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOP = 0.1  # share of the entries whose part of the whole is logged
_LISTED = 5  # positions in the table
_MOST_ROWS = 64  # samples in the figure of a look


class InputGradientLogger(ExplainingProbe):
    r"""Show the input gradient of some samples: which pixels, features or tokens the answer depends on.

    .. math::
        S = \Bigl| \frac{\partial s_c}{\partial x} \Bigr|

    where :math:`s_c` is the logit of class c. Of several channels, the largest value counts. If the batch has no
    floating-point input, x is the output of the first ``nn.Embedding`` that the step calls on the samples, and S the
    norm of the gradient for each token. Inputs (B, C, T) or (B, T, C) with T at least eight times C are series, with
    one value for each time.

    Args:
        samples: Number of samples to show, spread evenly over the set, or their indices.
        every_n_epochs: Look at the end of every n-th epoch. Default: 1.
        every_n_steps: Look after every n-th optimizer step instead.
        target: Class that is explained: the "answer" of the network or the "label".
        class_names: Names of the classes, for figures and tables.
        split: Set that the samples are from, "train" or "val".
        dataset: Callable (trainer) -> data set to read from, for example one without augmentation.
        loader_key: Key or list position of the loader to use, if there are several.
        input_key: Key or position of the input in the batch; join nested keys with dots.
            Default: the first floating-point tensor with at least two dimensions; without one, the embedding.
        outputs_fn: Callable (module, batch) -> (logits, labels). Use it if the loss cannot be captured.
        loss_index: Index, from 0, of the loss call to use. Default: the only classification loss.
        figure: Draw figures (needs matplotlib and a logger with a folder).
        name: Name of this instance, needed if two are used; part of state and log keys.

    Raises:
        ValueError: In the constructor for wrong arguments. In ``setup`` for sharded strategies and manual optimization. When
            training starts, without validation data. After the first batch, if there are fewer samples, the answers do not
            depend on the input, or the loss does not compare class scores with labels.
        TypeError: After the first batch, without a floating-point input and an embedding.
        RuntimeError: After the first batch, if no loss can be captured.

    **Hooks.** Those of :class:`~lightning_grad.core.ProbeCallback`. Hooks on embeddings exist only during a look.

    **Logs** under ``explain/input_gradients/``, in each look: ``accuracy`` and ``confidence`` of the shown samples;
    ``gradient_norm``, the mean norm of the input gradient; ``top_share``, the part of S in the tenth of the entries with
    the largest S, 0.1 if it is even; the image ``maps`` and the table ``samples``. At the end: the figure of the run and
    a table of the scalars.

    **State.** The scalars of all looks, 12 small overlays or mean gradients of up to eight looks, and whether a look is
    due.

    **Cost.** One forward and one backward pass of the shown samples in each look. See docs/benchmarks.md.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.InputGradientLogger
                  init_args:
                    samples: 8

    References:
        Simonyan, Vedaldi and Zisserman, "Deep Inside Convolutional Networks: Visualising Image Classification Models and
        Saliency Maps", 2013, arXiv 1312.6034.
        Shah, Jain and Netrapalli, "Do Input Gradients Highlight Discriminative Features?", 2021, arXiv 2102.12781.
    """

    namespace: ClassVar[str] = "explain/input_gradients"
    trial: ClassVar[Mapping[str, Any]] = {"samples": 4}

    def __init__(
        self,
        samples: int | Sequence[int] = 8,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        target: Target = "answer",
        class_names: Sequence[str] | None = None,
        split: Split = "val",
        dataset: Callable[[pl.Trainer], Any] | None = None,
        loader_key: str | int | None = None,
        input_key: str | int | None = None,
        outputs_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        loss_index: int | None = None,
        figure: bool = True,
        name: str | None = None,
    ) -> None:
        chosen = (samples, every_n_epochs, every_n_steps, target, class_names, split, dataset, loader_key)
        super().__init__(*chosen, input_key, outputs_fn, loss_index, figure, name)

    # A look.

    @override
    def probe(self, look: ProbeLook) -> Reading:
        self.refuse_moved_rows(look)
        path = find_input(look.batch, self.input_key, self.display_name)
        if path is None:
            inputs, gradient, found = self._of_embedding(look)
        else:
            given = input_at(look.batch, path)
            inputs = plain_tensor(given).detach().clone().requires_grad_()
            with torch.enable_grad():
                found = self.answers_of(look.on(with_input(look.batch, path, dressed(inputs, given))))
            gradient = self._gradient(look, found, inputs)
        saliency = gradient.abs().float()
        title = f"{self.display_name}, epoch {look.epoch}: bright parts change the score of the {self.target}"
        rows = _by_position(gradient.float(), is_embedding=path is None)
        scalars = _scalars(gradient.float().flatten(1).norm(dim=1), rows if path is None else saliency.flatten(1))
        is_image = path is not None and not is_series(inputs)
        images, maps = (channels_first(each) if is_image else None for each in (inputs.detach(), saliency))
        if images is not None and maps is not None:
            return self.image_reading(look, images, maps.amax(1), found, scalars, title)
        return self._rows_reading(look, rows, found, scalars, title)

    def _of_embedding(self, look: ProbeLook) -> tuple[Tensor, Tensor, ClassAnswers]:
        """Return the output of the first embedding of the samples that the step calls, its gradient and the answers."""

        def is_first(output: Tensor) -> bool:  # an embedding of positions may have no samples
            return len(output) == len(look.indices) and not any(capture.outputs for capture in captures)

        captures = [
            OutputCapture(each, is_first) for each in look.pl_module.modules() if isinstance(each, nn.Embedding)
        ]
        with torch.enable_grad(), ExitStack() as stack:
            for capture in captures:
                stack.enter_context(capture)
            found = self.answers_of(look)
        output = next((capture.output for capture in captures if capture.output is not None), None)
        if output is None:
            raise TypeError(
                f"{self.display_name} needs an input with a gradient, but the batch has no floating-point tensor with two "
                "or more dimensions, and the step calls no nn.Embedding. Set input_key to a floating-point tensor, and "
                "convert images to floating point in the data set."
            )
        return output, self._gradient(look, found, output), found

    def _gradient(self, look: ProbeLook, found: ClassAnswers, inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            score = found.of(self.classes_of(found)).sum()
        gradient = torch.autograd.grad(score, inputs, allow_unused=True)[0] if score.requires_grad else None
        if gradient is None or len(gradient) != len(look.indices):
            raise ValueError(
                f"{self.display_name} found no gradient of the answers with respect to the input {tuple(inputs.shape)}. Set "
                "input_key to the tensor that the network reads, with one row for each sample, and do not detach it."
            )
        return gradient.detach()

    def _rows_reading(
        self, look: ProbeLook, saliency: Tensor, found: ClassAnswers, scalars: Mapping[str, Any], title: str
    ) -> Reading:
        """Return a reading for inputs that are no images: one row of features or tokens for each sample."""
        rows = self.answer_rows(look, found)
        largest = saliency.topk(min(_LISTED, saliency.shape[1]), 1).indices.tolist()
        for row, positions in zip(rows, largest, strict=True):
            row["largest at"] = ", ".join(map(str, positions))
        scaled = saliency / saliency.amax(1, keepdim=True).clamp(min=1e-30)
        drawn = partial(_draw_rows, scaled.cpu(), rows, title)
        return Reading(
            {**self.answer_scalars(found), **scalars},
            pictures={"maps": drawn} if self.figure else {},
            tables={"samples": Table(rows)},
            kept={"mean": scaled.mean(0).cpu()},
        )

    @override
    def title(self) -> str:
        return f"{self.display_name}, input gradients"

    @override
    def draw(self, record: RunRecord) -> Figure:
        kept = self.kept_looks.kept
        if "mean" not in kept[-1]:
            return super().draw(record)
        names = [f"step {row['step']}" for row in kept]
        means = torch.stack([row["mean"] for row in kept])
        return _heat_map(means, names, f"{self.title()}: mean over the samples")


def _by_position(gradient: Tensor, is_embedding: bool) -> Tensor:
    """Return one value for each token, time or feature, (B, T)."""
    values = gradient.abs()
    if is_embedding and gradient.dim() > 2:
        values = gradient.norm(dim=-1)
    elif is_series(gradient):
        values = values.amax(1 if gradient.shape[1] < gradient.shape[2] else 2)
    return values.flatten(1)


def _scalars(norms: Tensor, saliency: Tensor) -> dict[str, Tensor]:
    count = max(1, round(_TOP * saliency.shape[1]))
    top = saliency.topk(count, 1).values.sum(1) / saliency.sum(1).clamp(min=1e-30)
    return {"gradient_norm": norms.mean(), "top_share": top.mean()}


def _draw_rows(saliency: Tensor, rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw the scaled input gradient of each sample as one row. Needs matplotlib."""
    saliency, rows = saliency[:_MOST_ROWS], rows[:_MOST_ROWS]
    signs = ["\N{BALLOT X} " if row["right"] is False else "" for row in rows]
    names = [
        f"{sign}#{row['index']}, {'no label' if row['label'] is None else 'label ' + row['label']}: "
        f"{row['answer']} ({row['confidence']:.0%})"
        for sign, row in zip(signs, rows, strict=True)
    ]
    return _heat_map(saliency, names, title)


def _heat_map(values: Tensor, names: Sequence[str], title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.3 * len(values)), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 88)), fontsize=11, parse_math=False)
    axis = figure.subplots()
    image = axis.imshow(values.numpy(), cmap="magma", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    figure.colorbar(image, label="input gradient,\nshare of the largest")
    axis.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axis.set_xlabel("position of the token, time or feature")
    return figure
