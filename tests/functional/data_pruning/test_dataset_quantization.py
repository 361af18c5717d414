"""The order by GraphCut against brute force, bins that cover all samples, and an even share of each."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_grad.functional import dataset_quantization, select_samples
from lightning_grad.functional.data_pruning.dataset_quantization import bins_of, graphcut_order
from tests.cases import cases


def points(n: int, seed: int = 0, width: int = 8) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cut(similarity: Tensor, chosen: list[int]) -> float:
    """Return the sum of the similarities between the chosen samples and all others."""
    inside = torch.zeros(len(similarity), dtype=torch.bool)
    inside[chosen] = True
    return float(similarity[inside][:, ~inside].sum())


def by_brute_force(features: Tensor, sizes: list[int]) -> list[int]:
    """Return the greedy order; every candidate's value is computed from the definition."""
    unit, left, order = F.normalize(features, dim=1), list(range(len(features))), list[int]()
    for size in sizes:
        similarity = unit[left] @ unit[left].T
        chosen: list[int] = []
        for _ in range(size):
            others = [i for i in range(len(left)) if i not in chosen]
            chosen.append(max(others, key=lambda i: cut(similarity, [*chosen, i])))
        order += [left[i] for i in chosen]
        left = [index for index in left if index not in order]
    return order


@cases("seed", [0, 1, 2])
@cases("bins", [1, 5, 7])
def test_the_order_is_that_of_brute_force_on_50_points(bins: int, seed: int) -> None:
    features = points(50, seed)
    found = graphcut_order(features, bins)
    sizes = bins_of(dataset_quantization(features, bins), bins).bincount(minlength=bins).tolist()
    assert found.tolist() == by_brute_force(features, sizes)
    if bins > 1:
        assert found.tolist() != graphcut_order(features, 1).tolist(), "each bin begins with the samples that are left"
    places = dataset_quantization(features, bins)
    assert places.argsort().tolist() == found.tolist()


@cases("n", [1, 2, 3, 9, 10, 25, 100, 101, 255])
@cases("bins", [1, 2, 3, 10])
def test_bins_cover_all_samples_and_have_equal_sizes(n: int, bins: int) -> None:
    places = dataset_quantization(points(n).float(), bins)
    assert sorted(places.tolist()) == pytest.approx([(k + 0.5) / n for k in range(n)])
    sizes = bins_of(places, bins).bincount(minlength=bins)
    assert sizes.max() - sizes.min() <= 1
    # Samples of one bin follow each other in the order.
    order = bins_of(places[places.argsort()], bins).tolist()
    assert order == sorted(order)


def test_classes_and_blocks_have_bins_of_their_own() -> None:
    features, labels = points(90), torch.arange(90) % 3
    whole, by_class = dataset_quantization(features), dataset_quantization(features, labels=labels)
    for own in range(3):
        assert torch.equal(by_class[labels == own], dataset_quantization(features[labels == own]))
    assert not torch.equal(whole, by_class)
    blocks = dataset_quantization(features, block=40)
    assert sorted(blocks.tolist()) == pytest.approx(sorted([(k + 0.5) / 30 for k in range(30)] * 3))
    other = dataset_quantization(features, block=40, seed=1)
    assert torch.equal(blocks, dataset_quantization(features, block=40))
    assert not torch.equal(blocks, other)
    assert torch.equal(whole, dataset_quantization(features, seed=1)), "one block needs no seed"


def test_samples_without_features_have_no_place() -> None:
    features = points(20)
    features[3, 1], features[7] = math.nan, math.inf
    places = dataset_quantization(features)
    assert places.isnan().nonzero().flatten().tolist() == [3, 7]
    rest = [i for i in range(20) if i not in (3, 7)]
    assert torch.equal(places[rest], dataset_quantization(features[rest]))
    assert {3, 7} <= set(select_samples(places, 5, rule="dq", strata=10).tolist())
    assert dataset_quantization(torch.empty(0, 4)).tolist() == []
    assert dataset_quantization(torch.zeros(4, 2)).isfinite().all(), "features of length 0 are similar to none"


def test_the_first_bin_holds_typical_samples_of_every_group() -> None:
    """Of two groups and a few strangers, the strangers come last, and no bin is of one group alone."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(210, 6, generator=generator)
    centers = torch.eye(6)[torch.tensor([0] * 100 + [1] * 100 + [5] * 10)]
    places = dataset_quantization(centers + noise)
    first = bins_of(places, 10) == 0
    assert first[:100].sum() >= 5
    assert first[100:200].sum() >= 5
    assert places[200:].mean() > 0.8


@cases("count", [0, 1, 10, 23, 57, 99, 100])
def test_the_same_share_of_every_bin_is_kept(count: int) -> None:
    places = dataset_quantization(points(100))
    kept = select_samples(places, count, rule="dq", strata=10)
    assert len(kept.unique()) == count
    shares = bins_of(places[kept], 10).bincount(minlength=10)
    assert shares.max() - shares.min() <= 1
    if 0 < count < 100:
        assert not torch.equal(kept, select_samples(places, count, rule="dq", strata=10, seed=1)), "at random"


def test_what_cannot_be_split_evenly_goes_to_any_bin() -> None:
    places = dataset_quantization(points(100))
    extra = torch.zeros(10)
    for seed in range(200):
        extra += (
            bins_of(places[select_samples(places, 13, rule="dq", strata=10, seed=seed)], 10).bincount(minlength=10) - 1
        )
    assert extra.sum() == 600
    assert extra.min() > 30, "60 each on average"


def test_classes_are_balanced() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    places = dataset_quantization(points(100), labels=labels)
    kept = select_samples(places, 50, rule="dq", strata=10, labels=labels, balance="class")
    assert labels[kept].bincount().tolist() == [30, 15, 5]
    for own in range(3):
        shares = bins_of(places[kept][labels[kept] == own], 10).bincount(minlength=10)
        assert shares.max() - shares.min() <= 1


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"features must have one row for each sample, \(n, H\); got shape \(3,\)"):
        dataset_quantization(torch.zeros(3))
    with pytest.raises(ValueError, match=r"labels must have one entry for each of the 3 samples; got shape \(2,\)"):
        dataset_quantization(torch.zeros(3, 2), labels=torch.zeros(2))
    for name in ("bins", "block"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            dataset_quantization(torch.zeros(3, 2), **{name: 0})
    for scores, arguments in ((torch.tensor([0.5, 1.4]), {}), (torch.tensor([0.5, 0.2]), {"offset": 0.1})):
        with pytest.raises(ValueError, match="needs the places that dataset_quantization returns"):
            select_samples(scores, 1, rule="dq", **arguments)
    with pytest.raises(ValueError, match="rule='dq' draws from all strata"):
        select_samples(torch.tensor([0.5, 0.2]), 1, keep="easy", rule="dq")
