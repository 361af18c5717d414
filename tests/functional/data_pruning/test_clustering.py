"""k-means against scikit-learn, and the distance to its centers."""

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import prototype_distance
from lightning_grad.functional.data_pruning import clustering
from lightning_grad.functional.data_pruning.clustering import kmeans


def blobs(n: int, centers: int, d: int = 2, spread: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    middles = 20 * torch.rand(centers, d, generator=generator, dtype=torch.float64)
    labels = torch.randint(centers, (n,), generator=generator)
    return middles[labels] + spread * torch.randn(n, d, generator=generator, dtype=torch.float64), labels


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("centers", "d"), [(3, 2), (8, 5), (20, 10)])
def test_inertia_is_no_worse_than_that_of_scikit_learn(centers: int, d: int, seed: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    points, _ = blobs(400, centers, d, seed=seed)
    reference = cluster.KMeans(centers, n_init=4, random_state=seed).fit(points.numpy())
    found = kmeans(points, centers, seed, starts=4)
    assert found.distances.square().sum().item() <= 1.05 * reference.inertia_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_result_is_a_fixed_point_of_lloyd(dtype: torch.dtype) -> None:
    points = blobs(300, 6, 4)[0].to(dtype) + 1e4  # far from the origin
    found = kmeans(points, 6)
    exact = torch.cdist(points.double(), found.centers.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(found.labels, exact.argmin(1))
    torch.testing.assert_close(found.distances.double(), exact.min(1).values, rtol=0, atol=5e-3)
    means = torch.stack([points[found.labels == c].double().mean(0) for c in range(6)])
    torch.testing.assert_close(found.centers.double(), means, rtol=1e-6, atol=1e-3)
    assert found.centers.dtype == found.distances.dtype == dtype


def test_well_separated_blobs_are_found() -> None:
    adjusted = pytest.importorskip("sklearn.metrics").adjusted_rand_score
    points, labels = blobs(300, 5, 8, spread=0.1)
    assert adjusted(labels.numpy(), kmeans(points, 5).labels.numpy()) == 1.0


def test_the_seed_alone_decides() -> None:
    points, _ = blobs(200, 9)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = kmeans(points, 7, seed=3)
    torch.manual_seed(1)
    second = kmeans(points, 7, seed=3)
    assert all(map(torch.equal, first, second))
    torch.manual_seed(0)
    kmeans(points, 7, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(kmeans(points, 7, seed=4).labels, first.labels)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    points, _ = blobs(101, 4, 3)
    whole = kmeans(points, 4)
    monkeypatch.setattr(clustering, "_CHUNK", 20)
    for a, b in zip(whole, kmeans(points, 4), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(prototype_distance(points, 4), prototype_distance(points, 4))


def test_empty_clusters_start_anew_at_the_farthest_point() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0], [50.0]])
    labels, distances = torch.tensor([0, 0, 0, 0]), torch.tensor([0.0, 1.0, 10.0, 50.0])
    centers = clustering._means(points, labels, distances, 3)
    assert centers.tolist() == [[15.25], [50.0], [10.0]]


def test_as_many_clusters_as_points() -> None:
    points, _ = blobs(12, 3)
    found = kmeans(points, 12)
    assert sorted(found.labels.tolist()) == list(range(12))
    assert found.distances.max() < 1e-9


def test_fewer_distinct_points_than_clusters() -> None:
    points = torch.tensor([[0.0, 1.0]] * 5 + [[3.0, 1.0]] * 5)
    found = kmeans(points, 4)
    assert found.distances.max() == 0
    assert len(found.labels.unique()) == 2
    assert found.centers.isfinite().all()


def test_no_iterations_are_the_start() -> None:
    points, _ = blobs(50, 3)
    start = kmeans(points, 3, iterations=0)
    assert all(any(torch.allclose(center, point) for point in points) for center in start.centers)
    assert kmeans(points, 3).distances.square().sum() < start.distances.square().sum()


def test_of_several_starts_the_best_is_taken() -> None:
    points, _ = blobs(400, 20, 10, seed=2)
    inertia = [float(kmeans(points, 20, seed=2, starts=starts).distances.square().sum()) for starts in (1, 2, 4, 8)]
    assert inertia == sorted(inertia, reverse=True)
    assert inertia[-1] < 0.9 * inertia[0]


@pytest.mark.parametrize(
    ("points", "clusters", "message"),
    [
        (torch.zeros(5), 2, "must have the shape"),
        (torch.zeros(5, 2), 6, "between 1 and the number of points, 5; got 6"),
        (torch.zeros(5, 2), 0, "between 1"),
        (torch.full((5, 2), torch.nan), 2, "finite"),
    ],
)
def test_what_cannot_be_clustered_raises(points: Tensor, clusters: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans(points, clusters)


def test_no_start_raises() -> None:
    with pytest.raises(ValueError, match="starts"):
        kmeans(torch.zeros(5, 2), 2, starts=0)


def test_prototype_distance_is_that_to_the_nearest_center() -> None:
    points, _ = blobs(120, 5, 6)
    centers = kmeans(points, 5, seed=2).centers
    torch.testing.assert_close(prototype_distance(points, 5, 2, cosine=False), torch.cdist(points, centers).amin(1))
    cosines = torch.nn.functional.cosine_similarity(points.unsqueeze(1), centers.unsqueeze(0), dim=2)
    torch.testing.assert_close(prototype_distance(points, 5, 2), 1 - cosines.amax(1))


def test_an_outlier_is_the_hardest() -> None:
    points, _ = blobs(100, 4, 8, spread=0.1)
    points[17] += 3.0 * torch.tensor([1, -1] * 4)  # far for its blob, and too near for one of its own
    assert prototype_distance(points, 4).argmax() == 17
    assert prototype_distance(points.half(), 4).dtype == torch.float32
