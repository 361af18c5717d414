"""Measurements of a batch in a scoring pass, by the name of the score.

Most scores come from a pass with the current module; those in ``HISTORIES`` are recorded while it trains.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from lightning_grad.core.losses.look import Look, Measure, SkippedBatchError
from lightning_grad.core.losses.sample_losses import SampleLosses, loss_of_output, refuse_loss
from lightning_grad.functional import LossCall, el2n, last_layer_gradient_norm, margin, predictions

Score = Literal["el2n", "grand", "grand-last", "loss", "margin", "aum", "forgetting", "vog", "prototypes", "less"]
HISTORIES = ("aum", "forgetting")
OF_CLASSES = ("el2n", "margin", "aum", "forgetting", "grand-last", "prototypes")  # need logits and labels
OF_LOSSES = ("loss", "grand", "vog", "less")
ONE_BY_ONE = ("loss", "grand", "less")  # need only the loss of each sample, so samples can be run one at a time
# Need only logits and classes.
BY_CLASSES = ("el2n", "margin", "aum", "forgetting", "vog", "prototypes", "chance", "dq")
GRADIENT_SCORES = ("grand", "grand-last", "vog", "less")
ScoreFunction = Callable[[pl.LightningModule, Any], Tensor]


@contextmanager
def errors_of(display_name: str) -> Iterator[None]:
    """Prefix errors of a score function with the display name of the callback."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{display_name}: {error}") from None


def scores_of(score_fn: ScoreFunction, look: Look) -> Mapping[str, Tensor]:
    """Return the scores that the user's ``score_fn`` computes, after a check of their type and shape."""
    found = score_fn(look.pl_module, look.batch)
    requirement = (
        f"{look.asked.display_name}: score_fn must return one score for each of the {len(look.indices)} samples of a "
        f"batch, ({len(look.indices)},); got"
    )
    try:
        scores = torch.as_tensor(found)
    except (RuntimeError, TypeError, ValueError):  # not a number, or lists of different lengths
        raise ValueError(f"{requirement} {type(found).__name__}. Return a tensor of real numbers.") from None
    if scores.is_complex():
        raise ValueError(f"{requirement} {scores.dtype}. Return a tensor of real numbers.")
    if scores.shape != (len(look.indices),):
        raise ValueError(
            f"{requirement} {tuple(scores.shape)}. Flatten them, or average over all dimensions except the first."
        )
    return {"score": scores}


def _loss_alone(look: Look) -> Mapping[str, Tensor]:
    """Return the loss of a batch of one sample."""
    return {"score": alone(look).detach().reshape(1)}


def _grand_alone(look: Look) -> Mapping[str, Tensor]:
    """Return the gradient norm of the loss of a batch of one sample, and the loss."""
    with torch.enable_grad():
        loss = alone(look)
        parameters = [p for p in look.pl_module.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = torch.nn.utils.get_total_norm([gradient for gradient in found if gradient is not None])
    return {"score": norm.reshape(1), "loss": loss.detach().reshape(1)}


def alone(look: Look) -> Tensor:
    """Run the step on a batch of one sample, and return its loss."""
    output = look.run()
    if output is None:
        raise SkippedBatchError
    loss = loss_of_output(output)
    if loss is None or loss.numel() != 1:
        refuse_loss(loss, f"{look.asked.display_name} runs the step on one sample at a time. {look.asked.advice}")
    return loss


def _classes_of(call: LossCall) -> dict[str, Tensor]:
    """Return labels and predicted classes, or nothing if samples do not have one class each."""
    if call.labels is None:
        return {}
    return {"label": call.labels, "prediction": predictions(call)}


def _of_call(look: Look, score: Callable[[LossCall], Tensor]) -> dict[str, Tensor]:
    call = look.loss()
    with errors_of(look.asked.display_name):
        return {"score": score(call), **_classes_of(call)}


def _loss(look: Look) -> Mapping[str, Tensor]:
    found = look.losses()
    return {"score": found.losses, **classes_of_losses(found)}


def _grand(look: Look) -> Mapping[str, Tensor]:
    norms, found = look.gradient_norms()
    # A sample whose positions are all ignored has gradient zero: without nan it would rank as the easiest.
    return {"score": norms.masked_fill(found.losses.isnan(), float("nan")), **classes_of_losses(found)}


def classes_of_losses(found: SampleLosses) -> dict[str, Tensor]:
    """Return labels and predicted classes, or nothing if the losses are of no classification."""
    return {} if found.call is None else _classes_of(found.call)


def _grand_last(look: Look) -> Mapping[str, Tensor]:
    features, call, layer = look.features()
    with errors_of(look.asked.display_name):
        norms = last_layer_gradient_norm(call, features, bias=layer.bias is not None)
    return {"score": norms, **_classes_of(call)}


def _embedding(look: Look) -> Mapping[str, Tensor]:
    features, call, _ = look.features()
    pooled = features.reshape(call.samples, -1, features.shape[-1]).mean(1)
    return {"embedding": pooled, **_classes_of(call)}


def gradient_by_input(look: Look) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the gradient of each sample's true logit (or ``loss_fn``) with respect to its input, and the classes."""
    inputs = _inputs_of(look.batch, len(look.indices), look.asked.display_name)
    inputs.requires_grad_(True)
    try:
        if look.asked.loss_fn is not None:
            with torch.enable_grad():
                (gradients,) = torch.autograd.grad(look.losses(keep_graph=True).losses.sum(), inputs)
            return gradients, {}
        call = look.loss(keep_graph=True)
        if call.labels is None or call.name != "cross_entropy" or call.output is None:
            raise ValueError(
                f"{look.asked.display_name}(score='vog') needs cross_entropy with one class per sample; got "
                f"{call.name} with targets {tuple(call.target.shape)} of {call.target.dtype}. Use another score, or "
                "set score_fn to a function that takes the module and a batch and returns the scores."
            )
        is_valid = call.valid.reshape(call.samples)
        with torch.enable_grad():
            true = call.output.gather(1, call.labels.where(is_valid, 0).unsqueeze(1)).sum()
        (gradients,) = torch.autograd.grad(true, inputs)
        gradients[~is_valid] = float("nan")
        return gradients, _classes_of(call)
    finally:
        inputs.requires_grad_(False)


def _inputs_of(batch: Any, samples: int, display_name: str) -> Tensor:
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1 and len(leaf) == samples:
            return leaf
    raise ValueError(
        f"{display_name}(score='vog') needs the gradient of the input, but the batch has no floating-point tensor "
        "with one row per sample. Use another score, or set score_fn to a function that takes the module and a batch "
        "and returns the scores."
    )


MEASURES: Mapping[str, Measure] = {
    "el2n": lambda look: _of_call(look, el2n),
    "loss": _loss,
    "margin": lambda look: _of_call(look, lambda call: -margin(call)),
    "grand": _grand,
    "grand-last": _grand_last,
    "prototypes": _embedding,
    "dq": _embedding,
    "chance": lambda look: _of_call(look, lambda call: torch.zeros_like(call.losses)),
}
MEASURES_ALONE: Mapping[str, Measure] = {"loss": _loss_alone, "grand": _grand_alone}
