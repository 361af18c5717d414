"""Dataset Quantization: split samples into bins that each represent the whole, and keep the same share of every bin."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.functional.shuffling import shuffled

_BLOCK = 5_000  # samples that are compared with each other: their similarities take 100 MB
_TIE = 1e-5  # the last two samples of a set have equal gains, up to rounding


def dataset_quantization(
    features: Tensor, bins: int = 10, labels: Tensor | None = None, seed: int = 0, block: int = _BLOCK
) -> Tensor:
    r"""Return the place of every sample in the order in which Dataset Quantization puts samples into bins.

    .. math::
        i_k = \operatorname*{argmax}_{i \in D \setminus S} \;
              \sum_{j \in D \setminus S} s_{ij} - \sum_{j \in S} s_{ij}, \qquad
        s_{ij} = \frac{f_i^\top f_j}{\lVert f_i \rVert \lVert f_j \rVert}

    A bin S takes one sample after another: the one that is most similar to the samples of D outside S and least similar
    to those in S (the gain of the submodular function GraphCut). Of equal gains, within 1e-5, the first is taken. When
    the bin is full, its samples leave D, and the next bin begins. The first bins hold typical and diverse samples of the
    whole set, the last ones what is left. With place k of n, the bin is :math:`\lfloor b (k + 1/2) / n \rfloor`; bins
    differ by at most one sample.

    Every sample is compared with all others, so time and memory are quadratic. Sets of more than ``block`` samples, or
    classes if there are labels, are split at random into blocks of nearly equal size, which fill the same bins; time is
    then linear in n, and memory bounded.

    Args:
        features: f, (n, H); samples with an entry that is nan or inf belong to no bin.
        bins: b, the number of bins; 10 in the released code.
        labels: (n,) int64: if given, each class is split into bins of its own, as in the released code.
        seed: Seed of the blocks.
        block: Largest number of samples that are compared with each other.

    Returns:
        Tensor: (n,) float64 on the CPU: :math:`(k + 1/2) / n` of the sample within its block, above 0 and below 1; nan
        without a bin.

    Raises:
        ValueError: If features is not a matrix, labels do not fit, or bins or block is below 1.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]])
        >>> dataset_quantization(features, bins=2)
        tensor([0.6250, 0.3750, 0.1250, 0.8750], dtype=torch.float64)

    References:
        Zhou et al., "Dataset Quantization", ICCV 2023, arXiv 2308.10524, section 3.2. The released code compares
        gradients of the last layer; the paper, and this function, compares features.
    """
    _check(features, bins, labels, block)
    features = features.detach().cpu()
    features = features if features.dtype == torch.float64 else features.float()
    known = features.isfinite().all(1)
    places = torch.full((len(features),), math.nan, dtype=torch.float64)
    order = shuffled(len(features), seed, "blocks of dataset quantization")
    classes = torch.zeros(len(features)) if labels is None else labels.detach().cpu()
    for own in sorted({*classes.tolist()}):
        group = order[(classes[order] == own) & known[order]]
        for part in group.tensor_split(max(1, -(-len(group) // block))):
            # In the order of the data, so ties do not depend on the seed unless there are several blocks.
            part = part.sort().values
            filled = part[graphcut_order(features[part], bins)]
            places[filled] = (torch.arange(len(part), dtype=torch.float64) + 0.5) / max(len(part), 1)
    return places


def graphcut_order(features: Tensor, bins: int) -> Tensor:
    """Return the indices of samples in the order in which they are put into bins; see :func:`dataset_quantization`.

    Args:
        features: (n, H), finite.
        bins: Number of bins.

    Returns:
        Tensor: (n,) int64.
    """
    unit = F.normalize(features, dim=1)
    similarity = unit @ unit.T
    own, total = similarity.diagonal().double(), len(features)
    left, order = torch.ones(total, dtype=torch.bool), list[int]()
    for number in range(bins):
        # The gain is counted in float64, because it adds up many similarities.
        gain = unit.double() @ unit[left].sum(0, dtype=torch.float64) - own
        gain[~left] = -math.inf
        for _ in range(_end(number, total, bins) - len(order)):
            best = int((gain >= gain.max() - _TIE).to(torch.uint8).argmax())  # the first of them
            order.append(best)
            gain -= 2.0 * similarity[best]
            gain[best] = -math.inf
        left[order] = False
    return torch.tensor(order, dtype=torch.int64)


def bins_of(places: Tensor, bins: int) -> Tensor:
    """Return the bin of each place that :func:`dataset_quantization` returned, (n,) int64; nan is bin 0."""
    return (places.nan_to_num(0.0) * bins + 1e-9).floor().clamp(0, bins - 1).long()


def _end(number: int, total: int, bins: int) -> int:
    """Return how many of the samples are in the bins up to this one: all k with (k + 1/2) / total * bins below its end."""
    return -((bins - 2 * total * (number + 1)) // (2 * bins))


def _check(features: Tensor, bins: int, labels: Tensor | None, block: int) -> None:
    if features.ndim != 2:
        raise ValueError(f"features must have one row for each sample, (n, H); got shape {tuple(features.shape)}.")
    if labels is not None and labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels must have one entry for each of the {len(features)} samples; got shape {tuple(labels.shape)}."
        )
    for name, value in (("bins", bins), ("block", block)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
