"""USEFUL: duplicate the samples whose features are learned late."""

import torch
from torch import Tensor

from lightning_grad.functional.data_pruning.clustering import kmeans


def _harder_half(outputs: Tensor, losses: Tensor, seed: int) -> Tensor:
    """Return a mask of the cluster with the higher mean loss, of two; all False if there is only one."""
    labels = kmeans(outputs, 2, seed).labels
    means = torch.stack([losses[labels == c].nanmean() for c in (0, 1)])
    if means.isnan().any():
        return torch.zeros_like(labels, dtype=torch.bool)
    return labels == means.argmax()


@torch.no_grad()
def uniform_learning_repeats(outputs: Tensor, losses: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
    r"""Return the samples to duplicate so that late features are learned as early as others (USEFUL).

    .. math::
        R = \bigcup_y \operatorname*{arg\,max}_{C \in \{C_{y1}, C_{y2}\}} \frac{1}{|C|} \sum_{i \in C} \ell_i

    :math:`C_{y1}, C_{y2}` are the two k-means clusters of the outputs of class y, early in training. The cluster with
    the higher mean loss contains the samples whose features are not learned yet. The paper duplicates them and retrains
    from scratch.

    Args:
        outputs: (n, c): output of the model for each sample, after a few epochs.
        losses: :math:`\ell`, (n,): loss of each sample; nan is ignored.
        labels: y, (n,) int64: the class of each sample.
        seed: Seed of k-means.

    Returns:
        Tensor: R, int64 on the CPU, in ascending order. Classes with fewer than two distinct outputs add nothing.

    Raises:
        ValueError: If the lengths differ, or an output is not finite.

    Example:
        >>> outputs = torch.tensor([[4.0, 0.0], [5.0, 0.0], [0.1, 0.0], [0.0, 3.0]])
        >>> uniform_learning_repeats(outputs, torch.tensor([0.02, 0.01, 0.64, 0.05]), torch.tensor([0, 0, 0, 1]))
        tensor([2])

    References:
        Nguyen et al., "Changing the Training Data Distribution to Reduce Simplicity Bias Improves In-distribution
        Generalization", 2024, arXiv 2404.17768.
    """
    if not len(outputs) == len(losses) == len(labels):
        raise ValueError(
            "outputs, losses and labels must have one entry for each sample; "
            f"got {len(outputs)}, {len(losses)} and {len(labels)}."
        )
    outputs, losses, labels = outputs.detach().cpu(), losses.detach().double().cpu(), labels.cpu()
    repeated = torch.zeros(len(labels), dtype=torch.bool)
    for label in set(labels.tolist()):
        own = (labels == label).nonzero().flatten()
        if len(own) > 1:
            repeated[own] = _harder_half(outputs[own], losses[own], seed)
    return repeated.nonzero().flatten()
