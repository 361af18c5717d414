"""NMSparsity and QuantizationAwareTraining on the same weights of one run are exact in both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint

from lightning_grad.callbacks import NMSparsity, QuantizationAwareTraining
from lightning_grad.functional import is_nm, quantize_weight, read_quantized_weight
from lightning_grad.testing import StopAfter, assert_identical, fit, make_classifier, on_ranks, state_of
from lightning_grad.testing.checks.g3_no_trace import assert_nothing_is_left
from lightning_grad.testing.checks.g4_checkpoints import assert_as_validated
from tests.contract.recorded import PLAIN

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]

LAYERS = ["encoder.*", "hidden", "mix.w"]


def sparse(recipe: str = "sr-ste", **arguments: Any) -> NMSparsity:
    return NMSparsity("2:4", recipe, include=LAYERS, figure=False, **arguments)


def quantized(bits: int | None = 8, **arguments: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(bits, **{"include": LAYERS, **arguments})


PAIRS: dict[str, Any] = {
    "2:4 and int8": lambda: [sparse(), quantized()],
    "late": lambda: [sparse("mdgf-exponential"), quantized(4, start=0.4)],
    "annealed, masks every 3": lambda: [
        sparse(mask_every_n_steps=3),
        quantized(2, annealing_start=0.5, annealing_width=0.2),
    ],
}
MAKE = pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)


def end_of(callbacks: list[Any], **arguments: Any) -> dict[str, Any]:
    run, module = fit(callbacks, make_classifier(), resumable=True, **arguments)
    state = {**state_of(run, module), "steps": run.global_step}
    state.pop("random")  # Lightning restores no random state
    return state


@MAKE
def test_a_pair_is_exact_whatever_its_order_and_resumes_bitwise(make: Any, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=7)
    run = {"max_epochs": 3}
    expected = end_of([*make(), saving], **run)
    bits = {"2:4 and int8": 8, "late": 4}.get(next(key for key, value in PAIRS.items() if value is make), 2)
    with pytest.raises(RuntimeError):
        fit([*make(), StopAfter(9), OnExceptionCheckpoint(tmp_path, "stop")], resumable=True, **run)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 3
    # What SR-STE adds after annealing has zeroed the gradients reaches the moments, so that pair keeps its order.
    order = 1 if bits == 2 else -1
    for path in paths:
        assert_identical(expected, end_of(make()[::order], ckpt=path, **run), path.name)
    last = torch.load(sorted(tmp_path.glob("*step=14*"))[0], weights_only=True)
    for name in last["callbacks"]["QuantizationAwareTraining"]["formats"]:
        weight = last["state_dict"][name]
        assert is_nm(weight, 2, 4), name
        assert read_quantized_weight(weight, bits).dequantize().equal(weight), name
        assert max(len(row.unique()) for row in weight) <= 2**bits - 1
        assert float((weight == 0).float().mean()) >= 0.5


@pytest.mark.parametrize("averaged", [False, True])
def test_the_file_computes_what_was_validated(averaged: bool) -> None:
    others = [EMAWeightAveraging(decay=0.8)] if averaged else []
    run = PLAIN.run_and_save([*PAIRS["2:4 and int8"]()[::-1], *others], ["epochs"], copying=False, max_epochs=2)
    assert_as_validated(PLAIN, run.saved("epochs"), run.watch.of)


@pytest.mark.parametrize("how", ["success", "exception"])
def test_nothing_is_left_of_a_pair(how: str) -> None:
    make = PAIRS["annealed, masks every 3"]
    if how == "success":
        assert_nothing_is_left(PLAIN.run(make(), max_epochs=2), PLAIN.bare())
    else:
        assert_nothing_is_left(PLAIN.break_off(make(), how), PLAIN.broken(how))


@pytest.mark.parametrize("quantizer", ["quest", "statsq"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_grid_without_zero_is_refused_with_the_way_out(quantizer: Any, turned: bool) -> None:
    pair = [sparse(), quantized(4, quantizer=quantizer, hadamard=False)]
    words = (
        rf"cannot quantize mix.w with quantizer='{quantizer}', because NMSparsity makes it sparse \(2:4\) and that grid "
        r"has no level 0. Use quantizer='ste', or separate them with include= or exclude="
    )
    with pytest.raises(ValueError, match=words):
        fit(pair[::-1] if turned else pair)
    fit([sparse(), quantized(4)], max_epochs=1)
    fit([sparse(), quantized(4, quantizer=quantizer, include=["head"])], max_epochs=1)
    neutral = NMSparsity("4:4", include=LAYERS, figure=False)
    fit([neutral, quantized(4, quantizer=quantizer)], max_epochs=1)
    naive = quantize_weight(torch.tensor([[0.0, 0.0, 1.0, -2.0]]), 4, quantizer).dequantize()
    assert not is_nm(naive, 2, 4), "why it is refused"


def test_neutral_quantization_leaves_a_sparse_run_as_it_is() -> None:
    assert_identical(end_of([sparse()], max_epochs=2), end_of([quantized(None), sparse()], max_epochs=2))


def _on_this_rank() -> dict[str, torch.Tensor]:
    both = {"include": LAYERS, "activation_bits": 8, "annealing_start": 0.5, "annealing_width": 0.2}
    run, module = fit([sparse(), quantized(4, **both)], strategy="ddp", devices=2, max_epochs=2)
    gap = run.callback_metrics["quant/plain_gap"]
    return {**{name: value.clone() for name, value in module.state_dict().items()}, "gap": gap}


def test_two_ranks_have_the_same_sparse_and_quantized_weights() -> None:
    first, second = on_ranks(2, _on_this_rank)
    weights = [{name: value for name, value in found.items() if "running" not in name} for found in (first, second)]
    assert_identical(*weights)  # running statistics belong to a rank
    assert float(first["gap"]) >= 0.0
    assert is_nm(first["hidden.weight"], 2, 4)
    assert read_quantized_weight(first["hidden.weight"], 4).dequantize().equal(first["hidden.weight"])
