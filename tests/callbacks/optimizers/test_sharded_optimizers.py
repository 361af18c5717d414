"""``OptimizerSwap`` under ``fully_shard`` (FSDP2): optimizers whose rule is elementwise train as under DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_grad.callbacks import OptimizerSwap
from lightning_grad.callbacks.optimizers._names import NAMES
from tests.sharded import differences, fit_replicated, fit_sharded, on_cpus

pytestmark = on_cpus

_AVERAGES = {"schedulefree-adamw"}  # shows other weights in validation, for which they must be whole
WORKS = [(name,) for name, named in NAMES.items() if named.elementwise and name not in _AVERAGES]
NEEDS_WHOLE = [(name,) for name, named in NAMES.items() if (name,) not in WORKS]
_LISTS = [("diffgrad",)]


def _swap(name: str, **options: Any) -> list[Any]:
    return [OptimizerSwap(name, options or None, lr_factor=0.1)]


def _train(name: str, folder: Path) -> dict[str, float]:
    options = {"foreach": False} if NAMES[name].copies_lists else {}
    _, whole = fit_replicated(_swap(name, **options), max_epochs=1)
    _, parts = fit_sharded(_swap(name, **options), max_epochs=1)
    return differences(whole, parts)


@pytest.mark.parametrize("case", WORKS)
def test_an_elementwise_optimizer_trains_shards_as_ddp_trains_the_whole(case, together):
    for far in together(_train, WORKS, case)[0]:
        assert max([0.0, *far.values()]) < 1e-7


def _refuse(name: str, folder: Path) -> str:
    with pytest.raises(ValueError, match="OptimizerSwap") as error:
        fit_sharded(_swap(name))
    return str(error.value)


@pytest.mark.parametrize("case", NEEDS_WHOLE)
def test_an_optimizer_that_needs_whole_parameters_is_refused(case, together):
    for message in together(_refuse, NEEDS_WHOLE + _LISTS, case)[0]:
        assert "FSDP2 (ModelParallelStrategy)" in message


def test_one_that_copies_lists_says_how_it_works(together):
    for message in together(_refuse, NEEDS_WHOLE + _LISTS, _LISTS[0])[0]:
        assert message == (
            "OptimizerSwap uses an optimizer that copies lists of tensors, which torch cannot do with the DTensors of FSDP2 "
            "(ModelParallelStrategy). Set foreach=False in its options."
        )


TOGETHER = ({_train: WORKS, _refuse: NEEDS_WHOLE + _LISTS},)
