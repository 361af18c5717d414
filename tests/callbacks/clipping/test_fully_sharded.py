"""What rules see of gradients under ``fully_shard`` (FSDP2, two gloo ranks) is what they see on one process.

``tests/contract/test_fully_sharded.py`` trains with all of them.
"""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_grad.callbacks.diagnostics._monitor_record import MonitorRecord
from lightning_grad.callbacks.diagnostics._optimizer_watch import OptimizerWatch, Place
from lightning_grad.functional import clip_norm_
from tests.functional.ranks import on_two_ranks
from tests.sharded import on_cpus


def build() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4))


def watched(module: nn.Module) -> tuple[dict[str, Any], dict[str, float], dict[str, dict[str, float]]]:
    """Watch a step of Adam, clipped and logged, and return what was seen."""
    optimizer, record = torch.optim.Adam(module.parameters(), lr=0.05), MonitorRecord()
    watch = OptimizerWatch(optimizer, list(module.named_parameters()), None, record, scaled=False)
    optimizer.register_step_post_hook(lambda *_: watch.look_at_update())
    for step in range(2):
        optimizer.zero_grad()
        loss = module(torch.arange(12.0).view(2, 6).sin() * (step + 1)).square().sum()
        loss.backward()
        with torch.no_grad():
            watch.look_before(loss, measured=step == 1, slow=step == 1, keep=True)
            clip_norm_([parameter.grad for parameter in module.parameters()], 0.1)
            watch.look_after(loss, Place(step, 0, step), changed=True)
        optimizer.step()
    watch.drain()
    scalars, layers = watch.take_details()
    return record.rows()[-1], scalars, layers


@on_cpus
def test_the_monitor_sees_whole_gradients() -> None:
    from torch.distributed.fsdp import fully_shard

    def check(rank: int, mesh: Any) -> None:
        expected = watched(build())
        sharded = build()
        for layer in (sharded[0], sharded[3]):
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        row, scalars, layers = watched(sharded)
        assert row == pytest.approx(expected[0], rel=1e-4)
        assert scalars == pytest.approx(expected[1], rel=1e-3)
        assert layers.keys() == expected[2].keys()
        for quantity, by_layer in layers.items():
            assert by_layer == pytest.approx(expected[2][quantity], rel=1e-3), quantity

    on_two_ranks(check)


def test_a_bad_gradient_on_one_rank_is_seen_on_both() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    from lightning_grad.functional import nonfinite

    def check(rank: int, mesh: Any) -> None:
        bad = torch.zeros(4)
        bad[3] = torch.nan
        gradients = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (torch.zeros(4), bad)]
        assert nonfinite(gradients).tolist() == [False, True]

    on_two_ranks(check)
