"""Where the outputs of a layer lie is what the layer does, not what it is called or how its weight is shaped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.utilities.weight_axes import multiplies_by, output_dimension, output_dimensions
from tests.cases import cases
from tests.functional.ranks import on_two_ranks
from tests.sharded import on_cpus


class Layer(nn.Module):
    """A layer of another package: ``product`` says what it does with its weight."""

    def __init__(
        self, product: Any, *shape: int, init: Any = nn.init.normal_, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.product = product
        self.weight = nn.Parameter(init(torch.empty(*shape, dtype=dtype)))
        self.bias = nn.Parameter(torch.ones(1, dtype=dtype))
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.calls: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x.shape)
        self.count += 1
        return self.dropout(self.product(x, self.weight)) + self.bias


PRODUCTS: list[tuple[Any, int | None]] = [
    (lambda x, w: x @ w.t(), 0),
    (lambda x, w: x @ w, 1),
    (F.linear, 0),
    (lambda x, w: torch.einsum("...i,io->...o", x, w), 1),
    (lambda x, w: torch.addmm(x.new_zeros(w.shape[1]), x.view(-1, x.shape[-1]), w).view(*x.shape[:-1], -1), 1),
    (lambda x, w: 0.5 * F.linear(x, w), 0),
    (lambda x, w: torch.cdist(x, w), None),
    (lambda x, w: x + w[: x.shape[0], : x.shape[1]], None),
    (lambda x, w: (x @ w.t()).relu(), None),
    (lambda x, w: x @ (w + w.t()), None),
]


@pytest.mark.parametrize("init", [nn.init.normal_, nn.init.zeros_, nn.init.eye_], ids=["random", "zero", "symmetric"])
@pytest.mark.parametrize(("product", "dimension"), PRODUCTS)
def test_the_product_decides_for_square_weights(product: Any, dimension: int | None, init: Any) -> None:
    layer = Layer(product, 6, 6, init=init)
    assert output_dimension(layer, "weight") == dimension
    assert multiplies_by(layer, "weight") == (dimension is not None)


@cases(("product", "dimension"), PRODUCTS[:6])
@cases("dtype", [torch.float32, torch.float64, torch.bfloat16])
@cases("shape", [(8, 3), (3, 8), (1, 4), (64, 64)])
def test_every_shape_and_type(product: Any, dimension: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    assert output_dimension(Layer(product, *shape, dtype=dtype), "weight") == dimension


def test_it_leaves_no_trace() -> None:
    layer = Layer(lambda x, w: x @ w, 6, 6)
    layer.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    before, weight = {key: value.clone() for key, value in layer.state_dict().items()}, layer.weight
    state = torch.get_rng_state()
    assert output_dimension(layer, "weight") == 1
    assert torch.equal(state, torch.get_rng_state())
    assert layer.weight is weight
    assert layer.calls == []
    assert layer.training
    assert layer.dropout.training
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_sequences_only() -> None:
    class Sequences(Layer):
        def forward(self, x: Tensor) -> Tensor:
            batch, _, width = x.shape
            return (x.reshape(-1, width) @ self.weight).view(batch, -1, self.weight.shape[1])

    assert output_dimension(Sequences(None, 6, 6), "weight") == 1


def test_layers_of_torch_and_what_is_derived_from_them() -> None:
    class Named(nn.Linear):
        """Only named otherwise."""

    class Transposed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    class TwoInputs(nn.Linear):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.linear(x + y, self.weight)

    layers = [nn.Linear(4, 4), Named(4, 4), Transposed(4, 4), TwoInputs(4, 4), nn.Embedding(4, 4), nn.Conv1d(4, 4, 1)]
    assert [output_dimension(layer, "weight") for layer in layers] == [0, 0, 1, 0, 0, 0]
    assert [multiplies_by(layer, "weight") for layer in layers] == [True, True, True, True, False, False]


def test_what_cannot_be_told_is_named() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return edges @ x @ self.weight

    module = nn.ModuleDict({"graph": Graph(), "out": Layer(lambda x, w: x @ w, 4, 4), "linear": nn.Linear(4, 4)})
    second, unknown = output_dimensions(module)
    assert second == {id(module["out"].weight): 1}
    assert unknown == ["graph.weight"]


def test_a_tied_weight_that_is_used_both_ways_cannot_be_told() -> None:
    module = nn.ModuleDict({"a": Layer(lambda x, w: x @ w, 4, 4), "b": nn.Linear(4, 4)})
    module["b"].weight = module["a"].weight
    assert output_dimensions(module) == ({}, ["a.weight"])
    embedding = nn.ModuleDict({"a": nn.Embedding(4, 4), "b": Layer(lambda x, w: x @ w, 4, 4)})
    embedding["b"].weight = embedding["a"].weight
    assert output_dimensions(embedding) == ({id(embedding["a"].weight): 1}, [])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_layer_is_asked_without_compiling() -> None:
    layer = Layer(lambda x, w: x @ w, 4, 4)
    compiled = torch.compile(layer, backend=lambda graph, _: pytest.fail("it was compiled"))
    assert output_dimension(compiled._orig_mod, "weight") == 1


def _find_under_fully_shard(rank: int, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for product, dimension in ((lambda x, w: x @ w.t(), 0), (lambda x, w: x @ w, 1)):
        layer = Layer(product, 4, 4)
        fully_shard(layer, mesh=mesh)
        sharded = list(layer.parameters())
        before = [parameter.full_tensor() for parameter in sharded]  # type: ignore[attr-defined]
        assert output_dimension(layer, "weight") == dimension
        assert (layer.calls, int(layer.count)) == ([], 0)
        assert all(one is other for one, other in zip(layer.parameters(), sharded, strict=True))
        assert all(torch.equal(p.full_tensor(), was) for p, was in zip(sharded, before, strict=True))  # type: ignore[attr-defined]


@on_cpus
def test_a_sharded_layer_is_run_as_one_of_its_own_class() -> None:
    """``fully_shard`` forbids copies of a layer: its layout would be unknown, and x W taken for x W^T."""
    on_two_ranks(_find_under_fully_shard)
