"""Weights that ``fully_shard`` spreads over two ranks, and that a technique makes sparse or rounds."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_grad.callbacks import NMSparsity, NormClipping, QuantizationAwareTraining
from lightning_grad.core.views import weight_chain
from lightning_grad.functional import is_nm
from lightning_grad.testing import fit, make_classifier
from tests.sharded import differences, fit_replicated, fit_sharded, on_cpus, sharded, weights_of

pytestmark = on_cpus

_LAYERS = ["encoder.*", "hidden"]
_EVERYWHERE = [*_LAYERS, "mix.w"]  # mix.w is written in place


def _sparse(include: list[str] | None = None, **arguments: Any) -> NMSparsity:
    return NMSparsity(**{"pattern": "1:4", "include": include or _EVERYWHERE, "restart_monitors": False, **arguments})


def _rounded(include: list[str] | None = None, **arguments: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(**{"weight_bits": 4, "include": include or _EVERYWHERE, **arguments})


def _module(optimizer: str = "sgd") -> Any:
    """Return the classifier with layers whose rows two ranks cannot share evenly: 5 rows, and a single one."""
    module = make_classifier(optimizer=optimizer)
    module.hidden = nn.Linear(16, 5)
    module.norm = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 1, bias=False), nn.Linear(1, 32))
    module.head = nn.Linear(32, 4)
    return module


WAYS: dict[str, Callable[[], list[Any]]] = {
    "decaying": lambda: [_sparse(dense_fraction=0.1)],
    "masked": lambda: [_sparse(_LAYERS, gradient="masked")],
    "sr-ste": lambda: [_sparse(recipe="sr-ste", sr_ste_lambda=0.1, zero_pruned_state=True)],
    "step": lambda: [_sparse(recipe="step", dense_fraction=0.3)],
    "old-masks": lambda: [_sparse(recipe="ste", mask_every_n_steps=3)],
    "few-rows": lambda: [_sparse(["norm.1"], recipe="ste"), _rounded(["norm.1", "norm.0", "hidden"])],
    "quest": lambda: [_rounded(_LAYERS, quantizer="quest")],
    "annealed": lambda: [_rounded(weight_bits=2, quantizer="statsq", annealing_start=0.3, annealing_width=0.1)],
    "both": lambda: [_rounded(), _sparse(recipe="ste")],
}


def _ours(trainer: Any) -> dict[str, float]:
    return {
        key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(("sparsity", "quant"))
    }


def _train(name: str, folder: Path) -> Any:
    kind = "adamw" if name == "step" else "sgd"
    often = {"log_every_n_steps": 1, "max_epochs": 1}
    plain, whole = fit_replicated(WAYS[name](), _module(kind), **often)
    # A layer that stays whole until its backward pass is another one after a validation, which has none.
    keep = {"reshard_after_forward": False} if name == "both" else {}
    trainer, parts = fit_sharded(WAYS[name](), sharded(_module(kind), **keep), **often)
    seen = [torch.equal(one, other) for one, other in zip(whole.validated, parts.validated, strict=True)]
    return differences(whole, parts), seen, _ours(plain), _ours(trainer)


WORKS = [(name,) for name in WAYS]


@pytest.mark.parametrize("case", WORKS)
def test_a_sharded_module_trains_as_under_ddp(case, together):
    for far, seen, plain, logged in together(_train, WORKS, case)[0]:
        assert far == {}
        assert all(seen)
        assert plain.keys() == logged.keys() != set()
        assert logged == pytest.approx(plain, rel=1e-4, abs=1e-7)


def _resume(name: str, distributed: bool, folder: Path) -> Any:
    saving = [ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=2) for _ in range(2)]
    how = {"distributed": distributed, "resumable": True}
    _, whole = fit_sharded([*WAYS[name](), saving[0]], sharded(_module()), **how)
    dist.barrier()  # rank 0 has written the file
    file = folder / "step=4.ckpt"
    _, resumed = fit_sharded([*WAYS[name](), saving[1]], sharded(_module()), ckpt=file, **how)
    found = None if distributed else torch.load(folder / "step=6.ckpt")["state_dict"]
    return differences(whole, resumed), found, weights_of(whole)


RESUMED = [("old-masks", True), ("both", False)]


@pytest.mark.parametrize("case", RESUMED)
def test_a_checkpoint_resumes_exactly_and_holds_the_weights_of_inference(case, together):
    for far, saved, weights in together(_resume, RESUMED, case)[0]:
        assert far == {}
        assert is_nm(weights["hidden.weight"], 1, 4)
        if saved is not None:  # a file, which the plain module loads
            plain = _module()
            plain.load_state_dict(saved, strict=True)
            assert {name: torch.equal(p, weights[name]) for name, p in plain.named_parameters()} == dict.fromkeys(
                weights, True
            )


def _along_inputs(parameter: Any) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(1 if parameter.ndim > 1 else 0)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "axis": (
        lambda: _sparse(["hidden"], pattern="1:5", axis="output"),
        {},
        "NMSparsity cannot work on hidden.weight: its groups of 5 lie along dimension 0, and the weight is sharded along "
        "dimension 0. Shard it along another dimension, set axis, or exclude it: exclude=['hidden.weight'].",
    ),
    "cut-groups": (
        lambda: _sparse(["hidden"]),
        {"shard_placement_fn": _along_inputs},
        "NMSparsity cannot work on hidden.weight: its groups of 4 lie along dimension 1, and the weight is sharded along "
        "dimension 1.",
    ),
    "cut-rows": (
        lambda: _rounded(["hidden"]),
        {"shard_placement_fn": _along_inputs},
        "QuantizationAwareTraining cannot work on hidden.weight: each output channel (dimension 0) has one scale, and the "
        "weight is sharded along dimension 1. Shard it along dimension 0, or exclude it: exclude=['hidden.weight'].",
    ),
    "in-place": (
        lambda: _sparse(["mix.w"], gradient="masked"),
        {},
        "NMSparsity cannot work on mix.w: with these settings it changes gradients of the weight, which it writes in place, "
        "because its layer is not one of torch's, and the weight is sharded. Exclude it: exclude=['mix.w']",
    ),
}


def _refuse(name: str, folder: Path) -> str:
    build, how, _ = REFUSED[name]
    with pytest.raises(ValueError, match="sharded") as error:
        fit_sharded([build()], sharded(_module(), **how))
    return str(error.value)


NAMES = [(name,) for name in REFUSED]


@pytest.mark.parametrize("case", NAMES)
def test_shards_that_cut_what_a_rule_needs_whole_are_refused_by_name(case, together):
    for message in together(_refuse, NAMES, case)[0]:
        assert re.match(re.escape(REFUSED[case[0]][2]), message), message


def _train_shown_weights(name: str, folder: Path) -> dict[str, float]:
    """Let FSDP2 find the sparse weight where it looks for its parameter, which it then trains instead."""
    _, whole = fit_replicated(WAYS[name](), _module(), max_epochs=1)
    with patch.object(weight_chain, "is_fully_sharded", lambda _: False):
        _, parts = fit_sharded(WAYS[name](), sharded(_module()), max_epochs=1)
    return differences(whole, parts)


NAIVE = [("old-masks",)]


def test_the_comparison_sees_a_view_that_fsdp2_takes_for_its_parameter(together):
    for far in together(_train_shown_weights, NAIVE, NAIVE[0])[0]:
        assert far != {}


def _split_hidden(module: Any, is_sharded: bool) -> Any:
    """Cut the rows of a layer by tensor parallelism, then shard all of it by FSDP2, which gathers over its own ranks only."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    def configure_model() -> None:
        if is_sharded:
            style = ColwiseParallel(output_layouts=Replicate())
            parallelize_module(module, module.device_mesh["tensor_parallel"], {"hidden": style})
            for part in (module.hidden, module):
                fully_shard(part, mesh=module.device_mesh["data_parallel"])

    module.configure_model = configure_model
    return module


def _train_split(which: str, folder: Path) -> Any:
    build: Callable[[], Any] = {"sparse": lambda: _sparse(["hidden"]), "rounded": lambda: _rounded(["hidden"])}[which]

    def run(callbacks: list[Any], is_sharded: bool = True) -> Any:
        module = _split_hidden(make_classifier(optimizer="sgd"), is_sharded)
        # The data-parallel size is 1, so both ranks hold the same samples.
        return fit(callbacks, module, strategy=ModelParallelStrategy(1, 2), devices=2, max_epochs=1)[1]

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # returns a view, because of tensor parallelism
    whole, parts = (run([build(), NormClipping(0.1)], is_sharded) for is_sharded in (False, True))
    with pytest.raises(ValueError, match="Hadamard") as error:
        run([_rounded(["hidden"], quantizer="quest")])
    return differences(whole, parts), str(error.value)


SPLIT = [("sparse",), ("rounded",)]


@pytest.mark.parametrize("case", SPLIT)
def test_tensor_parallelism_as_well(case, together):
    for far, message in together(_train_split, SPLIT, case)[0]:
        assert max([0.0, *far.values()]) < 1e-5
        assert message.startswith("QuantizationAwareTraining cannot work on hidden.weight: a Hadamard transform needs")


TOGETHER = ({_train: WORKS, _resume: RESUMED, _refuse: NAMES, _train_shown_weights: NAIVE, _train_split: SPLIT},)
