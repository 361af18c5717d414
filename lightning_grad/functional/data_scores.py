r"""How hard, how well learned or how suspicious a sample is, from the loss call of its batch or from its history.

The first group reads a :class:`~lightning_grad.functional.loss_capture.LossCall` and returns one number a sample, (B,), on
the device, detached, computed in float32 at least. A sample with several positions (tokens, pixels) gets the mean over those
that are valid, and nan when there is none.

The second follows samples over a run. A state is a dict of tensors with one row per sample of the data set, made by one
function and changed in place by another, so that it goes into a checkpoint as it is and nothing waits for the device; keep
it where the scores are computed. An index may stand in a call only once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.functional._loss_functions import split
from lightning_grad.functional.loss_capture import LossCall

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
        >>> from lightning_grad.functional.loss_capture import LossCapture
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
        >>> from lightning_grad.functional.loss_capture import LossCapture
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
        >>> from lightning_grad.functional.loss_capture import LossCapture
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
        >>> from lightning_grad.functional.loss_capture import LossCapture
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


def vog_state(n: int, shape: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    r"""Return the state of the variance of gradients before the first checkpoint.

    Args:
        n: How many samples the data set has.
        shape: The shape of one input, such as (3, 32, 32). Two tensors of (n, \*shape) are kept.
        device: Where the gradients are.

    Returns:
        dict: ``count`` (n,), ``mean`` and ``m2`` (n, \*shape), float32.
    """
    return {
        "count": torch.zeros(n, device=device),
        "mean": torch.zeros(n, *shape, device=device),
        "m2": torch.zeros(n, *shape, device=device),
    }


@torch.no_grad()
def update_vog_(state: dict[str, Tensor], indices: Tensor, gradients: Tensor) -> None:
    r"""Take in the gradients of a batch at one checkpoint.

    Welford's update, which does not lose the digits of a small variance: with :math:`\delta = g - \mu`,
    :math:`\mu \leftarrow \mu + \delta / k` and :math:`M \leftarrow M + \delta (g - \mu)`.

    Args:
        state: From :func:`vog_state`; changed in place.
        indices: (B,), of the samples in the data set; each only once.
        gradients: g, (B, \*shape): of the logit of the true class (before softmax) by the input.
    """
    mean, m2 = state["mean"], state["m2"]
    indices, g = indices.to(mean.device), gradients.to(mean)
    state["count"].index_add_(0, indices, torch.ones_like(indices, dtype=torch.float32))
    old = mean[indices]
    new = old + (g - old) / state["count"][indices].reshape(-1, *[1] * (g.dim() - 1))
    mean.index_copy_(0, indices, new)
    m2.index_add_(0, indices, (g - old) * (g - new))


@torch.no_grad()
def vog(state: dict[str, Tensor], labels: Tensor | None = None) -> Tensor:
    r"""Return the variance of gradients (VoG) of every sample.

    .. math::
        v_i = \frac 1 P \sum_p \sqrt{\frac 1 K \sum_{k=1}^K (S_{kip} - \mu_{ip})^2}, \qquad
        \hat v_i = \frac{v_i - \operatorname{mean}_{y_j = y_i} v_j}{\operatorname{std}_{y_j = y_i} v_j}

    where :math:`S_k` is the gradient at checkpoint k and p runs over all P entries of the input. Both standard deviations are
    those of the population (division by the number, not by one less), as in the released code.

    Args:
        state: From :func:`vog_state`.
        labels: The class of every sample, (n,), to normalise by class; by default :math:`v_i` is returned.

    Returns:
        Tensor: (n,); nan for samples never seen, and normalised for a class of one.

    Example:
        >>> state = vog_state(2, (1,))
        >>> for gradient in (1.0, 3.0):
        ...     update_vog_(state, torch.tensor([0]), torch.tensor([[gradient]]))
        >>> vog(state)
        tensor([1., nan])

    References:
        Agarwal et al., "Estimating Example Difficulty Using Variance of Gradients", 2020, arXiv 2008.11600, section 2.
    """
    count = state["count"].reshape(-1, *[1] * (state["m2"].dim() - 1))
    values = (state["m2"] / count).sqrt().flatten(1).mean(1)
    return values if labels is None else normalize_by_class(values, labels)


def normalize_by_class(values: Tensor, labels: Tensor) -> Tensor:
    r"""Return scores less the mean of their class, over its standard deviation.

    Args:
        values: (n,), nan where unknown.
        labels: (n,): the class of every sample.

    Returns:
        Tensor: (n,); nan where the value is, and for a class of one.

    Example:
        >>> normalize_by_class(torch.tensor([1.0, 3.0, 10.0, 30.0]), torch.tensor([0, 0, 1, 1]))
        tensor([-1.,  1., -1.,  1.])
    """
    group = torch.unique(labels.to(values.device), return_inverse=True)[1]
    seen = ~values.isnan()

    def class_mean(x: Tensor) -> Tensor:
        sums = torch.zeros_like(values).index_add_(0, group, x.where(seen, 0.0))
        return (sums / torch.zeros_like(values).index_add_(0, group, seen.to(values)))[group]

    centred = values - class_mean(values)
    return centred / class_mean(centred.square()).sqrt()


def forgetting_state(n: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the state of the forgetting events before the first batch.

    Args:
        n: How many samples the data set has.
        device: Where the predictions are.

    Returns:
        dict: ``events`` (n,) int64, the times forgotten; ``correct`` (n,) bool, the last time; ``learned`` and ``seen`` (n,)
        bool, ever.
    """
    flags = {key: torch.zeros(n, dtype=torch.bool, device=device) for key in ("correct", "learned", "seen")}
    return {"events": torch.zeros(n, dtype=torch.int64, device=device), **flags}


@torch.no_grad()
def update_forgetting_(state: dict[str, Tensor], indices: Tensor, correct: Tensor) -> None:
    """Take in whether the samples of a batch were predicted right, before the step that learns from them.

    Args:
        state: From :func:`forgetting_state`; changed in place.
        indices: (B,), of the samples in the data set; each only once.
        correct: (B,), bool, or a share as of :func:`is_correct`: right above one half. A nan changes nothing.
    """
    indices, correct = indices.to(state["correct"].device), correct.to(state["correct"].device)
    known, before = ~correct.isnan(), state["correct"][indices]
    now = torch.where(known, correct > 0.5, before)
    state["events"].index_add_(0, indices, (before & ~now).long())
    state["correct"].index_copy_(0, indices, now)
    for key, value in (("learned", now), ("seen", known)):
        state[key].index_copy_(0, indices, state[key][indices] | value)


def forgetting(state: dict[str, Tensor]) -> Tensor:
    """Return how often every sample was forgotten: predicted right at one of its batches and wrong at the next.

    Args:
        state: From :func:`forgetting_state`.

    Returns:
        Tensor: (n,) float32; infinite where the sample was never predicted right, nan where it was never seen.

    Example:
        >>> state = forgetting_state(3)
        >>> for correct in ([1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]):
        ...     update_forgetting_(state, torch.tensor([0, 1]), torch.tensor(correct))
        >>> forgetting(state)
        tensor([2., inf, nan])

    References:
        Toneva et al., "An Empirical Study of Example Forgetting during Deep Neural Network Learning", 2019,
        arXiv 1812.05159, section 3, algorithm 1.
    """
    counts = state["events"].to(torch.float32)
    return counts.masked_fill(~state["learned"], math.inf).masked_fill(~state["seen"], math.nan)


def aum_state(n: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the state of the area under the margin before the first batch.

    Args:
        n: How many samples the data set has.
        device: Where the margins are.

    Returns:
        dict: ``count`` and ``sum``, (n,) float32.
    """
    return {"count": torch.zeros(n, device=device), "sum": torch.zeros(n, device=device)}


@torch.no_grad()
def update_aum_(state: dict[str, Tensor], indices: Tensor, margins: Tensor) -> None:
    """Take in the margins of a batch.

    Args:
        state: From :func:`aum_state`; changed in place.
        indices: (B,), of the samples in the data set.
        margins: (B,), as of :func:`margin`. A nan changes nothing.
    """
    indices, margins = indices.to(state["sum"].device), margins.to(state["sum"])
    known = ~margins.isnan()
    state["sum"].index_add_(0, indices, margins.where(known, 0.0))
    state["count"].index_add_(0, indices, known.to(margins))


def aum(state: dict[str, Tensor]) -> Tensor:
    r"""Return the area under the margin (AUM) of every sample: its mean margin over the updates.

    .. math::
        \operatorname{AUM}_i = \frac 1 T \sum_{t=1}^T m_i^{(t)}

    Low is suspicious: a sample with a wrong label stays behind the class that it looks like.

    Args:
        state: From :func:`aum_state`.

    Returns:
        Tensor: (n,); nan where the sample was never seen.

    Example:
        >>> state = aum_state(2)
        >>> for value in (-1.0, 2.0):
        ...     update_aum_(state, torch.tensor([1]), torch.tensor([value]))
        >>> aum(state)
        tensor([   nan, 0.5000])

    References:
        Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", 2020, arXiv 2001.10528, eq. 1.
    """
    return state["sum"] / state["count"]
