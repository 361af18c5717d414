"""The selectors against a sort in float64, and the time that the sampled one may take counted in passes."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_grad.functional.communication import topk_selection
from lightning_grad.functional.communication.topk_selection import (
    AUTO_BLOCKS_FROM,
    AUTO_BLOCKS_SHARE,
    AUTO_SAMPLED_FROM,
    SELECTORS,
    select_blocks,
    select_chunk,
    select_exact,
    select_largest,
    select_sampled,
)

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# The last is beyond the block that the magnitudes are taken in, by a length that is no multiple of eight.
LENGTHS = [1, 2, 7, 8, 9, 64, 1000, 4097, 30_011, 2 * topk_selection._BLOCK + 3]
KINDS = [
    "normal",
    "heavy tail",
    "mostly zero",
    "zero",
    "constant",
    "ties",
    "nan and inf",
    "all nan",
    "negative",
    "tiny",
]
TOP_K = {"exact": select_exact, "sampled": select_sampled, "blocks": select_blocks}


def draw(n: int, kind: str = "normal", dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * n + seed)
    values = torch.randn(n, generator=generator)
    uniform = torch.rand(n, generator=generator)
    if kind == "heavy tail":
        values = values / uniform.clamp(min=1e-4)
    elif kind == "mostly zero":
        values[uniform < 0.995] = 0.0
    elif kind == "zero":
        values.zero_()
    elif kind == "constant":
        values.fill_(-0.5)
    elif kind == "ties":
        values = values.mul(2).round()
    elif kind == "nan and inf":
        values[uniform < 0.01] = NAN
        values[(uniform > 0.01) & (uniform < 0.02)] = INF
        values[uniform > 0.99] = -INF
    elif kind == "all nan":
        values.fill_(NAN)
    elif kind == "negative":
        values = -values.abs() - 1.0
    elif kind == "tiny":
        values = values * torch.finfo(dtype).tiny
    return values.to(dtype)


def magnitudes(values: Tensor) -> np.ndarray:
    """Return the magnitudes in float64, NaN as inf and inf as the largest number below."""
    found = np.abs(values.detach().double().numpy())
    return np.where(np.isnan(found), np.inf, np.minimum(found, np.finfo(np.float64).max))


def reference(values: Tensor, k: int) -> np.ndarray:
    """Return the k largest magnitudes, sorted."""
    return np.sort(magnitudes(values))[len(values) - k :]


def counts(n: int) -> list[int]:
    return sorted({k for k in (1, 2, 3, math.ceil(n / 1000), math.ceil(n / 50), n // 3, n - 1, n) if 1 <= k <= n})


def assert_top_k(indices: Tensor, values: Tensor, k: int) -> None:
    assert indices.dtype == torch.int64
    assert indices.shape == (k,)
    assert len(indices.unique()) == k
    assert int(indices.min()) >= 0
    np.testing.assert_array_equal(np.sort(magnitudes(values[indices])), reference(values, k))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many entries each pass over the tensor finds."""
    notes: list[int] = []
    original = topk_selection._indices_from

    def noting(values: Tensor, threshold: Tensor) -> Tensor:
        found = original(values, threshold)
        notes.append(len(found))
        return found

    monkeypatch.setattr(topk_selection, "_indices_from", noting)
    return notes


# All selectors of the k largest.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", TOP_K)
def test_the_largest_magnitudes_are_selected(name: str, n: int, kind: str) -> None:
    values = draw(n, kind)
    for k in counts(n) if n < 100_000 else [1, 1049]:
        assert_top_k(TOP_K[name](values, k), values, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TOP_K)
def test_every_dtype_selects_the_largest(name: str, kind: str, dtype: torch.dtype) -> None:
    values = draw(20_000, kind, dtype)
    for k in (1, 20, 3000):
        assert_top_k(TOP_K[name](values, k), values, k)


@pytest.mark.parametrize("name", TOP_K)
def test_distinct_magnitudes_have_one_right_answer(name: str) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(2, 60_000, (), generator=generator))
        k = int(torch.randint(1, max(n // 10, 2), (), generator=generator))
        magnitude = torch.arange(n, dtype=torch.float64).add(1).pow(-3)[torch.randperm(n, generator=generator)]
        values = magnitude * torch.randn(n, generator=generator).sign().double()
        expected = np.argsort(-magnitude.numpy(), kind="stable")[:k]
        assert set(TOP_K[name](values, k).tolist()) == set(expected.tolist())


@pytest.mark.parametrize("view", ["every third", "column", "expanded", "reversed rows"])
@pytest.mark.parametrize("name", ["exact", "sampled", "chunk"])
def test_strided_views_are_as_good_as_their_copies(name: str, view: str) -> None:
    base = draw(90_000)
    values = {
        "every third": base[1::3],
        "column": base.view(-1, 3)[:, 1],
        "expanded": base[:1].expand(30_000),
        "reversed rows": base.view(300, 300).t().reshape(-1)[5:-2],
    }[view]
    indices, copied = (select_largest(v, 300, name) for v in (values, values.clone()))
    assert torch.equal(values[indices].abs().sort().values, values[copied].abs().sort().values)
    assert len(indices.unique()) == len(indices)


@pytest.mark.parametrize("name", ["exact", "sampled", "chunk"])
def test_the_values_stay_as_they_were_and_may_require_gradients(name: str) -> None:
    values = draw(30_000, "nan and inf").requires_grad_()
    before, version = values.detach().clone(), values._version
    indices = select_largest(values, 30, name)
    assert not indices.requires_grad
    assert values._version == version
    torch.testing.assert_close(values.detach(), before, rtol=0, atol=0, equal_nan=True)
    with torch.inference_mode():
        assert torch.equal(select_largest(values, 30, name), indices)


# The sampled selector: what it looks at.


def test_the_start_moves_the_sample_and_not_the_selection(passes: list[int]) -> None:
    values = draw(200_000)
    selected = [set(select_sampled(values, 200, start).tolist()) for start in range(20)]
    assert all(one == selected[0] for one in selected)
    assert len(set(passes)) > 10, "each start has a threshold of its own"


def test_the_same_start_selects_the_same_also_where_all_are_equal() -> None:
    for kind in ("normal", "ties", "constant", "mostly zero"):
        values = draw(200_000, kind)
        assert torch.equal(select_sampled(values, 200, 7), select_sampled(values.clone(), 200, 7))


@pytest.mark.parametrize("start", [-1, -12345, 10**12, 2**70])
def test_any_integer_is_a_start(start: int) -> None:
    values = draw(50_000)
    assert_top_k(select_sampled(values, 50, start), values, 50)


@pytest.mark.parametrize("kind", ["normal", "heavy tail"])
@pytest.mark.parametrize(("n", "k"), [(200_000, 200), (200_000, 20_000), (1_000_001, 1001)])
def test_one_pass_finds_few_more_than_asked_for(passes: list[int], n: int, k: int, kind: str) -> None:
    values = draw(n, kind)
    for start in range(30):
        select_sampled(values, k, start)
    assert len(passes) <= 32, "nearly always one pass"
    expected = max(0.01 * k, 2.0)
    likely = k * (1 + 3 / math.sqrt(expected))
    assert 0.7 * likely < np.median(passes) < 1.5 * likely + 2


def test_all_that_is_selected_reaches_the_threshold() -> None:
    values = draw(200_000, "heavy tail")
    for start in range(10):
        threshold = topk_selection._sampled_threshold(values, 500, start, 0.01)
        assert threshold is not None
        above = (values.abs() >= threshold).nonzero().flatten()
        assert len(above) >= 500
        assert set(select_sampled(values, 500, start).tolist()) <= set(above.tolist())


def stride_of(n: int, share: float) -> int:
    stride = n // math.ceil(n * share)
    return stride - (stride % 2 == 0)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.04, 0.1, 0.3])
def test_the_sample_is_every_sth_entry_from_the_start_with_odd_s(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, start = 100_000, 20_000, 1_000_003
    sizes: list[int] = []
    values, stride = torch.zeros(n), stride_of(n, share)
    values[start % stride :: stride] = 1.0
    original = torch.topk

    def noting(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(sample))
        assert bool((sample == 1.0).all())
        return original(sample, *args, **kwargs)

    monkeypatch.setattr(torch, "topk", noting)
    topk_selection._sampled_threshold(values, k, start, share)
    assert stride % 2 == 1
    assert sizes == [len(values[start % stride :: stride])]


@pytest.mark.parametrize(
    ("n", "k", "share"), [(300, 1, 0.01), (10_000, 2, 0.01), (10_000, 10, 0.5), (10_000, 10_000, 0.01)]
)
def test_where_the_sample_is_no_smaller_than_the_work_all_are_looked_at(
    passes: list[int], n: int, k: int, share: float
) -> None:
    values = draw(n)
    assert_top_k(select_sampled(values, k, share=share), values, k)
    assert passes == []


def flattered(n: int, factor: float) -> Tensor:
    """Return values of which those in the sample from 0 are too large by a factor."""
    values = draw(n, "normal").abs().add(1.0)
    values[:: stride_of(n, 0.01)] *= factor
    return values


def test_a_threshold_that_is_too_high_is_lowered(passes: list[int]) -> None:
    values = flattered(100_000, 4.0)
    assert_top_k(select_sampled(values, 3000), values, 3000)
    assert 1 < len(passes) < 8
    assert passes == sorted(passes)
    assert passes[-2] < 3000 <= passes[-1]


def test_after_ten_rounds_all_are_looked_at(passes: list[int]) -> None:
    values = flattered(100_000, 1e6)
    assert_top_k(select_sampled(values, 3000), values, 3000)
    assert len(passes) == 11


def test_a_threshold_that_is_too_low_costs_nothing_but_a_larger_top_k(passes: list[int]) -> None:
    values = flattered(100_000, 1e-6)
    values[stride_of(100_000, 0.01) * 5] = 0.5
    assert_top_k(select_sampled(values, 100), values, 100)
    assert len(passes) == 1


@pytest.mark.parametrize("kind", ["zero", "constant", "all nan"])
def test_a_tensor_without_differences_takes_one_pass(
    passes: list[int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, ranked = draw(100_000, kind), []
    monkeypatch.setattr(topk_selection, "select_blocks", lambda v, k: (ranked.append(v), select_blocks(v, k))[1])
    assert_top_k(select_sampled(values, 100), values, 100)
    assert len(passes) == 1
    assert [v is values for v in ranked] == [True], "all are looked at where they are, without a copy of those found"


def test_zeros_are_passed_over_while_others_suffice(passes: list[int]) -> None:
    """1 % of the entries is not zero, down to the smallest there are, and the sample has hardly one of them."""
    values = torch.zeros(100_000, dtype=torch.float16)
    values[1::100] = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    assert_top_k(select_sampled(values, 1000), values, 1000)
    assert passes == [1000]
    assert_top_k(select_sampled(values, 1001), values, 1001)


def test_a_few_nan_do_not_spoil_the_threshold(passes: list[int]) -> None:
    values = draw(100_000)
    values[: 3 * stride_of(100_000, 0.01)] = NAN  # three of them are in the sample
    assert_top_k(select_sampled(values, 2000), values, 2000)
    assert_top_k(select_sampled(values, 200), values, 200)
    assert max(passes) < 5000


@pytest.mark.parametrize("block", [1, 5, 8, 100, 1000])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 100, 999])
def test_the_size_of_the_blocks_makes_no_difference(n: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_selection, "_BLOCK", block)
    values = draw(n, "nan and inf")
    for threshold in (0.0, 0.5, 2.0, INF, NAN):
        expected = (~(values.abs() < threshold)).nonzero().flatten()
        assert torch.equal(topk_selection._indices_from(values, torch.tensor(threshold)), expected)
    winners = select_chunk(values, max(n // 7, 1))
    np.testing.assert_array_equal(magnitudes(values[winners]), chunk_maxima(values, max(n // 7, 1)))


# The chunks.


def chunk_maxima(values: Tensor, k: int) -> np.ndarray:
    size = math.ceil(len(values) / k)
    found = magnitudes(values)
    return np.array([found[i : i + size].max() for i in range(0, len(values), size)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000, 4097, 30_011])
def test_each_chunk_has_its_largest_selected(n: int, kind: str) -> None:
    values = draw(n, kind)
    for k in counts(n):
        indices, size = select_chunk(values, k), math.ceil(n / k)
        assert indices.dtype == torch.int64
        assert torch.equal(indices // size, torch.arange(math.ceil(n / size)))
        assert len(indices) <= k
        assert int(indices.max()) < n
        np.testing.assert_array_equal(magnitudes(values[indices]), chunk_maxima(values, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_of_every_dtype(dtype: torch.dtype) -> None:
    values = draw(20_011, "normal", dtype)
    np.testing.assert_array_equal(magnitudes(values[select_chunk(values, 20)]), chunk_maxima(values, 20))


@pytest.mark.parametrize(("n", "k"), [(10, 3), (10, 4), (17, 5), (23, 22), (12, 4), (5, 1), (6, 6)])
def test_every_entry_can_win(n: int, k: int) -> None:
    for i in range(n):
        values = torch.ones(n)
        values[i] = -2.0
        assert i in select_chunk(values, k).tolist()


def test_chunks_are_used_up_to_k_where_k_is_small() -> None:
    for n, k in ((10_000_019, 10_000), (1_000_003, 1001)):
        size = math.ceil(n / k)
        assert k - k * k // n - 1 <= len(select_chunk(torch.zeros(1).expand(n), k)) == math.ceil(n / size) <= k


# The dispatcher.


@pytest.mark.parametrize(
    ("selector", "n", "called"),
    [
        ("exact", 10, "select_exact"),
        ("sampled", 10, "select_sampled"),
        ("chunk", 10, "select_chunk"),
        ("auto", AUTO_BLOCKS_FROM - 1, "select_exact"),
        ("auto", AUTO_BLOCKS_FROM, "select_blocks"),
    ],
)
def test_the_name_decides_who_selects(selector: str, n: int, called: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert called_by(selector, n, 3, monkeypatch) == [(called, (3, 5) if called == "select_sampled" else (3,))]


@pytest.mark.parametrize("n", [AUTO_SAMPLED_FROM - 1, AUTO_SAMPLED_FROM])
def test_blocks_select_up_to_two_entries_in_a_thousand(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    most = n // AUTO_BLOCKS_SHARE
    assert called_by("auto", n, most, monkeypatch)[0][0] == "select_blocks"
    above = called_by("auto", n, most + 1, monkeypatch)[0][0]
    assert above == ("select_sampled" if n >= AUTO_SAMPLED_FROM else "select_exact")


def called_by(selector: str, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for name in ("select_exact", "select_sampled", "select_chunk", "select_blocks"):
        monkeypatch.setattr(topk_selection, name, lambda *args, name=name: calls.append((name, args[1:])))
    select_largest(torch.zeros(n), k, selector, 5)
    return calls


# The selector by blocks: how many entries it looks at again.


@pytest.mark.parametrize("kind", ["normal", "constant", "zero", "all nan"])
def test_of_few_blocks_alone_are_entries_looked_at_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass finds the largest of each block; what the second looks at depends on k only, whatever the values are."""
    looked_at: list[int] = []
    original = torch.topk

    def topk(values: Tensor, k: int, **options: Any) -> Any:
        looked_at.append(values.numel())
        return original(values, k, **options)

    monkeypatch.setattr(torch, "topk", topk)
    n, k = 100_000, 50
    select_blocks(draw(n, kind), k)
    blocks, again = looked_at
    assert blocks == n // 64
    assert again <= (k + 1) * 64


def test_the_last_entries_after_the_whole_blocks_can_win() -> None:
    for place in (0, 63, 64, 99_967, 99_968, 99_999):
        values = draw(100_000)
        values[place] = 1e3
        assert place in select_blocks(values, 1).tolist()


def test_auto_is_the_default_and_every_selector_is_known() -> None:
    values = draw(AUTO_SAMPLED_FROM, "ties")
    assert torch.equal(select_largest(values, 3000), select_sampled(values, 3000))
    assert torch.equal(select_largest(values, 1000), select_blocks(values, 1000))
    for selector in SELECTORS:
        assert len(select_largest(values, 1000, selector)) == 1000


def test_an_unknown_selector_is_named() -> None:
    with pytest.raises(ValueError, match="selector must be 'auto', 'exact', 'sampled' or 'chunk'; got 'exakt'"):
        select_largest(torch.zeros(5), 1, "exakt")


# What all refuse, and for whom the host waits.


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(
    ("shape", "k", "message"),
    [
        ((5,), 6, "k must be between 1 and the number of entries, 5; got 6"),
        ((5,), 0, "got 0"),
        ((5,), -1, "got -1"),
        ((0,), 1, "entries, 0; got 1"),
        ((2, 3), 1, r"got shape \(2, 3\)"),
        ((), 1, r"got shape \(\)"),
    ],
)
def test_what_cannot_be_selected_raises(selector: str, shape: tuple[int, ...], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_largest(torch.zeros(shape), k, selector)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, NAN])
def test_a_share_outside_its_range_raises(share: float) -> None:
    with pytest.raises(ValueError, match="share must be above 0"):
        select_sampled(torch.ones(10), 2, share=share)


class NoSync(TorchDispatchMode):
    """Raises where the host would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("select", [select_exact, select_chunk])
def test_the_host_does_not_wait(select: Callable[[Tensor, int], Tensor]) -> None:
    values = draw(10_007)
    with NoSync():
        select(values, 10)


def test_the_host_does_not_wait_for_the_blocks_of_a_device() -> None:
    """On a CPU it counts entries; tensors of the device "meta" have no content that could be counted."""
    values = torch.zeros(100_007, device="meta")
    with NoSync():
        assert select_blocks(values, 10).shape == (10,)


def test_the_sampled_selector_is_known_to_wait() -> None:
    values = draw(10_007)
    with NoSync(), pytest.raises(AssertionError, match="nonzero"):
        select_sampled(values, 10)
