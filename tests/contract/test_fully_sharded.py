"""G6: every callback that declares to work with FSDP2 trains a module under ``fully_shard`` as it trains one under DDP.

Two gloo ranks hold real shards, in a real Trainer with Lightning's own ``ModelParallelStrategy``; nothing of it runs on GPUs.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from lightning_grad.callbacks import SAM, NormClipping
from lightning_grad.functional import clip_norm_
from lightning_grad.functional.gradients.tensor_lists import shards
from lightning_grad.testing import make_classifier, on_ranks
from tests.contract.entries import Technique
from tests.contract.settings import CANONICAL, DIFFERENT
from tests.sharded import differences, fit_replicated, fit_sharded, on_cpus, sharded

pytestmark = on_cpus

_OTHERS = [technique for technique in DIFFERENT if str(technique) == "DataPruning-dq"]  # it chooses in another way
FULLY_SHARDED = [technique for technique in [*CANONICAL, *_OTHERS] if not technique.works_with.fsdp2.is_no]
_ROUNDING = 1e-5
_UNDER_DDP = {"SAM": {"sync_ascent": True}}  # ranks move along the mean gradient, as shards have no other


def _module(technique: Technique) -> Any:
    return make_classifier(optimizer="adamw" if technique.works_with.no_second_moment.is_no else "sgd")


def _differs(technique: Technique) -> str:
    """Return what is wrong with a technique on sharded weights; empty if nothing is."""
    try:
        _, whole = fit_replicated([technique.build(**_UNDER_DDP.get(technique.name, {}))], _module(technique))
        _, parts = fit_sharded([technique.build()], sharded(_module(technique)))
    except Exception:
        return traceback.format_exc()
    far = {name: value for name, value in differences(whole, parts).items() if not value <= _ROUNDING}
    return f"other weights than under DDP: {far}" if far else ""


def _all_that_differ() -> dict[str, str]:
    found = {str(technique): _differs(technique) for technique in FULLY_SHARDED}
    return {name: what for name, what in found.items() if what}


def test_callbacks_train_a_sharded_module_as_ddp_trains_it() -> None:
    """All in one pair of processes, one after the other: starting them takes longer than the fits of a technique."""
    assert on_ranks(2, _all_that_differ, limit=110.0) == [{}, {}]


class _OwnNorm(pl.Callback):
    """Clips by the norm of the shards of this rank, as code does that takes a DTensor for what a rank holds."""

    @override
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        clip_norm_(shards(p.grad for p in pl_module.parameters()), 0.1)


def _clip() -> tuple[dict[str, float], dict[str, float]]:
    _, whole = fit_replicated([NormClipping(0.1)], max_epochs=1)
    right, wrong = fit_sharded([NormClipping(0.1)], max_epochs=1)[1], fit_sharded([_OwnNorm()], max_epochs=1)[1]
    return differences(whole, right), differences(whole, wrong)


def test_the_norm_of_a_ranks_own_shards_is_another_one() -> None:
    for right, wrong in on_ranks(2, _clip):
        assert max([0.0, *right.values()]) < _ROUNDING < max(wrong.values())


def _resume(folder: str) -> list[dict[str, float]]:
    found = []
    for distributed, build in ((True, lambda: SAM(0.05)), (False, lambda: NormClipping(0.1))):
        saving = [ModelCheckpoint(f"{folder}/{distributed}", filename="{epoch}", save_top_k=-1) for _ in range(2)]
        _, whole = fit_sharded([build(), saving[0]], distributed=distributed)
        dist.barrier()  # rank 0 has written the file
        file = f"{folder}/{distributed}/epoch=0.ckpt"
        _, resumed = fit_sharded([build(), saving[1]], distributed=distributed, ckpt=file)
        found.append(differences(whole, resumed))
    return found


def test_a_run_of_a_sharded_module_resumes_exactly(tmp_path: Path) -> None:
    """Loading steps the optimizer without gradients. SAM would raise, and a clipper would warn that it was bypassed."""
    assert on_ranks(2, _resume, str(tmp_path)) == [[{}] * 2] * 2
