"""Rules on the shards of DTensors equal those on whole tensors, also where ranks hold different numbers of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_grad.functional.gradients import shards
from lightning_grad.functional.gradients.tensor_lists import joined_norm, stack_norms, whole
from tests.functional.ranks import on_two_ranks
from tests.sharded import on_cpus

SHAPES = [(4, 6), (5, 4), (1, 4), (3, 2, 2)]


def _pair(shape: tuple[int, ...], mesh: Any, dim: int = 0) -> tuple[Tensor, Tensor]:
    from torch.distributed.tensor import Shard, distribute_tensor

    tensor = torch.arange(float(torch.Size(shape).numel())).view(shape).sin()
    return tensor, distribute_tensor(tensor, mesh, [Shard(dim)])


def _check(rank: int, mesh: Any) -> None:
    for shape in SHAPES:
        tensor, sharded = _pair(shape, mesh)
        assert (shards.sharded_dims(sharded), shards.sharded_dims(tensor)) == ({0}, set())
        assert shards.is_dtensor(sharded)
        assert not shards.is_dtensor(tensor)
        # A rule that is local to rows.
        squares = shards.on_shard(torch.square, sharded)
        assert squares.placements == sharded.placements  # type: ignore[attr-defined]
        assert torch.equal(whole(squares), tensor.square())
        assert torch.equal(shards.on_shard(torch.square, tensor), tensor.square())
        # What all ranks hold, cut without communication, and back.
        assert torch.equal(whole(shards.shard_of(tensor, sharded)), tensor)
        assert shards.shard_of(tensor, tensor) is tensor
        # A matrix with a row for each row of the weight, such as the mask of a convolution.
        rows = shards.as_shard(sharded.to_local().flatten(1), sharded, rows_along=0)  # type: ignore[attr-defined]
        assert torch.equal(whole(rows), tensor.flatten(1))
        # Of a sum, each rank has its part.
        own = sharded.to_local().sum()  # type: ignore[attr-defined]
        assert torch.allclose(shards.sum_over_shards(own, sharded), tensor.sum())
        assert shards.sum_over_shards(own, tensor) is own


def test_rules_on_shards_equal_rules_on_the_whole() -> None:
    on_two_ranks(_check)


def _check_columns(rank: int, mesh: Any) -> None:
    tensor, sharded = _pair((4, 5), mesh, dim=1)
    assert shards.sharded_dims(sharded) == {1}
    rows = shards.as_shard(sharded.to_local().t(), sharded, rows_along=1)  # type: ignore[attr-defined]
    assert torch.equal(whole(rows), tensor.t())


def test_rows_along_the_second_dimension() -> None:
    on_two_ranks(_check_columns)


def _check_used(rank: int, mesh: Any) -> None:
    tensor, sharded = _pair((5, 4), mesh)
    used = tensor.to(torch.bfloat16)
    assert torch.equal(shards.as_used(sharded, used), used)
    assert torch.equal(shards.as_used(sharded > 0, used), tensor > 0)  # a mask stays one
    assert shards.as_used(sharded, sharded) is sharded
    assert shards.as_used(tensor, used) is tensor


def test_values_for_a_gathered_weight_are_whole_and_of_its_type() -> None:
    on_two_ranks(_check_used)


def _check_two_meshes(rank: int, mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    both = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    tensor = torch.arange(20.0).view(5, 4).sin()
    held = distribute_tensor(tensor, both, [Shard(0), Shard(0)])
    used = distribute_tensor(tensor, both["tensor_parallel"], [Shard(0)])
    assert (shards.is_tensor_parallel(held), shards.is_tensor_parallel(tensor)) == (True, False)
    found = shards.as_used(held > 0, used)
    assert isinstance(found, DTensor)
    assert found.device_mesh == used.device_mesh
    assert torch.equal(whole(found), tensor > 0)
    other = distribute_tensor(tensor, mesh, [Replicate()])
    assert torch.allclose(joined_norm([held, other]), joined_norm([tensor, tensor]))
    assert stack_norms([held, other], torch.inf).tolist() == stack_norms([tensor, tensor], torch.inf).tolist()


def test_parameters_of_two_meshes() -> None:
    """Under tensor parallelism FSDP2 holds those of some layers on a mesh of both, and gathers them over one dimension."""
    on_two_ranks(_check_two_meshes)


def _check_reshard(rank: int, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    module = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    assert not shards.is_fully_sharded(module[0])
    fully_shard(module[1], mesh=mesh)
    fully_shard(module, mesh=mesh)
    assert shards.is_fully_sharded(module[0])
    with torch.no_grad():
        module(torch.ones(1, 2))
    kept = [shards.is_dtensor(parameter) for parameter in module.parameters()]
    assert kept == [False, False, True, True]  # the root keeps whole weights, for a backward pass
    shards.reshard(module)
    assert all(map(shards.is_dtensor, module.parameters()))
    dist.barrier()


@on_cpus
def test_after_a_validation_the_root_is_sharded_again() -> None:
    on_two_ranks(_check_reshard)


def test_plain_modules_have_nothing_to_shard() -> None:
    module = nn.Linear(2, 2)
    weight = module.weight
    shards.reshard(module)
    assert module.weight is weight
    with pytest.raises(AttributeError):
        shards.as_shard(torch.ones(1), torch.ones(1))
