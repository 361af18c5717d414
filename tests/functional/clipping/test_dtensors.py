"""DTensors are clipped as the whole gradients would be, and in place."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import (
    clip_adaptively_,
    clip_layers_,
    clip_norm_,
    clip_spikes_,
    clip_to_threshold_,
    clip_value_,
    layer_limits,
    normalize_layers_,
    total_norm,
)
from tests.functional.clipping.gradients import INF, copies
from tests.functional.ranks import on_two_ranks

SHARDED = [((6, 4), 0), ((5, 4), 0), ((4, 6), 1), ((3, 5), 1), ((4, 2, 3), 0), ((7,), 0), ((8,), 0)]

PLAIN = [(3, 4), (5,)]

SOME_LAYERS = torch.tensor([0, 1, 1, 0, 2, 2, 2, 3, 3])

ACTIONS: dict[str, Callable[[list[Tensor], list[Tensor], Tensor], Any]] = {
    "total_norm": lambda g, w, h: [total_norm(g, p) for p in (1.0, 2.0, INF)],
    "total_norm-accurate": lambda g, w, h: total_norm(g, accurate=True),
    "clip_norm_": lambda g, w, h: clip_norm_(g, 0.5),
    "clip_norm_-inf": lambda g, w, h: clip_norm_(g, 0.5, INF),
    "clip_value_": lambda g, w, h: clip_value_(g, 0.5),
    "clip_to_threshold_": lambda g, w, h: clip_to_threshold_(g, total_norm(g), torch.tensor(0.5)),
    "clip_adaptively_": lambda g, w, h: clip_adaptively_(g, w, 0.5),
    "clip_layers_": lambda g, w, h: clip_layers_(g, h, layer_limits(torch.tensor([1.0, 2.0, 3.0, 4.0]), 1.0, True)),
    "normalize_layers_": lambda g, w, h: normalize_layers_(g, w, h, 4, 0.1, 0.2),
    "clip_spikes_": lambda g, w, h: clip_spikes_(g, [x.square() for x in w], 0.5),
}


def whole(value: Any) -> Any:
    """Return nested results with every DTensor gathered."""
    if isinstance(value, (list, tuple)):
        return [whole(item) for item in value]
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def acts_on_shards_as_on_the_whole(act: Callable[..., Any], mixed: bool, rank: int, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    def drawn(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = [shape for shape, _ in SHARDED] + (PLAIN if mixed else [])
        return [torch.randn(shape, generator=generator) for shape in shapes]

    def spread(tensors: list[Tensor]) -> list[Any]:
        dims = [dim for _, dim in SHARDED]
        sharded = [distribute_tensor(t.clone(), mesh, [Shard(d)]) for t, d in zip(tensors, dims, strict=False)]
        # Plain ones stand between the sharded ones, as parameters that FSDP2 was told to ignore do.
        return [*sharded, *copies(tensors[len(dims) :])]

    order = [0, 7, 1, 2, 3, 8, 4, 5, 6] if mixed else list(range(7))
    layers = SOME_LAYERS[order]
    plain, weights = ([tensors[i] for i in order] for tensors in (drawn(0), drawn(1)))
    gradients, sharded_weights = ([spread(drawn(seed))[i] for i in order] for seed in (0, 1))
    pieces = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    expected = act(plain, weights, layers)
    found = act(gradients, sharded_weights, layers)
    torch.testing.assert_close(whole(found), whole(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole(gradients), plain, rtol=1e-6, atol=1e-6)
    for gradient, piece in zip(gradients, pieces, strict=True):
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        assert torch.equal(piece, local), "what this rank held before was not what was changed"


def every_action(mixed: bool, rank: int, mesh: Any) -> None:
    for name, act in ACTIONS.items():
        try:
            acts_on_shards_as_on_the_whole(act, mixed, rank, mesh)
        except Exception as error:
            raise AssertionError(f"{name} on rank {rank}: {error}") from error


@pytest.mark.parametrize("mixed", [False, True], ids=["sharded", "sharded and plain"])
def test_dtensors(mixed: bool) -> None:
    on_two_ranks(partial(every_action, mixed))


def clips_where_a_rank_holds_nothing(norm_type: float, rank: int, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    gradient = distribute_tensor(torch.tensor([4.0]), mesh, [Shard(0)])  # a bias of one output
    assert gradient.to_local().numel() == 1 - rank
    assert clip_norm_([gradient], 1.0, norm_type).item() == 4.0
    assert gradient.full_tensor().item() == pytest.approx(1.0)
    clip_value_([gradient], 0.5)
    assert gradient.full_tensor().item() == 0.5
    weight = distribute_tensor(torch.tensor([1.0]), mesh, [Shard(0)])
    clip_adaptively_([gradient], [weight], 0.1)
    assert gradient.full_tensor().item() == pytest.approx(0.1)
    clip_spikes_([gradient], [distribute_tensor(torch.tensor([1e-4]), mesh, [Shard(0)])], 4.0)
    assert gradient.full_tensor().item() == pytest.approx(0.02)
    clip_layers_([gradient], torch.tensor([0]), torch.tensor([0.01]))
    assert gradient.full_tensor().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_dtensors_smaller_than_the_number_of_ranks(norm_type: float) -> None:
    on_two_ranks(partial(clips_where_a_rank_holds_nothing, norm_type))
