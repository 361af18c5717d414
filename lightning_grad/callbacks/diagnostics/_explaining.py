"""What probes share that explain the answers of a classifier on a few samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks.diagnostics._image_maps import (
    MappedImage,
    draw_run,
    draw_samples,
    image_pixels,
    kept_pictures,
    overlaid,
)
from lightning_grad.core import (
    WHOLE_WEIGHTS,
    Compatibility,
    Look,
    LossRequest,
    ProbeCallback,
    ProbeLook,
    Reading,
    RunRecord,
    Table,
    check_count,
    manual,
    no,
    yes,
)
from lightning_grad.core.losses.given_functions import OUTPUTS_FN
from lightning_grad.core.probe_samples import Split
from lightning_grad.functional import ClassAnswers, class_answers
from lightning_grad.functional.choices import check_choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Target = Literal["answer", "label"]


class ExplainingProbe(ProbeCallback):
    """Explain the class scores of a classifier; logits and labels come from the loss of its own step.

    Its subclasses document the arguments.
    """

    way_out: ClassVar[str] = OUTPUTS_FN
    credits_samples: ClassVar[bool] = True
    looks_on_all_ranks: ClassVar[bool] = True  # the step may gather tensors from all ranks
    compatibility: ClassVar[Compatibility] = ProbeCallback.compatibility.but(
        compiled=yes("Compiled modules run eagerly in a look."),
        **manual(
            no(
                "runs training_step, which steps the optimizers itself under {}",
                "Set outputs_fn to a function (module, batch) -> (logits, labels)",
            )
        ),
        **WHOLE_WEIGHTS,
    )

    def __init__(
        self,
        samples: int | Sequence[int],
        every_n_epochs: int | None,
        every_n_steps: int | None,
        target: Target,
        class_names: Sequence[str] | None,
        split: Split,
        dataset: Callable[[pl.Trainer], Any] | None,
        loader_key: str | int | None,
        input_key: str | int | None,
        outputs_fn: Callable[[pl.LightningModule, Any], Any] | None,
        loss_index: int | None,
        figure: bool,
        name: str | None,
    ) -> None:
        super().__init__(samples, every_n_epochs, every_n_steps, split, dataset, loader_key, figure, name)
        check_choice(target, ("answer", "label"), "target")
        self.target: Target = target
        self.class_names = None if class_names is None else list(class_names)
        self.input_key = input_key
        self.outputs_fn = outputs_fn
        self.loss_index = check_count(loss_index, 0, "loss_index")

    @override
    def works_with(self) -> Compatibility:
        return self.compatibility if self.outputs_fn is None else self.compatibility.but(**manual(yes()))

    @override
    def loss_request(self) -> LossRequest:
        return LossRequest(
            self.display_name, self.loss_index, self.way_out, outputs_fn=self.outputs_fn, by_classes=True
        )

    def answers_of(self, look: Look) -> ClassAnswers:
        """Run the step, and return the answers of the network with their graph."""
        try:
            return class_answers(look.loss(keep_graph=True))
        except ValueError as error:
            if self.display_name in str(error):
                raise
            advice = f"{self.way_out[0].upper()}{self.way_out[1:]}"
            raise ValueError(f"{self.display_name} explains classes: {error} {advice}.") from None

    def refuse_moved_rows(self, look: ProbeLook) -> None:
        """In the first look, raise if the answers do not follow reordered samples."""
        if not self._is_rehearsed:
            look.refuse_moved_rows(lambda part: self.answers_of(part).probabilities)

    def classes_of(self, found: ClassAnswers) -> Tensor:
        """Return the class that is explained of each sample; -1 stands for the answer."""
        return found.labels if self.target == "label" else found.answers

    # What a look found.

    def answer_scalars(self, found: ClassAnswers) -> dict[str, float | Tensor]:
        """Return confidence of the shown samples, and accuracy of those with a label."""
        confidence = found.probabilities.gather(1, found.answers[:, None])
        return {"accuracy": found.are_right[found.labels >= 0].float().mean(), "confidence": confidence.mean()}

    def answer_rows(self, look: Look, found: ClassAnswers) -> list[dict[str, Any]]:
        """Return a row for each sample, with index, label, answer and confidence."""
        answers, labels = found.answers.tolist(), found.labels.tolist()
        return [
            {
                "index": index,
                "label": None if labels[place] < 0 else self._named(labels[place]),
                "answer": self._named(answers[place]),
                "confidence": round(found.probabilities[place, answers[place]].item(), 4),
                "right": None if labels[place] < 0 else labels[place] == answers[place],
            }
            for place, index in enumerate(look.indices)
        ]

    def image_reading(
        self, look: ProbeLook, images: Tensor, maps: Tensor, found: ClassAnswers, scalars: Mapping[str, Any], title: str
    ) -> Reading:
        """Return a reading with the images and their maps, (B, H, W), as figure and table."""
        rows = self.answer_rows(look, found)
        samples = list(_mapped(images, maps, rows))
        return Reading(
            {**self.answer_scalars(found), **scalars},
            pictures={"maps": partial(draw_samples, samples, title)} if self.figure else {},
            tables={"samples": Table(rows, [sample.side_by_side for sample in samples])},
            kept={
                "images": kept_pictures([sample.pixels for sample in samples]),
                "overlays": kept_pictures([sample.overlay for sample in samples]),
                "wrong": torch.tensor([sample.is_wrong for sample in samples]),
                "indices": torch.tensor(look.indices),
            },
        )

    def _named(self, number: int) -> str:
        names = self.class_names or []
        return names[number] if number < len(names) else str(number)

    def title(self) -> str:
        """Return what the figure of the run shows."""
        return self.display_name

    @override
    def draw(self, record: RunRecord) -> Figure:
        kept = self.kept_looks.kept
        overlays = [(f"epoch {row['epoch']}\nstep {row['step']}", row["overlays"], row["wrong"]) for row in kept]
        shown, count = len(kept[-1]["images"]), len(kept[-1]["indices"])
        some = "" if shown == count else f" (first {shown} of {count} samples)"
        title = f"{self.title()} over the run{some}; wrong answers are framed"
        return draw_run(kept[-1]["images"], overlays, kept[-1]["indices"].tolist(), title)


def _mapped(images: Tensor, maps: Tensor, rows: Sequence[Mapping[str, Any]]) -> Iterator[MappedImage]:
    for image, values, row in zip(images, maps, rows, strict=True):
        pixels = image_pixels(image)
        place = (row["index"], row["answer"], row["label"], row["confidence"])
        yield MappedImage(pixels, overlaid(pixels, values), *place, row["right"] is False, not bool(values.any()))
