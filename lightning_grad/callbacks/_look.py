"""One batch of a training set, and the means to see what the module's own ``training_step`` makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_grad.callbacks._whole_step import refuse_rest
from lightning_grad.functional import LossCall, LossCapture, PerSampleGradientNorms
from lightning_grad.functional._whole_loss import WholeLossCapture

Measure = Callable[["Look"], Mapping[str, Tensor]]


SCORE_FN = "give score_fn= in place of a score: it takes the module and a batch, and returns the scores"


def only_loss(capture: LossCapture, label: str, which: int | None = None) -> LossCall:
    """Return the loss of a step that was run.

    Args:
        capture: What was seen of it.
        label: Who asks, for errors.
        which: Which of several losses counts.

    Raises:
        RuntimeError: If no loss can be read, or it is not clear which of several is meant.
        ValueError: If the rows of the only one do not divide by the number of samples.
    """
    try:
        return capture.only(which)
    except (RuntimeError, ValueError) as error:
        raise type(error)(f"{label} must see the loss of each sample. {error}") from None


class SkippedBatchError(Exception):
    """The step returned nothing for a batch, as it does for one that Lightning is to train nothing on."""


@dataclass
class Look:
    """One batch, and the means to see what the module makes of it.

    Args:
        pl_module: The module, in eval mode.
        batch: Its batch, on the device.
        indices: The samples' indices in the data set.
        total: Length of the data set.
        run: Runs ``training_step`` on it.
        memory: What a measure wants to keep from batch to batch.
        which: Which loss of the step counts, whatever else it computes. By default the one whose mean the step returns.
        label: Who looks, for errors.
        way_out: What to do about a loss that cannot be seen, as a clause that begins with a verb.
    """

    pl_module: pl.LightningModule
    batch: Any
    indices: list[int]
    total: int
    run: Callable[[], object]
    memory: dict[str, Any] = field(default_factory=dict)
    which: int | None = None
    label: str = "The score"
    way_out: str = SCORE_FN

    def loss(self, keep_graph: bool = False) -> LossCall:
        """Run the step and return the call of its loss.

        Raises:
            SkippedBatchError: If the step returns nothing.
            RuntimeError: If no loss is seen, or only a part of it.
        """
        if self.which is None and "whole" not in self.memory:
            return self._whole_loss()
        which = self.which if self.which is not None else self.memory.get("which")
        capture = self._captured(keep_graph)
        several = len(capture.calls) + len(capture.unread) > 1
        if which is None and several and not any(call.has_graph for call in capture.calls):
            # Only with a graph the loss can be told from what a step computes for its log.
            found = self._captured(with_graph=True)
            which = self.memory["which"] = found.calls.index(self._only(found))
        return self._only(capture, which)

    def _whole_loss(self) -> LossCall:
        """Return the loss of the first batch that has one, after a look at what else the step's loss consists of."""
        capture = WholeLossCapture(self.pl_module, len(self.indices), way_out=self.way_out)
        with torch.enable_grad(), capture:
            output = self._run()
        call = self._only(capture)
        refuse_rest(capture, call, output, self.label, self.way_out)
        self.memory["whole"] = True
        if len(capture.calls) + len(capture.unread) > 1:
            self.memory["which"] = capture.calls.index(call)
        return call

    def _only(self, capture: LossCapture, which: int | None = None) -> LossCall:
        return only_loss(capture, self.label, which)

    def _run(self) -> object:
        output = self.run()
        if output is None:
            raise SkippedBatchError
        return output

    def _captured(self, with_graph: bool) -> LossCapture:
        with_graph = with_graph or bool(self.memory.get("needs_graph"))
        capture = LossCapture(len(self.indices), keep_graph=with_graph, way_out=self.way_out)
        try:
            with torch.set_grad_enabled(with_graph), capture:
                self._run()
            return capture
        except RuntimeError:
            if with_graph:
                raise
        # A step that differentiates something itself, as a gradient penalty does, needs a graph.
        found = self._captured(with_graph=True)
        self.memory["needs_graph"] = True
        return found

    def gradient_norms(self) -> tuple[Tensor, LossCall]:
        """Return the norm of every sample's own gradient, and the loss."""
        if self.which is None and "whole" not in self.memory:
            self._whole_loss()
        if "norms" not in self.memory:
            self.memory["norms"] = PerSampleGradientNorms(self.pl_module)
        found: list[LossCall] = []

        def losses() -> Tensor:
            found[:] = [self.loss(keep_graph=True)]
            return found[0].losses

        try:
            with torch.enable_grad():
                return self.memory["norms"](losses), found[0]
        except (RuntimeError, ValueError) as error:  # of the step, perhaps, so its words stay as they are
            error.add_note(f"{self.label} measured the gradient of each sample. Use another score, or {self.way_out}.")
            raise

    def features(self) -> tuple[Tensor, LossCall, nn.Linear]:
        """Return what the last linear layer takes in, the loss of what it gives out, and the layer.

        Raises:
            ValueError: If the logits are not the output of an ``nn.Linear``.
        """
        seen: list[tuple[nn.Linear, Tensor, Tensor]] = []
        layers = [layer for layer in self.pl_module.modules() if isinstance(layer, nn.Linear)]

        def see(layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((layer, args[0], output))

        hooks = [layer.register_forward_hook(see) for layer in layers]
        try:
            call = self.loss()
        finally:
            for hook in hooks:
                hook.remove()
        for layer, taken_in, output in reversed(seen):
            if isinstance(output, Tensor) and output.data_ptr() == call.input.data_ptr():
                return taken_in.detach(), call, layer
        raise ValueError(
            f"{self.label} needs the features of the last layer for this score, and the logits of "
            f"{type(self.pl_module).__name__} are not the output of an nn.Linear. Use another score, or {self.way_out}."
        )
