"""Masks in chunks on a CPU and joined masks, bit for bit against the way of a GPU and against one mask per weight."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_grad.functional import nm_mask
from lightning_grad.functional.sparsity import _chunked_mask as chunks
from lightning_grad.functional.sparsity._selection_network import network, nth_largest
from lightning_grad.functional.sparsity.nm_sparsity import Axis, _mask_of_groups, group_dim, nm_masks
from tests.cases import cases
from tests.functional.sparsity.test_nm_sparsity import PATTERNS, draw

SPARSE = [(n, m) for n, m in PATTERNS if n < m]


def whole(weight: Tensor, n: int, m: int, axis: Axis = "input") -> Tensor:
    """The mask without chunks."""
    dim = group_dim(weight, axis)
    return _mask_of_groups(weight.reshape(-1, m, weight.shape[dim + 1 :].numel()), n).reshape(weight.shape)


def few_ties(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    weight = draw(shape, dtype)
    weight.view(-1)[:: weight.numel() // 2 + 1] = 0.0
    weight.view(-1)[1 :: weight.numel() // 2 + 1] = -0.0
    return weight


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three groups in a chunk, so there are many chunks and a shorter last one; all ties are settled in them."""
    monkeypatch.setattr(chunks, "_MOST_TIED", 1.0)
    monkeypatch.setattr(chunks, "_ROW", 3)
    monkeypatch.setattr(chunks, "_CHUNK", 1)


@cases("kind", ["normal", "ties", "special"])
@cases("dtype", [torch.float32, torch.float64])
@cases(("n", "m"), SPARSE)
def test_chunks_change_no_bit(small_chunks: None, n: int, m: int, dtype: torch.dtype, kind: str) -> None:
    linear, conv = draw((5, 4 * m), dtype, kind), draw((2 * m, m, 3, 2), dtype, kind)
    wide = torch.stack([conv, conv + 1], -1)[..., 0]
    for weight, axis in ((linear, 1), (linear.t(), 0), (conv, 1), (conv, 0), (wide, "output"), (conv[:0], 1)):
        mask, expected = nm_mask(weight, n, m, axis), whole(weight, n, m, axis)
        assert torch.equal(mask, expected)
        assert (mask.dtype, mask.stride()) == (expected.dtype, expected.stride())


@cases(("n", "m"), [(2, 4), (1, 8), (4, 8), (15, 16)])
def test_a_few_ties_are_settled_in_the_chunk(n: int, m: int) -> None:
    weight = few_ties((400, 2 * m), torch.float32)
    weight[7] = 3.0
    mask = chunks.chunked_mask(weight.view(-1, m, 1), n)
    assert mask is not None
    assert torch.equal(mask.view(weight.shape), whole(weight, n, m))
    assert not torch.equal(mask[14], (weight[7, :m] >= 3.0).float().view(-1, 1))  # without settling, all would be kept


def test_many_ties_and_wide_groups_are_left_to_the_whole_way(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw((400, 8), kind="ties")
    assert chunks.chunked_mask(weight.view(-1, 4, 1), 2) is None
    assert chunks.chunked_mask(draw((40, 4, 3)), 2) is not None
    monkeypatch.setattr(chunks, "_LARGEST", 11)
    assert chunks.chunked_mask(draw((40, 4, 3)), 2) is None


def test_half_types_other_devices_and_subclasses_are_left_to_the_whole_way() -> None:
    class Labelled(Tensor):
        pass

    weight = draw((4, 8))
    taken = [weight, weight.double(), nn.Parameter(weight)]
    left = [weight.half(), weight.bfloat16(), weight.to("meta"), weight.as_subclass(Labelled)]
    assert [chunks.is_chunkable(one) for one in taken + left] == [True] * 3 + [False] * 4


@cases("m", [2, 4, 16, 64, 5000])
@cases("threads", [1, 2, 256])
def test_float32_counts_a_chunk_exactly(m: int, threads: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        length = chunks._row_length(m)
    assert 1 <= length * m <= 2**24
    assert length >= min(threads * 2**15, 2**24 // m) or threads == 1  # each thread gets its share of a row


@cases(("n", "m"), SPARSE)
def test_the_planned_network_finds_the_nth_largest(n: int, m: int) -> None:
    steps, size, end = network(n, m)
    rows = [*draw((m, 50), kind="special").nan_to_num(-1.0).abs().unbind(), *[torch.empty(50)] * (size - m)]
    inputs = [row.clone() for row in rows[:m]]
    for operation, one, other, result in steps:
        assert result >= m
        rows[result] = operation(rows[one], rows[other])
    assert torch.equal(rows[end], nth_largest(inputs, n))
    assert torch.equal(rows[end], torch.stack(inputs).sort(0, descending=True).values[n - 1])
    assert all(torch.equal(row, before) for row, before in zip(rows, inputs, strict=False))


# Many weights.


def many(n: int, m: int) -> tuple[list[Tensor], list[Axis]]:
    kinds: list[tuple[Tensor, Axis]] = []
    for repeat in range(3):
        kinds += [(draw((8 + repeat, 2 * m), kind=kind), 1) for kind in ("normal", "ties", "special")]
        kinds += [(draw((m, 6)).t(), "input"), (draw((2 * m, 6)), "output"), (nn.Parameter(draw((4, m))), "input")]
        kinds += [
            (draw((4, 2 * m, 3, 3), kind=kind).to(memory_format=torch.channels_last), 1) for kind in ("ties", "normal")
        ]
        kinds += [(draw((2 * m, m, 3)), 0), (draw((3, m)).double(), 1), (draw((3, m), torch.bfloat16), 1)]
        kinds += [(torch.empty(0, m), 1), (draw((40, 6 * m)), 1)]
    return [weight for weight, _ in kinds], [axis for _, axis in kinds]


@cases(("n", "m"), [(2, 4), (1, 8), (3, 5), (15, 16), (4, 4)])
@cases("limits", [(2**15, 2**18), (2**15, 100), (240, 300), (0, 2**18)])
def test_joined_masks_are_those_of_each_weight(n: int, m: int, limits: tuple[int, int]) -> None:
    weights, axes = many(n, m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_grad.functional.sparsity.nm_sparsity._ON_CPU", limits)
        plain, decayed = nm_masks(weights, n, m, axes), nm_masks(weights, n, m, axes, outside=0.3)
    for weight, axis, mask, factor in zip(weights, axes, plain, decayed, strict=True):
        expected = nm_mask(weight, n, m, axis)
        assert torch.equal(mask, expected)
        assert (mask.dtype, mask.stride(), mask.requires_grad) == (expected.dtype, expected.stride(), False)
        assert torch.equal(factor, expected.clamp_(min=0.3))


def test_no_weights_have_no_masks_and_a_wrong_shape_is_refused() -> None:
    assert nm_masks([], 2, 4, []) == []
    with pytest.raises(ValueError, match=r"do not divide dimension 1 of a weight of shape \(4, 6\)"):
        nm_masks([torch.zeros(4, 8), torch.zeros(4, 6)], 2, 4, [1, 1])


class Computed(TorchDispatchMode):
    """Counts the operations that compute; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in ("detach", "_unsafe_view"):
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@cases("device", ["cpu", "meta"])
@cases("outside", [0.0, 0.5])
def test_many_small_weights_take_as_many_operations_as_one(device: str, outside: float) -> None:
    def operations(count: int) -> Counter[str]:
        weights = [draw((8, 16)).to(device) for _ in range(count)]
        with Computed() as computed:
            nm_masks(weights, 2, 4, ["input"] * count, outside)
        return computed.calls

    assert operations(50) == operations(1)
    assert 5 < operations(1).total() < 40
