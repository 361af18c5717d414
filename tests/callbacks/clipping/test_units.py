"""Neurons are where the layer has its outputs, for AGC and centralization, and the head is what the batch reaches last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.callbacks import AdaptiveGradientClipping, GradientCentralization
from lightning_grad.functional import centralize_, clip_adaptively_
from tests.callbacks.clipping import Gradients, Regression, pairs, train
from tests.callbacks.sparsity.test_nm_choice import Backwards, Distances, Gan, InOut, OutIn, Split
from tests.callbacks.sparsity.test_nm_sparsity import data

TECHNIQUES = [
    (AdaptiveGradientClipping, {"ratio": 1e-3, "head": None}),
    (GradientCentralization, {}),
]


def net(kind: Any, width: int = 6) -> nn.Sequential:
    torch.manual_seed(3)
    middle = kind(width, width)
    torch.manual_seed(4)
    start = torch.randn(width, width)
    middle.weight.data.copy_(start.t() if kind is InOut else start)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), middle, nn.Linear(width, 3))


def changes(callback: Any, module: Any, loader: Any = None) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Return the gradients of every step after the technique, and the names of those that it changed in some step."""
    before, after = Gradients(), Gradients()
    train([before, callback, after], module, pairs() if loader is None else loader)
    pairs_of = [(a[n], b[n], n) for a, b in zip(before.seen, after.seen, strict=True) for n in a]
    return after.seen, sorted({name for a, b, name in pairs_of if not torch.equal(a, b)})


@pytest.mark.parametrize(("technique", "arguments"), TECHNIQUES)
def test_a_square_weight_in_out_is_treated_as_its_transpose(technique: Any, arguments: Any) -> None:
    found = {kind: changes(technique(**arguments), Regression(net(kind)))[0] for kind in (InOut, OutIn)}
    for transposed, plain in zip(found[InOut], found[OutIn], strict=True):
        for name, gradient in plain.items():
            other = transposed[name].t() if name == "net.2.weight" else transposed[name]
            torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("technique", "arguments"), TECHNIQUES)
def test_what_is_no_product_is_left_alone_and_named(technique: Any, arguments: Any, caplog: Any) -> None:
    with caplog.at_level("INFO"):
        _, changed = changes(technique(**arguments), Regression(net(Distances)))
    assert "net.2.weight" not in changed
    assert "net.0.weight" in changed
    assert any("ignores net.2.weight," in r.message and "in include=" in r.message for r in caplog.records)
    _, changed = changes(technique(**arguments, include=["*", "net.2.weight"]), Regression(net(Distances)))
    assert "net.2.weight" in changed, "who spells its name takes its first dimension for the neurons"


def test_rules_take_the_dimension_of_the_outputs() -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(3, 4), torch.randn(3, 4)
    plain, other = gradient.clone(), gradient.t().clone()
    (first,) = clip_adaptively_([plain], [weight], 0.01)
    (second,) = clip_adaptively_([other], [weight.t()], 0.01, output_dims=[1])
    assert second.shape == (1, 3)
    torch.testing.assert_close(first, second.t())
    torch.testing.assert_close(plain, other.t())
    plain, other = gradient.clone(), gradient.t().clone()
    centralize_([plain])
    centralize_([other], output_dims=[1])
    torch.testing.assert_close(plain, other.t())


# The head.


class Linear2(nn.Module):
    """A linear layer of a package of its own, as graph libraries have."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def test_a_head_of_another_package_is_found() -> None:
    module = Regression(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Linear2(8, 3)))
    assert changes(AdaptiveGradientClipping(1e-4), module)[1] == ["net.0.bias", "net.0.weight"]


def test_the_batch_decides_which_layer_is_the_last(caplog: Any) -> None:
    with caplog.at_level("INFO"):
        _, changed = changes(AdaptiveGradientClipping(1e-4), Regression(Backwards()), data())
    assert not [name for name in changed if name.startswith("net.last")]
    assert "net.late.weight" in changed, "the last one registered"
    said = [record.message for record in caplog.records if "reaches" in record.message]
    assert said == ["AdaptiveGradientClipping does not clip net.last, because the batch reaches it last."]


@pytest.mark.parametrize(("kind", "heads"), [(Gan, {"G.2", "D.2"}), (Split, {"D.2"})])
def test_each_network_has_its_own_head(kind: Any, heads: set[str]) -> None:
    module = kind()
    _, changed = changes(AdaptiveGradientClipping(1e-6), module, data())
    assert {name.rpartition(".")[0] for name, _ in module.named_parameters()} - {
        name.rpartition(".")[0] for name in changed
    } == heads


def test_accumulated_steps_and_heads_without_a_call() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.attention = nn.Linear(6, 3), nn.MultiheadAttention(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x)[0])

    before, after = Gradients(), Gradients()
    callbacks = [before, AdaptiveGradientClipping(1e-6), after]
    train(callbacks, Regression(Attends()), pairs(), accumulate_grad_batches=3)
    changed = {n for a, b in zip(before.seen, after.seen, strict=True) for n in a if not torch.equal(a[n], b[n])}
    assert "net.attention.out_proj.weight" in changed, "torch computes with it without a call; it was registered last"
    assert not [name for name in changed if name.startswith("net.head")]


def test_a_single_linear_is_the_head_and_the_message_says_how_to_clip_it() -> None:
    module = Regression(nn.Sequential(nn.Linear(6, 3)))
    with pytest.raises(ValueError, match=r"nothing to act on besides net.0, .*Set head=None"):
        train([AdaptiveGradientClipping()], module, pairs())
    assert changes(AdaptiveGradientClipping(1e-4, head=None), module)[1] == ["net.0.bias", "net.0.weight"]
