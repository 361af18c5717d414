"""A technique of an author on the base of adapters: factors in place of a weight, and scales next to one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.core import Adapter, AdapterCallback, FoundWeight
from lightning_grad.testing import assert_identical, check_callback, fit, make_classifier, make_data


class Scales(Adapter):
    """A factor for each output of a frozen weight."""

    def start(self) -> Mapping[str, Tensor]:
        return {"scales": self.frozen.new_ones(len(self.frozen))}

    def merged(self, weight: Tensor) -> Tensor:
        return weight * self.own["scales"][:, None]


class TrainScales(AdapterCallback[Scales]):
    """Trains a factor for each output."""

    namespace: ClassVar[str] = "scales"

    def adapter(self, found: FoundWeight) -> Scales | str:
        return "not a matrix" if found.parameter.ndim != 2 else Scales(found)


class Product(Adapter):
    """The product of two factors in place of a weight."""

    keeps_weight = False

    def __init__(self, found: FoundWeight, rank: int) -> None:
        super().__init__(found)
        self.rank = rank

    def start(self) -> Mapping[str, Tensor]:
        u, s, vh = torch.linalg.svd(self.frozen.detach(), full_matrices=False)
        return {"U": u[:, : self.rank] * s[: self.rank], "V": vh[: self.rank].clone()}

    def merged(self, weight: Tensor) -> Tensor:
        return self.own["U"] @ self.own["V"]

    def output(self, x: Tensor, frozen: Callable[[Tensor], Tensor]) -> Tensor:
        layer: Any = self.layer
        return F.linear(F.linear(x, self.own["V"]), self.own["U"], layer.bias)


class TrainProducts(AdapterCallback[Product]):
    """Trains the factors of each weight."""

    namespace: ClassVar[str] = "products"

    def adapter(self, found: FoundWeight) -> Product | str:
        return Product(found, 3) if found.parameter.ndim == 2 else "not a matrix"


KINDS = pytest.mark.parametrize("kind", [TrainScales, TrainProducts])


@KINDS
def test_guarantees(kind: Any) -> None:
    check_callback(kind, level="quick", raises=True)


@KINDS
def test_validation_checkpoint_and_module_have_the_same_weights(kind: Any, tmp_path: Any) -> None:
    _, module = fit([kind(), ModelCheckpoint(tmp_path, "last")])
    plain = make_classifier()
    plain.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], strict=True)
    assert_identical(dict(plain.state_dict()), dict(module.state_dict()))
    x = make_data(1).tensors[0]
    with torch.no_grad():
        assert torch.equal(plain.eval()(x[:8]), module.validated[0])


def test_parameters_are_contiguous() -> None:
    """The factors of an SVD are not, and LBFGS and fused kernels need it."""

    class Note(TrainProducts):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            assert all(value.is_contiguous() for adapter in self.adapters for value in adapter.own.values())

    fit([Note()], max_epochs=1)


def test_scales_scale() -> None:
    _, module = fit([TrainScales(include=["hidden"])])
    ratio = module.hidden.weight.detach() / make_classifier().hidden.weight.detach()
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), atol=1e-4)
    assert float(ratio.std()) > 1e-3


def test_a_weight_that_is_not_kept_takes_no_memory() -> None:
    sizes: list[int] = []

    class Note(TrainProducts):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_start(trainer, pl_module, *args)
            sizes.append(sum(adapter.frozen.untyped_storage().nbytes() for adapter in self.adapters))

    _, module = fit([Note()])
    assert set(sizes) == {0}
    assert module.hidden.weight.shape == (32, 16)
    assert int(torch.linalg.matrix_rank(module.hidden.weight, atol=1e-5)) == 3


@KINDS
def test_a_copy_in_a_fit_is_a_plain_module(kind: Any) -> None:
    class Note(kind):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            twin = copy.deepcopy(pl_module)
            assert type(twin.hidden) is nn.Linear
            assert list(twin.state_dict()) == list(dict(pl_module.state_dict()))
            assert_identical(dict(twin.state_dict()), dict(pl_module.state_dict()))

    fit([Note()], max_epochs=1)


def test_loading_weights_in_a_fit_replaces_the_frozen_ones() -> None:
    class Loads(TrainScales):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.load_state_dict({name: value * 2 for name, value in pl_module.state_dict().items()}, strict=True)

    _, module = fit([Loads(include=["hidden"])], max_steps=1)
    start = make_classifier()
    ratio = module.hidden.weight.detach() / start.hidden.weight.detach()
    assert 1.8 < float(ratio.mean()) < 2.2


def test_a_technique_must_define_its_methods() -> None:
    with pytest.raises(NotImplementedError, match=r"must define adapter\(found\)"):
        fit([AdapterCallback()])
