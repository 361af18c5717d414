"""What a classifier answers for each sample, from the loss call of its batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_grad.functional.gradients.loss_functions import LossCall

_BINARY = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
_OF_CLASSES = ("cross_entropy", "nll_loss", "multi_margin_loss", *_BINARY)


@dataclass(frozen=True, eq=False)
class ClassAnswers:
    """The scores of all classes, the answers and the labels of a batch.

    Args:
        scores: Logits or log-probabilities with their graph, (B, C); of a binary loss, minus and plus the logit.
        labels: Label of each sample, (B,); -1 for a sample without one. Of several labels, the one with the highest
            score.
        probabilities: (B, C), detached.
    """

    scores: Tensor
    labels: Tensor
    probabilities: Tensor

    @property
    def answers(self) -> Tensor:
        """The class with the highest score, (B,)."""
        return self.scores.detach().argmax(1)

    @property
    def are_right(self) -> Tensor:
        """Whether answer and label are equal, (B,)."""
        return self.answers == self.labels

    def of(self, classes: Tensor) -> Tensor:
        """Return the score of one class of each sample, (B,); class -1 stands for the answer."""
        chosen = torch.where(classes < 0, self.answers, classes)
        return self.scores.gather(1, chosen.unsqueeze(1)).squeeze(1)


def class_answers(call: LossCall) -> ClassAnswers:
    """Return the answers of a classifier.

    Args:
        call: The loss call of a batch, captured with ``keep_graph=True``.

    Raises:
        ValueError: If the loss does not compare one vector of class scores with the label or labels of each sample.

    Example:
        >>> from lightning_grad.functional import LossCapture
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]], requires_grad=True)
        >>> with LossCapture(keep_graph=True) as capture:
        ...     _ = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
        >>> found = class_answers(capture.only())
        >>> found.answers, found.are_right
        (tensor([0, 0]), tensor([ True, False]))
    """
    output, is_binary = call.output, call.name in _BINARY
    is_single = is_binary and call.input.numel() == call.samples
    fits = is_single or (call.input.dim() == 2 and len(call.input) == call.samples)
    has_labels = call.labels is not None or call.target.shape == call.input.shape
    if output is None or call.name not in _OF_CLASSES or not fits or not has_labels:
        raise ValueError(
            f"the loss must compare class scores (B, C) with the label of each sample; got, for B = {call.samples}, "
            f"{call.name} with input "
            f"{tuple(call.input.shape)} and target {tuple(call.target.shape)} of {call.target.dtype}."
        )
    scores = output.reshape(call.samples, -1)
    if call.name == "binary_cross_entropy":
        scores = torch.logit(scores, 1e-6)
    if is_single:
        scores = torch.cat([-scores, scores], 1)
        return ClassAnswers(scores, (call.target.reshape(-1) > 0.5).long(), scores.detach().float().sigmoid())
    values = scores.detach().float()
    if is_binary:
        positive = call.target > 0.5
        labels = values.masked_fill(~positive, -torch.inf).argmax(1).masked_fill(~positive.any(1), -1)
        return ClassAnswers(scores, labels, values.sigmoid())
    probabilities = values.exp() if call.name == "nll_loss" else values.softmax(1)
    if call.labels is None:
        return ClassAnswers(scores, call.target.argmax(1), probabilities)
    is_valid = call.valid.reshape(call.samples)
    return ClassAnswers(scores, call.labels.long().masked_fill(~is_valid, -1), probabilities)
