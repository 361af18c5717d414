"""AGC in a fit: zero-initialised weights, and which layer is the head."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_grad.callbacks import AdaptiveGradientClipping
from lightning_grad.functional import clip_adaptively_
from tests.callbacks.clipping import Dictated, Gradients, Regression, pairs, rows_of, rows_with_norms, small_net, train

ALL = ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]


def changed(callback: AdaptiveGradientClipping, module: Any = None) -> list[str]:
    """Return the names of the gradients that were clipped in some step."""
    before, after = Gradients(), Gradients()
    train([before, callback, after], Regression(small_net()) if module is None else module, pairs())
    found = [
        name for a, b in zip(before.seen, after.seen, strict=True) for name in a if not torch.equal(a[name], b[name])
    ]
    return [name for name in before.seen[0] if name in found]


@pytest.mark.parametrize(
    ("arguments", "clipped"),
    [
        ({}, ALL[:2]),
        ({"head": "last Linear"}, ALL[:2]),
        ({"head": None}, ALL),
        ({"head": "net.0"}, ALL[2:]),
        ({"head": "*.bias"}, [ALL[0], ALL[2]]),
        ({"head": "net.2.bias", "exclude": ["net.0"]}, [ALL[2]]),
        ({"include": ["net.2"], "head": None}, ALL[2:]),
    ],
    ids=str,
)
def test_the_head_is_not_clipped(arguments: dict[str, Any], clipped: list[str]) -> None:
    assert changed(AdaptiveGradientClipping(ratio=1e-4, **arguments)) == clipped


def test_the_last_linear_is_found_in_a_compiled_child() -> None:
    module = Regression(small_net())
    module.net[2] = torch.compile(module.net[2], backend=lambda graph, _: graph.forward, disable=True)
    assert changed(AdaptiveGradientClipping(ratio=1e-4), module) == ALL[:2]


def test_a_head_that_does_not_exist_raises() -> None:
    with pytest.raises(
        ValueError, match=r"AdaptiveGradientClipping\(head=...\): no parameter or module is named 'classifier'.*net"
    ):
        train([AdaptiveGradientClipping(head="classifier")], Regression(small_net()), pairs())


def test_no_linear_raises_and_says_what_to_do() -> None:
    rows = rows_of(rows_with_norms([1.0]))
    with pytest.raises(ValueError, match=r"found no Linear. Name it with head='...', or set head=None"):
        train([AdaptiveGradientClipping()], Dictated(), rows)
    train([AdaptiveGradientClipping(head=None)], Dictated(), rows)


def test_nothing_left_to_clip_raises() -> None:
    module = Regression(nn.Sequential(nn.Linear(6, 3)))
    with pytest.raises(ValueError, match=r"nothing to act on besides net.0"):
        train([AdaptiveGradientClipping()], module, pairs())


def test_weights_that_begin_at_zero_train() -> None:
    """Without a least weight norm (as in Composer) they would stay at zero for ever."""
    net = small_net()
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    nn.init.ones_(net[2].weight)  # or no gradient would reach the first layer
    module = Regression(net)
    train([AdaptiveGradientClipping(head=None)], module, pairs())
    # Clipped to ratio * eps, a step of SGD is that times the learning rate.
    assert 0.0 < net[0].bias.norm() <= 6 * 0.05 * 1e-5 * (1 + 1e-4)
    assert (net[0].weight.norm(dim=1) > 0.0).all()
    assert net[2].bias.norm() > 0.0


def test_each_gradient_is_clipped_by_its_weights_as_they_are() -> None:
    before, after, weights = Gradients(), Gradients(), []

    class Weights(Gradients):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    train([before, AdaptiveGradientClipping(0.05, head=None), after, Weights()], Regression(small_net()), pairs())
    for raw, clipped, held in zip(before.seen, after.seen, weights, strict=True):
        gradients = [raw[name] for name in ALL]
        clip_adaptively_(gradients, [held[name] for name in ALL], 0.05)
        assert all(map(torch.equal, gradients, [clipped[name] for name in ALL]))


def test_what_is_logged() -> None:
    module = Dictated()
    callback = AdaptiveGradientClipping(ratio=0.5, eps=0.1, head=None)
    trainer = train([callback], module, rows_of(rows_with_norms([0.2])), log_every_n_steps=1)
    # The weight is zero, so the bound is 0.5 * 0.1, a quarter of the gradient's norm.
    found = {key: value.item() for key, value in trainer.callback_metrics.items()}
    assert found == {"grad/agc/clipped_units": 1.0, "grad/agc/least_coefficient": pytest.approx(0.25)}
