"""Checkpoints hold the stored weights, and give the dense ones back bit for bit."""

import copy
import io
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_grad.core.views.portable import (
    decode_residual,
    encode_residual,
    make_dense,
    make_portable,
    pack_bits,
    unpack_bits,
    wrap_loading,
    wrap_saving,
)
from lightning_grad.functional import nm_mask, prune_weight

KEY = "Technique"
FLOATS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Pruned:
    """A view that prunes under the mask of the very values it is given."""

    def value(self, dense: Tensor) -> Tensor:
        return dense * nm_mask(dense, 2, 4)

    def stored(self, dense: Tensor) -> Tensor:
        return prune_weight(dense, nm_mask(dense, 2, 4))


class Everything:
    """A view that changes nothing."""

    def value(self, dense: Tensor) -> Tensor:
        return dense

    def stored(self, dense: Tensor) -> Tensor:
        return dense


def same_bits(one: Tensor, other: Tensor) -> bool:
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    as_ints = FLOATS[one.dtype]
    return torch.equal(one.contiguous().view(as_ints), other.contiguous().view(as_ints))


def awkward(dtype: torch.dtype, shape: tuple[int, ...] = (5, 8)) -> Tensor:
    """Every fourth value is one that ``==`` cannot tell, or cannot find, again."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).flatten()
    special = [float("nan"), -0.0, 0.0, float("inf"), -float("inf"), torch.finfo(dtype).tiny / 2, -float("nan")]
    for index in range(0, values.numel(), 4):
        values[index] = special[index // 4 % len(special)]
    return values.view(shape)


def through_a_file(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Write and read as Lightning does by default."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 1000])
def test_packed_mask_is_one_bit_an_entry_and_comes_back(size: int) -> None:
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) > 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-size // 8),)
    assert torch.equal(unpack_bits(packed, mask), mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32], ids=str)
def test_packed_mask_keeps_shape_and_order_whatever_its_layout(dtype: torch.dtype) -> None:
    mask = (torch.rand(2, 4, 3, 3) > 0.5).to(dtype)
    packed = pack_bits(mask)
    strided = mask.contiguous(memory_format=torch.channels_last)
    assert torch.equal(pack_bits(strided), packed)
    assert torch.equal(unpack_bits(packed, strided), mask.bool())
    assert unpack_bits(packed, mask).shape == mask.shape


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_residual_gives_the_dense_weight_back_bit_for_bit(dtype: torch.dtype) -> None:
    dense = awkward(dtype)
    stored = prune_weight(dense, nm_mask(dense, 2, 4))
    residual = encode_residual(stored, dense)
    restored = decode_residual(stored, residual)
    assert same_bits(restored, dense)
    assert restored.data_ptr() != stored.data_ptr()
    assert set(residual) == {"where", "values"}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_residual_tells_apart_what_equality_does_not(dtype: torch.dtype) -> None:
    zero, negative = torch.zeros(4, dtype=dtype), -torch.zeros(4, dtype=dtype)
    assert torch.equal(zero, negative)
    assert encode_residual(zero, negative)["values"].shape == (4,)
    nan = torch.full((4,), float("nan"), dtype=dtype)
    assert encode_residual(nan, nan.clone()) is None


def test_residual_holds_no_more_than_what_differs() -> None:
    dense = torch.randn(16, 16)
    stored = dense.clone()
    stored[3, 5] = stored[7, 0] = 0.0
    residual = encode_residual(stored, dense)
    assert residual["values"].tolist() == [dense[3, 5].item(), dense[7, 0].item()]
    assert residual["where"].numel() == 32
    assert encode_residual(dense, dense.clone()) is None


def test_residual_of_strided_weights_is_that_of_contiguous_ones() -> None:
    dense = torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last)
    stored = prune_weight(dense, nm_mask(dense, 2, 4))
    assert same_bits(decode_residual(stored.contiguous(), encode_residual(stored, dense)), dense)
    assert same_bits(decode_residual(stored, encode_residual(stored.contiguous(), dense.contiguous())), dense)


# Whole checkpoints.


def checkpoint_of(state: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    return {"epoch": 3, "state_dict": state, "callbacks": {KEY: {"progress": 0.5}}, "loops": {}, **more}


def weights() -> dict[str, Tensor]:
    return {"a.weight": awkward(torch.float32), "a.bias": torch.randn(5), "b.weight": torch.randn(4, 4)}


VIEWS = {"a.weight": Pruned(), "b.weight": Pruned()}


def views_of(dense: dict[str, Tensor]) -> dict[str, tuple[Tensor, Any]]:
    return {key: (dense[key], view) for key, view in VIEWS.items()}


def stored_of(dense: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: VIEWS[key].stored(value) if key in VIEWS else value for key, value in dense.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key in expected:
        assert same_bits(found[key], expected[key]), key


@pytest.mark.parametrize("dense_in_file", [False, True])
def test_checkpoint_becomes_portable_and_dense_again(dense_in_file: bool) -> None:
    dense = weights()
    checkpoint = checkpoint_of(dict(dense) if dense_in_file else stored_of(dense))
    make_portable(checkpoint, KEY, views_of(dense))
    assert_same(checkpoint["state_dict"], stored_of(dense))
    read = through_a_file(checkpoint)
    assert_same(read["state_dict"], stored_of(dense))
    make_dense(read, KEY)
    assert_same(read["state_dict"], dense)
    assert read["epoch"] == 3
    assert read["callbacks"][KEY]["progress"] == 0.5


@pytest.mark.parametrize("current_is_stored", [True, False])
def test_average_is_stored_and_both_it_and_the_current_weights_come_back(current_is_stored: bool) -> None:
    dense, average = weights(), {key: value + 1 for key, value in weights().items()}
    current = stored_of(dense) if current_is_stored else dict(dense)
    checkpoint = checkpoint_of(dict(average), current_model_state=dict(current), averaging_state={"n": torch.tensor(3)})
    make_portable(checkpoint, KEY, views_of(dense))
    assert_same(checkpoint["state_dict"], stored_of(average))
    assert_same(checkpoint["current_model_state"], current)
    read = through_a_file(checkpoint)
    make_dense(read, KEY)
    assert_same(read["state_dict"], average)
    assert_same(read["current_model_state"], dense)
    assert read["averaging_state"]["n"] == 3


def test_making_portable_does_not_change_the_weights_that_train() -> None:
    dense = weights()
    before = copy.deepcopy(dense)
    make_portable(checkpoint_of(dict(dense)), KEY, views_of(dense))
    assert_same(dense, before)


def test_checkpoint_of_weights_only_is_portable_without_a_residual() -> None:
    dense = weights()
    checkpoint = {"state_dict": dict(dense)}
    make_portable(checkpoint, KEY, views_of(dense))
    assert list(checkpoint) == ["state_dict"]
    assert_same(checkpoint["state_dict"], stored_of(dense))
    make_dense(checkpoint, KEY)
    assert_same(checkpoint["state_dict"], stored_of(dense))


@pytest.mark.parametrize("callbacks", [{}, {"Other": {"progress": 0.5}}])
def test_residuals_without_a_state_to_hold_them_are_refused(callbacks: dict[str, Any]) -> None:
    dense = weights()
    checkpoint = {"state_dict": dict(dense), "callbacks": callbacks}
    with pytest.raises(
        RuntimeError,
        match=r"Technique cannot save .*'a.weight', because it has no state.*Technique.state_dict\(\) extend super",
    ):
        make_portable(checkpoint, KEY, views_of(dense))
    make_portable(
        {"state_dict": dict(dense), "callbacks": callbacks}, KEY, {"b.weight": (dense["b.weight"], Everything())}
    )


def test_view_that_changes_nothing_leaves_no_residual() -> None:
    dense = weights()
    checkpoint = checkpoint_of(dict(dense))
    make_portable(checkpoint, KEY, {"a.weight": (dense["a.weight"], Everything())})
    assert checkpoint["callbacks"][KEY]["residuals"] == {}
    assert_same(checkpoint["state_dict"], dense)


def test_other_checkpoints_stay_as_they_are() -> None:
    for callbacks in ({}, {"Other": {"residuals": {"state_dict": {"a.weight": {}}}}}, {KEY: {}}, {KEY: None}):
        state = weights()
        checkpoint = {"state_dict": dict(state), "callbacks": callbacks}
        make_dense(checkpoint, KEY)
        assert_same(checkpoint["state_dict"], state)


def test_residual_of_a_weight_that_is_gone_is_passed_over() -> None:
    dense = weights()
    checkpoint = checkpoint_of(stored_of(dense))
    make_portable(checkpoint, KEY, views_of(dense))
    del checkpoint["state_dict"]["b.weight"]
    make_dense(checkpoint, KEY)
    assert list(checkpoint["state_dict"]) == ["a.weight", "a.bias"]
    assert same_bits(checkpoint["state_dict"]["a.weight"], dense["a.weight"])


def test_two_techniques_keep_their_residuals_apart() -> None:
    dense = weights()
    checkpoint = checkpoint_of(stored_of(dense))
    checkpoint["callbacks"]["Other"] = {}
    views = views_of(dense)
    make_portable(checkpoint, KEY, {"a.weight": views["a.weight"]})
    make_portable(checkpoint, "Other", {"b.weight": views["b.weight"]})
    read = through_a_file(checkpoint)
    make_dense(read, "Other")
    make_dense(read, KEY)
    assert_same(read["state_dict"], dense)


# The module's own hooks.


class Net(pl.LightningModule):
    """Has checkpoint hooks of its own, which write down what they see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = 1

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loading = checkpoint["state_dict"]["layer.weight"].clone()


def test_wrapped_module_saves_portably_loads_dense_and_is_itself_again() -> None:
    module, view = Net(), Pruned()
    dense = module.layer.weight
    undo_saving = wrap_saving(module, KEY, lambda: {"layer.weight": (dense, view)})
    undo_loading = wrap_loading(module, KEY)
    checkpoint = checkpoint_of({key: value.clone() for key, value in module.state_dict().items()})
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["own"] == 1
    assert same_bits(checkpoint["state_dict"]["layer.weight"], view.stored(dense))
    module.on_load_checkpoint(checkpoint)
    assert same_bits(module.loading, view.stored(dense)), "the module's own hook sees what the file holds"
    assert same_bits(checkpoint["state_dict"]["layer.weight"], dense.detach())
    undo_saving()
    undo_loading()
    assert not {"on_save_checkpoint", "on_load_checkpoint"} & module.__dict__.keys()
