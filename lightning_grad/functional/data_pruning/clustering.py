"""k-means, and a score: the distance of a sample to the nearest center."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1 << 22  # entries in a block of the distance matrix, 16 MB in float32


class KMeans(NamedTuple):
    """The result of :func:`kmeans`.

    Attributes:
        labels: (n,) int64: the cluster of each point.
        centers: (k, d): the mean of each cluster.
        distances: (n,): the distance of each point to the center of its cluster.
    """

    labels: Tensor
    centers: Tensor
    distances: Tensor


def _blocks(points: Tensor, columns: int) -> Iterator[Tensor]:
    yield from points.split(max(1, _CHUNK // max(columns, 1)))  # type: ignore[no-untyped-call]


def _nearest(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest center of each point, and the distance to it, computed without cancellation."""
    labels = torch.cat([torch.cdist(block, centers).argmin(1) for block in _blocks(points, len(centers))])
    width = points.shape[1]
    pairs = zip(_blocks(points, width), _blocks(labels, width), strict=True)
    return labels, torch.cat([(block - centers[own]).norm(dim=1) for block, own in pairs])


def _squares(points: Tensor, centers: Tensor) -> Tensor:
    """Return the squared distances, (n, centers)."""
    width = points.shape[1] + len(centers)
    return torch.cat([torch.cdist(block, centers).square() for block in _blocks(points, width)])


def _first_centers(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Choose initial centers by greedy k-means++: draw a few candidates by squared distance and keep the best."""
    candidates = 2 + int(math.log(clusters))
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    nearest = _squares(points, points[chosen]).squeeze(1)
    for _ in range(1, clusters):
        cumulative = nearest.double().cumsum(0)
        draws = torch.rand(candidates, generator=generator, dtype=torch.float64).to(points.device)
        drawn = torch.searchsorted(cumulative, draws * cumulative[-1], right=True).clamp(max=len(points) - 1)
        closer = torch.minimum(nearest.unsqueeze(1), _squares(points, points[drawn]))
        best = int(closer.sum(0).argmin())
        chosen.append(int(drawn[best]))
        nearest = closer[:, best]
    return points[chosen].clone()


def _means(points: Tensor, labels: Tensor, distances: Tensor, clusters: int) -> Tensor:
    """Return the mean of each cluster; an empty cluster moves to the point farthest from its center."""
    sums = points.new_zeros(clusters, points.shape[1]).index_add_(0, labels, points)
    sizes = torch.bincount(labels, minlength=clusters)
    empty = (sizes == 0).nonzero().flatten()
    centers = sums / sizes.clamp(min=1).unsqueeze(1)
    centers[empty] = points[distances.topk(len(empty)).indices]
    return centers


def _lloyd(points: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> KMeans:
    centers = _first_centers(points, clusters, generator)
    labels, distances = _nearest(points, centers)
    for _ in range(iterations):
        centers = _means(points, labels, distances, clusters)
        before = labels
        labels, distances = _nearest(points, centers)
        if torch.equal(labels, before):
            break
    return KMeans(labels, centers, distances)


@torch.no_grad()
def kmeans(points: Tensor, clusters: int, seed: int = 0, iterations: int = 100, starts: int = 4) -> KMeans:
    r"""Cluster points with Lloyd's algorithm, initialized by k-means++.

    .. math::
        \min_{c_1, \ldots, c_k} \sum_i \min_j \lVert x_i - c_j \rVert^2

    A cluster that becomes empty moves to the point farthest from its center. With fewer than k distinct points, some
    clusters stay empty.

    Args:
        points: x, (n, d), finite; half precision is computed in float32.
        clusters: k, at most n.
        seed: Seed of the initialization; equal seeds give equal clusters (on a GPU, up to rounding).
        iterations: Maximum number of iterations; stops early when no point changes its cluster.
        starts: Number of initializations; the best result is returned. The cost is proportional.

    Returns:
        KMeans: Labels, centers and distances, on the device of the points.

    Raises:
        ValueError: If the points are not finite or not (n, d), k is outside [1, n], or starts is below 1.

    Example:
        >>> found = kmeans(torch.tensor([[0.0], [1.0], [9.0], [11.0]]), clusters=2)
        >>> found.centers.sort(0).values, found.distances
        (tensor([[ 0.5000],
                [10.0000]]), tensor([0.5000, 0.5000, 1.0000, 1.0000]))

    References:
        Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", 2007; greedy as in scikit-learn.
    """
    if points.ndim != 2:
        raise ValueError(f"points must have the shape (n, d); got {tuple(points.shape)}.")
    if not 1 <= clusters <= len(points):
        raise ValueError(f"clusters must be between 1 and the number of points, {len(points)}; got {clusters}.")
    if starts < 1:
        raise ValueError(f"starts must be at least 1; got {starts}.")
    if not points.isfinite().all():
        raise ValueError("points must be finite; they contain nan or inf.")
    points = points.detach() if points.dtype == torch.float64 else points.detach().float()
    # Center the points: near the origin, distances computed by matrix products lose the least precision.
    middle = points.mean(0)
    points = points - middle
    generator = torch.Generator().manual_seed(seed)
    found = [_lloyd(points, clusters, iterations, generator) for _ in range(starts)]
    best = min(found, key=lambda result: float(result.distances.square().sum()))
    return best._replace(centers=best.centers + middle)


@torch.no_grad()
def prototype_distance(embeddings: Tensor, clusters: int, seed: int = 0, cosine: bool = True) -> Tensor:
    r"""Return the distance of each sample to the nearest prototype, a score that needs no labels.

    .. math::
        s_i = \min_j \Bigl(1 - \frac{x_i \cdot c_j}{\lVert x_i \rVert \lVert c_j \rVert}\Bigr)

    Prototypes :math:`c_j` are the centers of k-means. Far samples are hard.

    Args:
        embeddings: x, (n, d), from any model, for example a self-supervised one.
        clusters: k; the paper uses the number of classes, and finds that it matters little.
        seed: Seed of k-means.
        cosine: Use the cosine distance, like the paper; False uses the Euclidean distance.

    Returns:
        Tensor: s, (n,).

    Raises:
        ValueError: As in :func:`kmeans`.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> prototype_distance(x, 2, cosine=False)
        tensor([0.5000, 0.5000, 1.0000, 1.0000])

    References:
        Sorscher et al., "Beyond neural scaling laws: beating power law scaling via data pruning", 2022, arXiv
        2206.14486.
    """
    found = kmeans(embeddings, clusters, seed)
    if not cosine:
        return found.distances
    directions = F.normalize(found.centers, dim=1)
    blocks = _blocks(embeddings.detach().to(found.centers.dtype), clusters)
    return torch.cat([1.0 - (F.normalize(block, dim=1) @ directions.T).amax(1) for block in blocks])
