r"""Scores of samples from the loss call of their batch: how difficult, how well learned, how suspicious they are.

Each function takes a :class:`~lightning_grad.functional.LossCall` and returns one score per sample, (B,), on the
device, detached, computed in float32 or float64. A sample with several positions (tokens, pixels) gets the mean over
its valid positions, and nan if it has none.
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
        f"{score} needs {needs}; got {call.name} with {shapes}. Choose another score, or pass `score_fn=`, a function "
        "that returns one score per sample."
    )


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _class_scores(call: LossCall) -> Tensor:
    """Return the logits or log-probabilities with the class dimension last: (B, ..., C)."""
    scores = _wide(call.input)
    if call.name == "linear_cross_entropy":
        weight, bias = _wide(call.options["linear_weight"]), call.options["linear_bias"]
        shape = weight.shape[:-1]
        flat = F.linear(scores, weight.flatten(0, -2), None if bias is None else _wide(bias).flatten())
        scores = flat.reshape(*scores.shape[:-1], *shape)
    return scores if scores.dim() == 1 else scores.movedim(1, -1)


def _classes(call: LossCall) -> Tensor:
    """Return the class of every position; ignored positions get class 0."""
    return call.target.long().masked_fill(~call.valid, 0)


def _mean_over_positions(call: LossCall, values: Tensor) -> Tensor:
    valid = call.rows(call.valid)
    return call.rows(values).where(valid, 0.0).sum(1) / valid.sum(1)


@torch.no_grad()
def el2n(call: LossCall) -> Tensor:
    r"""Return the norm of each sample's prediction error; for a classifier, EL2N.

    .. math::
        \operatorname{EL2N}_i = \lVert p(x_i) - y_i \rVert_2

    where p are the probabilities and y is the one-hot target. The error depends on the loss:

    - ``cross_entropy``, ``linear_cross_entropy``, ``nll_loss``: softmax of the logits, or exp of the log-probabilities
      (assumed normalized), minus the one-hot class. Label smoothing and class weights are ignored. Targets that are
      probabilities are used unchanged.
    - ``binary_cross_entropy`` and ``binary_cross_entropy_with_logits``: p - t over all labels. For one label it is
      :math:`|p - t|`, which is :math:`1 / \sqrt 2` of the EL2N of the same classifier with two logits.
    - ``kl_div``: the student's probabilities minus the teacher's.
    - ``mse_loss``, ``l1_loss``, ``smooth_l1_loss``, ``huber_loss``: the residual. This is not the EL2N of the paper,
      which covers classifiers only, but its counterpart for regression.

    Losses of the first group have their classes in dimension 1, and a norm is computed at each position. For the other
    losses the norm is over all entries of a row (an index of dimension 0).

    Args:
        call: The loss call of a batch.

    Returns:
        Tensor: (B,), from 0 to :math:`\sqrt 2` for one class of several; nan if all positions are ignored.

    Raises:
        ValueError: If the loss is not one of these.

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
    # 1 - p of the true class is computed as the sum of the others, which is accurate when p is close to 1.
    others = probabilities.scatter(-1, _classes(call).unsqueeze(-1), 0.0)
    return torch.hypot(torch.linalg.vector_norm(others, dim=-1), others.sum(-1))


@torch.no_grad()
def margin(call: LossCall) -> Tensor:
    r"""Return the logit of the true class minus the largest other logit; negative for wrong predictions.

    .. math::
        m_i = z_{y_i} - \max_{c \ne y_i} z_c

    where z are the logits or the log-probabilities, which give the same value. The margin is unbounded. Unlike with the
    other scores here, a large margin means an *easy* sample. For ``binary_cross_entropy_with_logits`` with one label it
    is :math:`(2 t - 1) z`.

    Args:
        call: The loss call of a batch, with class indices as targets, or one logit per sample.

    Returns:
        Tensor: (B,), mean over valid positions; nan if there is none.

    Raises:
        ValueError: If the loss has no single true class.

    Example:
        >>> from lightning_grad.functional import LossCapture
        >>> with LossCapture() as capture:
        ...     _ = F.cross_entropy(torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]]), torch.tensor([0, 1]))
        >>> margin(capture.only())
        tensor([ 2., -2.])

    References:
        Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", 2020, arXiv 2001.10528,
        eq. 1.
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
    """Return the fraction of each sample's valid positions predicted correctly: 1 or 0 with one position.

    The prediction is the class with the largest score. If targets are probabilities, the most probable class is the
    true one. For binary cross-entropy each label is a position, predicted if its probability is above 0.5.

    Args:
        call: The loss call of a batch.

    Returns:
        Tensor: (B,), 0 to 1; nan if no position is valid.

    Raises:
        ValueError: If the loss is not a classification loss.

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
        _refuse("Correctness", call, "the loss of a classifier")
    return _mean_over_positions(call, right.to(torch.float32))


@torch.no_grad()
def predictions(call: LossCall) -> Tensor:
    """Return the predicted class of every sample.

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
    r"""Return the norm of each sample's loss gradient by the last layer, without a backward pass.

    .. math::
        \lVert \nabla_{W, b} \ell_i \rVert = \lVert p_i - y_i \rVert \sqrt{1 + \lVert h_i \rVert^2}

    for logits :math:`W h + b`: the gradient by W is the outer product of p - y and h, and the gradient by b is p - y.
    It is a cheap approximation of GraNd, the norm over all layers.

    Args:
        call: The loss call of a batch: plain cross-entropy of one class per sample.
        features: h, (B, H), the input of the last layer.
        bias: Set to False if the last layer has no bias.
            The norm is then :math:`\lVert p_i - y_i \rVert \lVert h_i \rVert`.

    Returns:
        Tensor: (B,); nan for ignored samples.

    Raises:
        ValueError: If the loss is not cross-entropy, has class weights, label smoothing or several positions per
            sample, or if features is not (B, H).

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
            f"The gradient of the last layer needs its input as ({call.samples}, H); got {tuple(features.shape)}. "
            "Pool over positions first, as the network does, or choose another score."
        )
    lengths = _wide(features).square().sum(1)
    return el2n(call) * (lengths + float(bias)).sqrt()
