"""AccelAT: cut the learning rate when the moving average of the accuracy rises too slowly.

The functions take the observed values in order; larger is better. Negate values for which smaller is better.
"""

from collections.abc import Sequence

from torch import Tensor

Observations = Sequence[float] | Tensor


def accuracy_gradient(values: Observations, window: int = 5) -> float | None:
    r"""Return the last increase of the moving average of the observations.

    .. math::
        g_t = m_t - m_{t-1} = \frac{a_t - a_{t-w}}{w}, \qquad m_t = \frac 1 w \sum_{i=t-w+1}^t a_i

    Args:
        values: :math:`a_1, \dots, a_t`, the observations so far, (t,).
        window: w, observations in the moving average, at least 1.

    Returns:
        float: :math:`g_t`, or ``None`` until there are more than w observations.

    Example:
        >>> accuracy_gradient([0.50, 0.60, 0.70, 0.75], window=2)
        0.07500000000000001
        >>> accuracy_gradient([0.50, 0.60], window=2) is None
        True

    References:
        Nikfam et al., "AccelAT: A Framework for Accelerating the Adversarial Training of Deep Neural Networks through
        Accuracy Gradient", 2022, arXiv 2210.06888.
    """
    if len(values) <= window:
        return None
    return float(values[-1] - values[-1 - window]) / window


def accuracy_gradient_cuts(
    values: Observations,
    since_cut: int,
    window: int = 5,
    cooldown: int = 5,
    threshold: float = 0.005,
    start_after: int = 0,
) -> bool:
    r"""Return True if the last observation cuts the learning rate.

    This requires all of

    .. math::
        t - 1 > w, \qquad t > t_0, \qquad c_t > q, \qquad g_t < \theta

    :math:`c_t` counts observations: it starts at q, which allows an early first cut, increases by one with each
    observation, and is set to 1 by a cut. Cuts are therefore at least q observations apart. With the defaults, a
    constant accuracy is cut at observations 7, 12 and 17.

    Args:
        values: :math:`a_1, \dots, a_t`, the observations so far, (t,).
        since_cut: :math:`c_t`, including the current observation.
        window: w, observations in the moving average, at least 1.
        cooldown: q, minimum number of observations between two cuts; 0 is the same as 1.
        threshold: :math:`\theta`, in units of the observations.
        start_after: :math:`t_0`, initial observations without a cut; they still enter the averages.

    Example:
        >>> accuracy_gradient_cuts([0.5] * 7, since_cut=7), accuracy_gradient_cuts([0.5] * 6, since_cut=6)
        (True, False)

    References:
        Nikfam et al., arXiv 2210.06888, and its released code, which has these defaults.
    """
    gradient = accuracy_gradient(values, window)
    if gradient is None or len(values) <= max(window + 1, start_after):
        return False
    return since_cut > cooldown and gradient < threshold


def accuracy_gradient_scales(
    values: Observations,
    window: int = 5,
    cooldown: int = 5,
    threshold: float = 0.005,
    factor: float = 0.8,
    floor: float = 0.0,
    start_after: int = 0,
) -> list[float]:
    r"""Replay the rule over a run and return the learning rate scale after each observation.

    .. math::
        s_0 = 1, \qquad
        s_t = \begin{cases} \max(f s_{t-1}, s_\text{min}) & \text{cut at } t \\ s_{t-1} & \text{else} \end{cases}

    Use it to try other settings on the accuracies of a finished run.

    Args:
        values: :math:`a_1, \dots, a_T`, all observations, (T,).
        window: w, observations in the moving average, at least 1.
        cooldown: q, minimum number of observations between two cuts; 0 is the same as 1.
        threshold: :math:`\theta`, in units of the observations.
        factor: f, the factor of a cut.
        floor: :math:`s_\text{min}`, the smallest scale, at most 1.
        start_after: :math:`t_0`, initial observations without a cut.

    Returns:
        list: :math:`s_1, \dots, s_T`.

    Example:
        >>> accuracy_gradient_scales([0.5] * 12, factor=0.5)
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25]

    References:
        Nikfam et al., arXiv 2210.06888.
    """
    scale, since_cut, scales = 1.0, cooldown, []
    for count in range(1, len(values) + 1):
        since_cut += 1
        if accuracy_gradient_cuts(values[:count], since_cut, window, cooldown, threshold, start_after):
            scale, since_cut = max(scale * factor, floor), 1
        scales.append(scale)
    return scales
