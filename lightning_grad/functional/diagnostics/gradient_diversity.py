r"""How much the gradients of single samples differ: the Vendi score of their directions, and the agreement of their signs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_grad.functional.gradients.gradient_rows import PerSampleGradients


@torch.no_grad()
def vendi_score(gradients: Tensor) -> tuple[float, Tensor]:
    r"""Return the effective number of different directions among some gradients (G-Vendi).

    .. math::
        V = \exp\Bigl(-\sum_i \lambda_i \log \lambda_i\Bigr), \qquad
        \lambda = \operatorname{eig}\bigl(\hat G \hat G^T / n\bigr)

    where the rows of :math:`\hat G` are the normalized gradients. Equal gradients give 1, orthogonal ones n. Rows that are
    zero or not finite have no direction and are ignored.

    Args:
        gradients: (n, d), for example from :func:`project_gradients`.

    Returns:
        tuple: V, nan without any row that has a direction; and the cosines between all rows, (n, n), float64 on the CPU,
        nan for rows without a direction.

    Example:
        >>> vendi_score(torch.eye(4))[0], vendi_score(torch.ones(4, 2))[0]
        (4.0, 1.0)

    References:
        Jung et al., "Prismatic Synthesis: Gradient-based Data Diversification Boosts Generalization in LLM Reasoning", 2025,
        arXiv 2505.20161.
        Friedman and Dieng, "The Vendi Score: A Diversity Evaluation Metric for Machine Learning", 2022, arXiv 2210.02410.
    """
    gradients = gradients.cpu().double()  # they are few and short, and Apple's GPU has no float64
    norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
    has_direction = ((norms > 0) & norms.isfinite()).squeeze(1)
    rows = torch.where(has_direction[:, None], gradients / norms, torch.nan)
    cosines = rows @ rows.mT
    known = cosines[has_direction][:, has_direction]
    if not len(known):
        return float("nan"), cosines
    values = torch.linalg.eigvalsh(known / len(known)).clamp(min=0)
    return round(float(torch.exp(-torch.special.xlogy(values, values).sum())), 9), cosines


def gradsign_score(module: nn.Module, compute_losses: Callable[[], Tensor]) -> float:
    r"""Return how much the signs of the samples' gradients agree (GradSign); larger is better.

    .. math::
        S = \sum_k \Bigl| \sum_{i=1}^n \operatorname{sign} \frac{\partial \ell_i}{\partial \theta_k} \Bigr|

    It compares networks at their random initialization on the same batch: a larger score tends to mean a lower loss after
    training. It does not depend on the scale of the loss, but grows with the numbers of weights and samples.

    Args:
        module: The network, in eval mode if it has BatchNorm.
        compute_losses: Function that runs the module and returns the losses, (n,), with their graph.

    Example:
        >>> module = nn.Linear(2, 1, bias=False)
        >>> gradsign_score(module, lambda: module(torch.tensor([[1.0, 2.0], [3.0, -4.0]])).squeeze(1))
        2.0

    References:
        Zhang and Jia, "GradSign: Model Performance Inference with Theoretical Insights", 2021, arXiv 2110.08616.
    """
    sums: dict[str, Tensor] = {}

    def receive(name: str, start: int, rows: Tensor) -> None:
        signs = rows.sign().sum(0)
        sums[name] = sums[name] + signs if name in sums else signs

    PerSampleGradients(module).stream(compute_losses, receive)
    return float(sum(each.abs().sum(dtype=torch.float64) for each in sums.values()))
