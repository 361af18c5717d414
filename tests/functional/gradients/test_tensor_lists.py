"""Lists of gradients as one thing: what the rules are made of."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_grad.functional.gradients.tensor_lists import (
    any_rank,
    by_device,
    is_known,
    is_sharded,
    joined_norm,
    multiply_,
    read_flags,
    shards,
    share_of,
    stack_norms,
    tensor_norms,
    whole,
)
from lightning_grad.testing import NoSync
from lightning_grad.testing.syncs import SyncError
from tests.functional.ranks import on_two_ranks


def test_a_plain_tensor_is_its_own_whole_and_its_own_shard() -> None:
    tensor = torch.ones(2)
    assert not is_sharded(tensor)
    assert whole(tensor) is tensor
    assert shards([tensor])[0] is tensor


def test_positions_are_sorted_by_device_in_their_order() -> None:
    meta, cpu = torch.device("meta"), torch.device("cpu")
    tensors = [torch.empty(1, device=device) for device in (cpu, meta, cpu, meta, meta)]
    assert by_device(tensors) == [[0, 2], [1, 3, 4]]
    assert by_device([]) == []


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_each_norm_is_that_of_its_tensor(norm_type: float) -> None:
    tensors = [torch.randn(3, 4), torch.randn(()), torch.randn(2, 2, 2)]
    expected = torch.stack([torch.linalg.vector_norm(tensor, norm_type) for tensor in tensors])
    torch.testing.assert_close(torch.stack(tensor_norms(tensors, norm_type)), expected)
    torch.testing.assert_close(stack_norms(tensors, norm_type), expected)


def test_norms_in_half_precision_are_added_up_in_float32() -> None:
    tensors = [torch.full((1000,), 200.0, dtype=torch.float16), torch.tensor([3.0, 4.0], dtype=torch.bfloat16)]
    norms = stack_norms(tensors)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.tensor([200.0 * 1000**0.5, 5.0]))
    assert [norm.dtype for norm in tensor_norms(tensors)] == [torch.float16, torch.bfloat16]


def test_norms_in_double_precision_are_not_narrowed() -> None:
    expected = torch.tensor([5e100, 1.0, 5.0], dtype=torch.float64)
    tensors = [torch.tensor([3e100, 4e100], dtype=torch.float64), torch.tensor([1.0]), torch.tensor([3.0, 4.0]).half()]
    torch.testing.assert_close(stack_norms(tensors), expected)
    torch.testing.assert_close(joined_norm(tensors), expected.norm())


@pytest.mark.parametrize("sizes", [[3], [5000], [3, 5000, 4096, 4097, 1], [0, 2], [1] * 50])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, None], ids=str)
def test_the_joined_norm_is_that_of_one_vector(dtype: torch.dtype | None, sizes: list[int]) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16] if dtype is None else [dtype] * 3
    tensors = [(200.0 + torch.rand(size, 1)).to(dtypes[i % 3]) for i, size in enumerate(sizes)]
    norm = joined_norm(tensors)
    assert norm.shape == ()
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.cat([tensor.double().flatten() for tensor in tensors]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)  # torch adds up one after the other


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sizes", [[3, 5000], [5000, 5000], [3, 3]])
def test_the_joined_norm_of_what_is_not_finite_is_not(sizes: list[int], bad: float) -> None:
    for position in range(2):
        tensors = [torch.ones(size) for size in sizes]
        tensors[position][-1] = bad
        assert not joined_norm(tensors).isfinite()


def test_tensors_of_any_dtype_are_multiplied_in_place() -> None:
    tensors = [torch.ones(2), torch.ones(3, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64)]
    kept = list(tensors)
    multiply_(tensors, torch.tensor(0.5, dtype=torch.float64))
    assert all(tensor is before for tensor, before in zip(tensors, kept, strict=True))
    assert [tensor.dtype for tensor in tensors] == [torch.float32, torch.bfloat16, torch.float64]
    assert all((tensor == 0.5).all() for tensor in tensors)


def test_the_share_is_of_entries_and_not_of_tensors() -> None:
    flags = [torch.tensor([True]), torch.tensor([[False, False, True], [False] * 3])]
    assert share_of(flags).item() == pytest.approx(2 / 7)


def test_flags_of_a_generator_do_not_pile_up() -> None:
    def flags() -> Iterator[torch.Tensor]:
        for _ in range(4):
            alive.append(sum(made() is not None for made in found))
            flag = torch.ones(3, dtype=torch.bool)
            found.append(weakref.ref(flag))
            yield flag
            del flag

    found: list[Any] = []
    alive: list[int] = []
    assert share_of(flags()).item() == 1.0
    assert max(alive) == 1


def sharded_lists(rank: int, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    tensor = distribute_tensor(torch.arange(6.0).reshape(3, 2), mesh, [Shard(0)])
    assert is_sharded(tensor)
    assert torch.equal(whole(tensor), torch.arange(6.0).reshape(3, 2))
    (piece,) = shards([tensor])
    assert len(piece) == 2 - rank
    multiply_([tensor, other := torch.ones(2)], torch.tensor(2.0))
    assert torch.equal(whole(tensor), 2 * torch.arange(6.0).reshape(3, 2))
    assert other.tolist() == [2.0, 2.0]
    assert piece[0, 1].item() == 2.0 * (1 + 4 * rank), "the shard shares the memory"
    torch.testing.assert_close(stack_norms([tensor]), torch.tensor([2 * 55**0.5]))
    torch.testing.assert_close(joined_norm([tensor]), torch.tensor(2 * 55**0.5))
    # A nan on one rank is a flag on both.
    flags = any_rank(torch.tensor([rank == 1, False]), [tensor, tensor])
    assert flags.tolist() == [True, False]
    # Rows 0 and 1 lie on the first rank: 4, 6, 8 and 10 are above 3, and of the plain ones none.
    assert share_of([tensor > 3.0, other > 3.0]).item() == pytest.approx(4 / 8)


def test_dtensors() -> None:
    on_two_ranks(sharded_lists)


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str
)
def test_the_largest_magnitude_is_that_of_torch(dtype: torch.dtype, bad: float | None) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(size, dtype=dtype) for size in (3, 1025, 5000, 90 * 80)]
    tensors += [torch.zeros(2000, dtype=dtype).neg(), torch.randn(60, 50, dtype=dtype).T]
    for tensor in tensors[:3] if bad is not None else ():
        tensor[-1] = bad
    for accurate in (False, True):
        precise = torch.float32 if accurate and dtype in (torch.float16, torch.bfloat16) else None
        expected = torch._foreach_norm(tensors, float("inf"), precise)
        found = tensor_norms([*tensors, torch.zeros(0, dtype=dtype)], float("inf"), accurate)
        assert [norm.dtype for norm in found[:-1]] == [norm.dtype for norm in expected]
        assert found.pop() == 0.0
        assert torch.equal(torch.stack(found).nan_to_num(-1.0), torch.stack(expected).nan_to_num(-1.0))
        assert not any(norm.signbit() for norm in found)


def test_flags_are_read_on_a_cpu_and_never_on_a_device() -> None:
    flags = torch.tensor([True, False])
    with NoSync():
        assert read_flags(flags) == bytes([1, 0])
        assert is_known(flags[0])
        assert not is_known(flags[1])
    assert read_flags(flags.to("meta")) is None
    assert not is_known(flags[0].to("meta"))
    with NoSync(), pytest.raises(SyncError):
        bool(flags[0])
