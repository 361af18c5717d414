r"""How hard, how well learned or how suspicious a sample is, from the loss call of its batch or from its history.

It reads a :class:`~lightning_grad.functional.LossCall` and returns one number a sample, (B,), on
the device, detached, computed in float32 at least. A sample with several positions (tokens, pixels) gets the mean over those
that are valid, and nan when there is none.
"""

import math
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.functional.gradients.loss_functions import LossCall, split

_RESIDUALS = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
_SOFTMAXED = ("cross_entropy", "linear_cross_entropy")


def _refuse(score: str, call: LossCall, needs: str) -> NoReturn:
    shapes = f"input {tuple(call.input.shape)} and target {tuple(call.target.shape)} of {call.target.dtype}"
    raise ValueError(
        f"{score} needs {needs}, got {call.name} with {shapes}. Choose another score, or give `score_fn=`, a function that "
        "returns one score per sample."
    )


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _class_scores(call: LossCall) -> Tensor:
    """Return logits, log-probabilities or scores with the classes last: (B, ..., C)."""
    scores = _wide(call.input)
    if call.name == "linear_cross_entropy":
        weight, bias = _wide(call.options["linear_weight"]), call.options["linear_bias"]
        shape = weight.shape[:-1]
        flat = F.linear(scores, weight.flatten(0, -2), None if bias is None else _wide(bias).flatten())
        scores = flat.reshape(*scores.shape[:-1], *shape)
    return scores if scores.dim() == 1 else scores.movedim(1, -1)


def _classes(call: LossCall) -> Tensor:
    """Return the class of every position, and class 0 where it is ignored."""
    return call.target.long().masked_fill(~call.valid, 0)


def _mean_over_positions(call: LossCall, values: Tensor) -> Tensor:
    valid = call.rows(call.valid)
    return call.rows(values).where(valid, 0.0).sum(1) / valid.sum(1)


@torch.no_grad()
def el2n(call: LossCall) -> Tensor:
    r"""Return the norm of the error of each sample's prediction; for a classifier, EL2N.

    .. math::
        \operatorname{EL2N}_i = \lVert p(x_i) - y_i \rVert_2

    where p are the probabilities and y is the one-hot target. By loss:

    - ``cross_entropy``, ``linear_cross_entropy``, ``nll_loss``: softmax of the logits, or exp of the log-probabilities (taken
      to sum to one), less the one-hot class: the hard label, also when the loss smooths it, and without class weights.
      Targets that are probabilities are taken as they are.
    - ``binary_cross_entropy``, also ``_with_logits``: p - t over all labels. For one label it is :math:`|p - t|`, which is
      :math:`1 / \sqrt 2` of the EL2N of the same classifier with two logits.
    - ``kl_div``: the student's probabilities less the teacher's.
    - ``mse_loss``, ``l1_loss``, ``smooth_l1_loss``, ``huber_loss``: the norm of the residual. That is not the paper's EL2N,
      which is about classifiers, but what takes its place in regression.

    The first group has its classes in dimension 1, and a norm at each position. In the others the norm is over all entries
    of a row (an index of dimension 0).

    Args:
        call: The loss call of a batch.

    Returns:
        Tensor: (B,), from 0 to :math:`\sqrt 2` for one class of several; nan where all positions are ignored.

    Raises:
        ValueError: If the loss is another one.

    Example:
        >>> from lightning_grad.functional import LossCapture
        >>> with LossCapture() as capture:
        ...     _ = F.cross_entropy(torch.tensor([[0.0, 0.0], [8.0, 0.0]]), torch.tensor([0, 1]))
        >>> el2n(capture.only())
        tensor([0.7071, 1.4137])

    References:
        Paul et al., "Deep Learning on a Data Diet", 2021, arXiv 2107.07075, definition 2.3.
    """
    if call.name in (*_SOFTMAXED, "nll_loss"):
        return _mean_over_positions(call, _class_errors(call))
    predicted, wanted = _wide(call.input), _wide(call.target)
    if call.name == "binary_cross_entropy_with_logits":
        predicted = predicted.sigmoid()
    elif call.name == "kl_div":
        predicted, wanted = predicted.exp(), wanted.exp() if call.options["log_target"] else wanted
    elif call.name not in (*_RESIDUALS, "binary_cross_entropy"):
        _refuse("EL2N", call, "a loss that compares a prediction with a target")
    error = predicted - wanted
    rows = split(error, len(error) if error.dim() else 1)
    return call.rows(torch.linalg.vector_norm(rows, dim=1)).mean(1)


def _class_errors(call: LossCall) -> Tensor:
    scores = _class_scores(call)
    probabilities = scores.softmax(-1) if call.name in _SOFTMAXED else scores.exp()
    if not call.has_class_indices:
        target = _wide(call.target)
        errors = probabilities - (target if target.dim() == 1 else target.movedim(1, -1))
        norms: Tensor = torch.linalg.vector_norm(errors, dim=-1)
        return norms
    # 1 - p of the class is the sum of the others, which keeps its digits when p is next to 1.
    others = probabilities.scatter(-1, _classes(call).unsqueeze(-1), 0.0)
    return torch.hypot(torch.linalg.vector_norm(others, dim=-1), others.sum(-1))


@torch.no_grad()
def margin(call: LossCall) -> Tensor:
    r"""Return by how much the score of the true class is ahead of the best other: negative where the prediction is wrong.

    .. math::
        m_i = z_{y_i} - \max_{c \ne y_i} z_c

    where z are the logits (from log-probabilities it is the same number), so that it has no bounds. A large margin is an
    *easy* sample, unlike the other scores here. For ``binary_cross_entropy_with_logits`` with one label it is
    :math:`(2 t - 1) z`.

    Args:
        call: The loss call of a batch, with classes as targets, or logits (B,) or (B, 1).

    Returns:
        Tensor: (B,), mean over valid positions; nan where there is none.

    Raises:
        ValueError: If the loss has no single true class.

    Example:
        >>> from lightning_grad.functional import LossCapture
        >>> with LossCapture() as capture:
        ...     _ = F.cross_entropy(torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]]), torch.tensor([0, 1]))
        >>> margin(capture.only())
        tensor([ 2., -2.])

    References:
        Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", 2020, arXiv 2001.10528, eq. 1.
    """
    if call.name == "binary_cross_entropy_with_logits" and call.input.numel() == call.samples:
        return ((2 * _wide(call.target) - 1) * _wide(call.input)).reshape(call.samples)
    if not call.has_class_indices:
        _refuse("The margin", call, "the index of one class as target, or one logit per sample")
    scores, classes = _class_scores(call), _classes(call).unsqueeze(-1)
    true = scores.gather(-1, classes).squeeze(-1)
    return _mean_over_positions(call, true - scores.scatter(-1, classes, -math.inf).amax(-1))


@torch.no_grad()
def is_correct(call: LossCall) -> Tensor:
    """Return the share of each sample's valid positions that are predicted right: 1 or 0 in plain classification.

    The prediction is the class with the largest score; targets that are probabilities stand for their largest. For binary
    cross-entropy each label is a position, predicted when its probability is above 0.5.

    Args:
        call: The loss call of a batch.

    Returns:
        Tensor: (B,), 0 to 1; nan where no position is valid.

    Raises:
        ValueError: If the loss is not one of a classifier.

    Example:
        >>> from lightning_grad.functional import LossCapture
        >>> with LossCapture() as capture:
        ...     _ = F.cross_entropy(torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 1]))
        >>> is_correct(capture.only())
        tensor([1., 0.])
    """
    if call.name.startswith("binary_cross_entropy"):
        right = (call.input > (0.0 if call.name.endswith("logits") else 0.5)) == (call.target > 0.5)
    elif call.has_class_indices:
        right = _class_scores(call).argmax(-1) == _classes(call)
    elif call.name in _SOFTMAXED:
        target = call.target if call.target.dim() == 1 else call.target.movedim(1, -1)
        right = _class_scores(call).argmax(-1) == target.argmax(-1)
    else:
        _refuse("Being correct", call, "a loss of a classifier")
    return _mean_over_positions(call, right.to(torch.float32))


@torch.no_grad()
def predictions(call: LossCall) -> Tensor:
    """Return the class that is predicted for every sample.

    Args:
        call: The loss call of a batch, with one class per sample as target.

    Returns:
        Tensor: (B,), int64.

    Raises:
        ValueError: If the samples do not have exactly one class each.
    """
    if call.labels is None:
        _refuse("A prediction", call, "exactly one class per sample")
    return _class_scores(call).argmax(-1).reshape(call.samples)


@torch.no_grad()
def last_layer_gradient_norm(call: LossCall, features: Tensor, bias: bool = True) -> Tensor:
    r"""Return the norm of the gradient of each sample's loss by the last layer alone, without a backward pass.

    .. math::
        \lVert \nabla_{W, b} \ell_i \rVert = \lVert p_i - y_i \rVert \sqrt{1 + \lVert h_i \rVert^2}

    for logits :math:`W h + b`, because the gradient by W is the outer product of p - y and h, and that by b is p - y. It is a
    cheap stand-in for GraNd, the norm over all layers.

    Args:
        call: The loss call of a batch: plain cross-entropy of one class per sample.
        features: h, (B, H), what the last layer got.
        bias: Whether the last layer has a bias; without one it is :math:`\lVert p_i - y_i \rVert \lVert h_i \rVert`.

    Returns:
        Tensor: (B,); nan for a sample that is ignored.

    Raises:
        ValueError: If the loss is another one, weighs classes, smooths labels or has several positions per sample, or if
            the features are not (B, H).

    Example:
        >>> from lightning_grad.functional import LossCapture
        >>> with LossCapture() as capture:
        ...     _ = F.cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
        >>> last_layer_gradient_norm(capture.only(), torch.tensor([[1.0, 1.0]]))
        tensor([1.2247])

    References:
        Paul et al., "Deep Learning on a Data Diet", 2021, arXiv 2107.07075, section 2.2.
    """
    plain = call.name in _SOFTMAXED and call.options["weight"] is None and call.options["label_smoothing"] == 0.0
    if not plain or call.labels is None:
        needs = "cross_entropy of one class per sample, without class weights or label smoothing"
        _refuse("The gradient of the last layer", call, needs)
    if features.dim() != 2 or len(features) != call.samples:
        raise ValueError(
            f"The gradient of the last layer needs its input as ({call.samples}, H), got {tuple(features.shape)}. "
            "Pool over positions first, as the network does, or choose another score."
        )
    lengths = _wide(features).square().sum(1)
    return el2n(call) * (lengths + float(bias)).sqrt()
