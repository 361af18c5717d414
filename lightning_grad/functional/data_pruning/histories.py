r"""Scores over the history of each sample: forgetting, area under the margin, variance of gradients.

A state is a dict of tensors with one row per sample of the data set, created by one function and updated in place by
another. It can be saved in a checkpoint unchanged, and updates need no host sync; keep it on the device that computes
the scores. The indices of one call must be distinct. Scores of a single batch are in ``scores.py``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def vog_state(n: int, shape: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    r"""Return the initial state of the variance of gradients.

    Args:
        n: Number of samples in the data set.
        shape: Shape of one input, such as (3, 32, 32). The state has two tensors of shape (n, \*shape).
        device: Device of the gradients.

    Returns:
        dict: ``count`` (n,), ``mean`` and ``m2`` (n, \*shape), float32.
    """
    moments = {key: torch.zeros(n, *shape, device=device) for key in ("mean", "m2")}
    return {"count": torch.zeros(n, device=device), **moments}


@torch.no_grad()
def update_vog_(state: dict[str, Tensor], indices: Tensor, gradients: Tensor) -> None:
    r"""Add the gradients of a batch at one checkpoint to the state.

    Welford's update keeps the precision of a small variance: with :math:`\delta = g - \mu`,
    :math:`\mu \leftarrow \mu + \delta / k` and :math:`M \leftarrow M + \delta (g - \mu)`.

    Args:
        state: From :func:`vog_state`; changed in place.
        indices: (B,): distinct indices of the samples in the data set.
        gradients: g, (B, \*shape): gradients of the true class's logit (before softmax) with respect to the input.
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

    where :math:`S_k` is the gradient at checkpoint k and p runs over all P entries of the input. Both standard
    deviations are population ones (without Bessel's correction), as in the released code.

    Args:
        state: From :func:`vog_state`.
        labels: (n,): class of every sample, to return :math:`\hat v_i`; ``None`` returns :math:`v_i`.

    Returns:
        Tensor: (n,); nan for samples never seen and, with labels, for classes of a single sample.

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
    r"""Standardize scores within each class: subtract its mean, divide by its standard deviation.

    Args:
        values: (n,), nan where unknown.
        labels: (n,): the class of every sample.

    Returns:
        Tensor: (n,); nan where the value is nan, and for classes of a single sample.

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
    """Return the initial state of forgetting events.

    Args:
        n: Number of samples in the data set.
        device: Device of the predictions.

    Returns:
        dict: ``events`` (n,) int64, the number of forgetting events; ``correct`` (n,) bool, whether the last prediction
        was correct; ``learned`` and ``seen`` (n,) bool, whether a sample was ever predicted correctly or seen.
    """
    flags = {key: torch.zeros(n, dtype=torch.bool, device=device) for key in ("correct", "learned", "seen")}
    return {"events": torch.zeros(n, dtype=torch.int64, device=device), **flags}


@torch.no_grad()
def update_forgetting_(state: dict[str, Tensor], indices: Tensor, correct: Tensor) -> None:
    """Update the state with the predictions for a batch, made before the step that trains on it.

    Args:
        state: From :func:`forgetting_state`; changed in place.
        indices: (B,): distinct indices of the samples in the data set.
        correct: (B,), bool, or a fraction from :func:`is_correct`, correct above 0.5; nan is ignored.
    """
    indices, correct = indices.to(state["correct"].device), correct.to(state["correct"].device)
    known, before = ~correct.isnan(), state["correct"][indices]
    now = torch.where(known, correct > 0.5, before)
    state["events"].index_add_(0, indices, (before & ~now).long())
    state["correct"].index_copy_(0, indices, now)
    for key, value in (("learned", now), ("seen", known)):
        state[key].index_copy_(0, indices, state[key][indices] | value)


def forgetting(state: dict[str, Tensor]) -> Tensor:
    """Return how often each sample was forgotten: predicted correctly once and wrongly the next time.

    Args:
        state: From :func:`forgetting_state`.

    Returns:
        Tensor: (n,) float32; infinite for samples never predicted correctly, nan for samples never seen.

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
    """Return the initial state of the area under the margin.

    Args:
        n: Number of samples in the data set.
        device: Device of the margins.

    Returns:
        dict: ``count`` and ``sum``, (n,) float32.
    """
    return {"count": torch.zeros(n, device=device), "sum": torch.zeros(n, device=device)}


@torch.no_grad()
def update_aum_(state: dict[str, Tensor], indices: Tensor, margins: Tensor) -> None:
    """Add the margins of a batch to the state.

    Args:
        state: From :func:`aum_state`; changed in place.
        indices: (B,): indices of the samples in the data set.
        margins: (B,), from :func:`margin`; nan is ignored.
    """
    indices, margins = indices.to(state["sum"].device), margins.to(state["sum"])
    known = ~margins.isnan()
    state["sum"].index_add_(0, indices, margins.where(known, 0.0))
    state["count"].index_add_(0, indices, known.to(margins))


def aum(state: dict[str, Tensor]) -> Tensor:
    r"""Return the area under the margin (AUM) of every sample: its mean margin over the updates.

    .. math::
        \operatorname{AUM}_i = \frac 1 T \sum_{t=1}^T m_i^{(t)}

    Low values are suspicious: for a mislabeled sample, the class that it looks like scores higher than its label.

    Args:
        state: From :func:`aum_state`.

    Returns:
        Tensor: (n,); nan for samples never seen.

    Example:
        >>> state = aum_state(2)
        >>> for value in (-1.0, 2.0):
        ...     update_aum_(state, torch.tensor([1]), torch.tensor([value]))
        >>> aum(state)
        tensor([   nan, 0.5000])

    References:
        Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", 2020, arXiv 2001.10528,
        eq. 1.
    """
    return state["sum"] / state["count"]
