"""Measure one batch of a training set through the module's own ``training_step``."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_grad.core.losses.given_functions import ANY_LOSS, LossRequest, call_of, checked_losses, with_graph
from lightning_grad.core.losses.sample_losses import SampleLosses, only_loss, refuse_rest, terms_of, trace_of
from lightning_grad.functional import InseparableLossError, LossCall, LossCapture, PerSampleGradients
from lightning_grad.functional.gradients.whole_loss import WholeLossCapture

Measure = Callable[["Look"], Mapping[str, Tensor]]


class SkippedBatchError(Exception):
    """The step returned None for a batch, which tells Lightning to skip the batch."""


@dataclass
class Look:
    """One batch, with methods to measure what the module computes for it.

    Args:
        pl_module: The module, in eval mode.
        batch: The batch, on the device.
        indices: Indices of the samples in the data set.
        total: Length of the data set.
        run: Runs ``training_step`` on the batch.
        asked: Requirements on the losses of the step.
        memory: Values that a measure keeps from batch to batch.
    """

    pl_module: pl.LightningModule
    batch: Any
    indices: list[int]
    total: int
    run: Callable[[], object]
    asked: LossRequest = ANY_LOSS
    memory: dict[str, Any] = field(default_factory=dict)

    def losses(self, keep_graph: bool = False) -> SampleLosses:
        """Run the step and return the loss of every sample, whether the step's loss is one call or several terms.

        Raises:
            SkippedBatchError: If the step returns None.
            InseparableLossError: If the loss is not a sum of one term for each sample.
            ValueError: If ``loss_fn`` does not return one loss for each sample.
        """
        if self.asked.loss_fn is not None:
            with torch.set_grad_enabled(keep_graph):
                losses = checked_losses(self.asked.loss_fn(self.pl_module, self.batch), len(self.indices))
            return SampleLosses(with_graph(losses, self.asked.display_name) if keep_graph else losses)
        if self._is_first:
            capture, output = self._first_run()
            try:
                call = self._whole_call(capture, output)
                return SampleLosses(call.losses if keep_graph else call.losses.detach(), call)
            except (RuntimeError, ValueError) as error:  # the loss is not one call: try its terms
                self.memory["calls"] = [call.name for call in capture.calls]
                try:
                    return self._by_terms(keep_graph)
                except InseparableLossError:
                    if isinstance(error, ValueError):  # it explains better why there are too few rows
                        raise error from None
                    raise
        if "terms" in self.memory:
            return self._by_terms(keep_graph)
        call = self.loss(keep_graph)
        return SampleLosses(call.losses, call)

    def _by_terms(self, keep_graph: bool) -> SampleLosses:
        """Return the losses from the autograd graph of the step's loss."""
        trace = trace_of(self.pl_module, len(self.indices), keep_graph)
        with torch.enable_grad():
            with trace:
                output = self._run()
            calls = self.memory.get("calls", [""])
            terms = terms_of(trace, output, self.asked.needs_losses(*calls[:1]), self.memory.get("terms"))
        if "terms" not in self.memory:
            self.memory |= {"terms": terms, "kind": self.asked.kind()}
        if not keep_graph:
            terms.release()
        return SampleLosses.of_terms(terms, self.memory["kind"])

    @property
    def _is_first(self) -> bool:
        """Whether it is still unknown if the step's loss is one call or several terms, and it matters."""
        return self.asked.loss_index is None and not self.memory.keys() & {"whole", "terms"}

    def loss(self, keep_graph: bool = False) -> LossCall:
        """Run the step and return its loss call.

        Raises:
            SkippedBatchError: If the step returns None.
            RuntimeError: If no loss is captured, or only a part of it.
            ValueError: If ``outputs_fn`` does not return logits and labels.
        """
        if self.asked.outputs_fn is not None:
            check = not self.memory.get("labels_checked")
            self.memory["labels_checked"] = True
            with torch.set_grad_enabled(keep_graph):
                found = self.asked.outputs_fn(self.pl_module, self.batch)
                return call_of(found, len(self.indices), keep_graph, check)
        loss_index = self.asked.loss_index
        if loss_index is None and "whole" not in self.memory:
            return self._whole_call(*self._first_run())
        loss_index = self.memory.get("loss_index") if loss_index is None else loss_index
        capture = self._captured(keep_graph)
        several = len(capture.calls) + len(capture.unread) > 1
        if loss_index is None and several and not any(call.has_graph for call in capture.calls):
            # Only a graph distinguishes the loss from values that the step computes for its logs.
            found = self._captured(with_graph=True)
            loss_index = self.memory["loss_index"] = found.calls.index(only_loss(found, self.asked))
        return only_loss(capture, self.asked, loss_index)

    def _first_run(self) -> tuple[WholeLossCapture, object]:
        capture = WholeLossCapture(self.pl_module, len(self.indices), way_out=self.asked.way_out)
        with torch.enable_grad(), capture:
            return capture, self._run()

    def _whole_call(self, capture: WholeLossCapture, output: object) -> LossCall:
        call = only_loss(capture, self.asked)
        refuse_rest(capture, call, output, self.asked)
        self.memory["whole"] = True
        if len(capture.calls) + len(capture.unread) > 1:
            self.memory["loss_index"] = capture.calls.index(call)
        return call

    def _run(self) -> object:
        output = self.run()
        if output is None:
            raise SkippedBatchError
        return output

    def _captured(self, with_graph: bool) -> LossCapture:
        """Run the step inside a capture: without a graph if possible, which saves memory."""
        with_graph = with_graph or bool(self.memory.get("needs_graph"))
        capture = LossCapture(len(self.indices), keep_graph=with_graph, way_out=self.asked.way_out)
        try:
            with torch.set_grad_enabled(with_graph), capture:
                self._run()
            return capture
        except RuntimeError:
            if with_graph:
                raise
        # A step that differentiates something itself, such as a gradient penalty, needs a graph.
        found = self._captured(with_graph=True)
        self.memory["needs_graph"] = True
        return found

    def gradient_norms(self) -> tuple[Tensor, SampleLosses]:
        """Return the gradient norm of every sample, and the losses."""
        return self._differentiated(lambda gradients, losses: gradients(losses))

    def gradient_rows(self, receive: Callable[[str, int, Tensor], None]) -> SampleLosses:
        """Send the gradient of every sample in blocks, as :meth:`PerSampleGradients.stream` does, and return the losses."""
        return self._differentiated(lambda gradients, losses: gradients.stream(losses, receive))[1]

    def _differentiated(
        self, measure: Callable[[PerSampleGradients, Callable[[], Tensor]], Any]
    ) -> tuple[Any, SampleLosses]:
        if self._is_first and self.asked.loss_fn is None:
            self.losses()
        if "norms" not in self.memory:
            self.memory["norms"] = PerSampleGradients(self.pl_module)
        found: list[SampleLosses] = []

        def losses() -> Tensor:
            found[:] = [self.losses(keep_graph=True)]
            return found[0].losses

        try:
            with torch.enable_grad():
                return measure(self.memory["norms"], losses), found[0]
        except (RuntimeError, ValueError) as error:  # it may be the step's own error, so only a note is added
            name, advice = self.asked.display_name, self.asked.advice
            error.add_note(f"{name} was measuring the gradient of each sample. If the module cannot change: {advice}")
            raise

    def features(self) -> tuple[Tensor, LossCall, nn.Linear]:
        """Return the input of the last linear layer, the loss call on its output, and the layer.

        Raises:
            ValueError: If the logits are not the output of an ``nn.Linear``.
        """
        seen: list[tuple[nn.Linear, Tensor, Tensor]] = []
        layers = [layer for layer in self.pl_module.modules() if isinstance(layer, nn.Linear)]

        def see(layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((layer, args[0], output))

        with ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(layer.register_forward_hook(see))
            call = self.loss()
        for layer, taken_in, output in reversed(seen):
            if isinstance(output, Tensor) and output.data_ptr() == call.input.data_ptr():
                return taken_in.detach(), call, layer
        raise ValueError(
            f"{self.asked.display_name} needs the features of the last layer for this score, but the logits of "
            f"{type(self.pl_module).__name__} are not the output of an nn.Linear. Use another score, or "
            f"{self.asked.way_out}."
        )
