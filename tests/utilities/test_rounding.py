from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_grad.functional import mse_scales, quantize_weight
from lightning_grad.utilities import round_weights
from lightning_grad.utilities.reconstruction import Reconstruction
from lightning_grad.utilities.rounding import show_values
from lightning_grad.utilities.rounding_units import RoundableWeight, called_modules, find_units
from lightning_grad.utilities.unit_error import UnitError, record_calls


class Attention(nn.Module):
    """Layers of many kinds: one called twice, one never, a tied one, and an activation that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.twice = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.twice.weight
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.grouped(self.conv(images))).flatten(2).mT
        x = self.encoder(x)
        return self.head(self.tied(self.twice(F.gelu(self.twice(x)))).mean(1))  # type: ignore[no-any-return]


INCLUDE = ["conv", "grouped", "encoder", "twice", "unused", "head"]


@pytest.fixture(scope="module")
def rounded() -> tuple[Attention, Attention, list[Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    net = Attention().train()
    batches = [torch.randn(16, 1, 8, 8) for _ in range(4)]
    for batch in batches:
        net(batch)
    before = copy.deepcopy(net)
    stream = torch.get_rng_state()
    report = round_weights(net, batches, bits=3, include=INCLUDE, steps=60, verbose=False)
    assert torch.equal(torch.get_rng_state(), stream)
    return before, net, batches, report


def test_every_kind_of_layer_is_rounded_to_its_grid(rounded: Any) -> None:
    before, net, _, report = rounded
    names = {"conv.0", "grouped", "encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2", "twice", "unused"}
    expected = {f"{name}.weight" for name in (*names, "head")} | {"encoder.self_attn.in_proj_weight"}
    assert report.keys() == expected
    for name, quantized in report.items():
        weight = net.get_parameter(name)
        assert torch.equal(quantized.dequantize(), weight)
        assert max(len(row.unique()) for row in weight.flatten(1)) <= 7
        assert not torch.equal(weight, before.get_parameter(name))
    others = net.state_dict().keys() - report.keys() - {"tied.weight"}
    assert all(torch.equal(net.state_dict()[name], before.state_dict()[name]) for name in others)


def test_the_module_is_as_before_except_for_its_weights(rounded: Any) -> None:
    before, net, *_ = rounded
    assert net.twice.weight is net.tied.weight
    assert all(module.training for module in net.modules())
    assert [vars(module).keys() for module in net.modules()] == [vars(module).keys() for module in before.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_the_output_is_closer_than_with_nearest_rounding(rounded: Any) -> None:
    before, net, batches, report = rounded
    nearest = copy.deepcopy(before)
    for name in report:
        weight = nearest.get_parameter(name)
        weight.data = quantize_weight(weight, 3, scales=mse_scales(weight, 3)).dequantize()
    errors = []
    with torch.no_grad():
        for each in (net, nearest):
            outputs = [(each.eval()(batch) - before.eval()(batch)).square().mean() for batch in batches]
            errors.append(torch.stack(outputs).mean())
            each.train()
        before.train()
    assert errors[0] < 0.5 * errors[1]
    assert torch.equal(net.unused.weight, nearest.unused.weight), "no output tells how to round it"


def units_of(
    net: nn.Module, batches: list[Tensor], names: list[str], blocks: tuple[str, ...] = (), **settings: Any
) -> Any:
    runs = [lambda batch=batch: net(batch) for batch in batches]
    weights = []
    for name in names:
        owner, attribute = net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        show = lambda value, uses=[(owner, attribute)]: show_values(uses, value)  # noqa: E731
        weights.append(RoundableWeight(name, net.get_parameter(name).detach(), [owner], show, bits=2))
    units, unused = find_units(net, weights, called_modules(net, runs[0]), blocks)
    return list(Reconstruction(units, runs, **settings)), unused


def test_units_are_layers_in_the_order_of_the_forward_pass_or_blocks(rounded: Any) -> None:
    net, _, batches, report = rounded
    net = copy.deepcopy(net).eval()
    results, unused = units_of(net, batches, sorted(report), steps=0)
    assert [each.name for each in results] == [
        "conv.0",
        "grouped",
        "encoder.self_attn",  # for both of its projections
        "encoder.linear1",
        "encoder.linear2",
        "twice",
        "head",
    ]
    assert [weight.name for weight in unused] == ["unused.weight"]
    blocks, _ = units_of(net, batches, sorted(report), blocks=("encoder", "co*"), steps=0)
    assert [(each.name, len(each.weights)) for each in blocks][:3] == [("conv", 1), ("grouped", 1), ("encoder", 4)]


def test_a_block_is_rounded_by_its_own_output(rounded: Any) -> None:
    net, _, batches, report = rounded
    net = copy.deepcopy(net).eval()
    names = [name for name in report if name.startswith("encoder")]
    (whole,), _ = units_of(net, batches, names, blocks=("encoder",), steps=500)
    assert whole.relative_error < 0.95
    parts, _ = units_of(net, batches, names, steps=60)
    assert all(each.relative_error < 1 for each in parts)
    assert len(parts) == 3


@pytest.mark.parametrize("name", ["grouped.weight", "encoder.linear1.weight"])
def test_flips_improve_convolutions_and_linear_layers(rounded: Any, name: str) -> None:
    net, _, batches, _ = rounded
    net = copy.deepcopy(net).eval()
    errors = [units_of(net, batches, [name], steps=20, flips=flips)[0][0].relative_error for flips in (False, True)]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("name", ["conv.0", "grouped", "encoder.linear1"])
def test_the_columns_of_a_layer_give_its_output(rounded: Any, name: str) -> None:
    net, _, batches, _ = rounded
    net = copy.deepcopy(net).eval()
    runs = [lambda: net(batches[0])]
    layer = net.get_submodule(name)
    weight = RoundableWeight(f"{name}.weight", layer.weight.detach(), [layer], lambda value: None, bits=3)
    (unit,), _ = find_units(net, [weight], called_modules(net, runs[0]))
    with torch.no_grad():
        calls = record_calls(layer, runs)
        error = UnitError(unit, calls, calls)
        columns, zero = error._columns(0), torch.zeros_like(weight.weight)
        by_group = weight.weight.reshape(len(columns), -1, columns.shape[-1])
        products = (columns @ by_group.mT).transpose(0, 1).flatten(1)
        weight.show = lambda value: show_values([(layer, "weight")], value)
        residual = error._residual(zero, 0)
    torch.testing.assert_close(products, -residual)


def test_a_layer_sees_the_inputs_of_the_rounded_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 4))
    batch = torch.randn(64, 4)
    net.requires_grad_(False)
    (first, second), _ = units_of(net, [batch], ["0.weight", "1.weight"], steps=100)
    inputs = F.linear(batch, first.values[0], net[0].bias)
    error = (F.linear(inputs, second.values[0], net[1].bias) - net(batch)).square().mean()
    assert second.found.error == pytest.approx(float(error), rel=1e-4)


def test_outliers_keep_their_values() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    batches = [(torch.randn(8, 8), torch.randint(2, (8,))) for _ in range(2)]

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    dense = net[2].weight.detach().clone()
    report = round_weights(net, batches, 2, steps=20, outliers=0.05, loss=loss, verbose=False)
    kept = report["2.weight"].kept  # type: ignore[attr-defined]
    assert kept.sum() == int(0.05 * 256)
    assert torch.equal(net[2].weight[kept], dense[kept])
    assert torch.equal(report["2.weight"].dequantize(), net[2].weight)
    assert net[2].weight.grad is None
    with pytest.raises(ValueError, match="needs gradients"):
        round_weights(net, batches, 2, outliers=0.05, verbose=False)


def test_a_mixture_whose_routing_changes() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.expert = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.gate(x)
            return self.expert(x[x[:, 0] > 0])  # type: ignore[no-any-return]

    torch.manual_seed(3)
    net, batch = Routed(), torch.randn(64, 4)
    results, _ = units_of(net, [batch], ["gate.weight", "expert.weight"], steps=20)
    assert all(each.relative_error <= 1 for each in results)


def test_clear_errors() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    batches = [torch.randn(2, 4)]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"bits": 1}, "Use 2 bits"),
        ({"bits": 9}, "from 1 to 8"),
        ({"include": ["1.weigth"]}, "no parameter or module"),
        ({"exclude": ["1"]}, "found no weight to round"),
        ({"blocks": ["7"]}, "contains no weight"),
        ({"outliers": 2.0}, "outliers must be from 0 to 1"),
        ({"steps": -1}, "steps must be at least 0"),
    ]
    for wrong, words in cases:
        with pytest.raises(ValueError, match=words):
            round_weights(net, batches, verbose=False, **wrong)
    with pytest.raises(ValueError, match="got none"):
        round_weights(net, [], verbose=False)
    assert all(module.training for module in net.modules())


def test_it_shows_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    round_weights(net, [{"input": torch.randn(8, 4)}], bits=3, steps=5)
    table = capsys.readouterr().out
    assert "error / nearest" in table
    assert "\n1 " in table
