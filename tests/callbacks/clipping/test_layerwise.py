"""Layer-wise clipping and normalization in a fit: what makes a layer, and what is left alone."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_grad.callbacks import LayerwiseClipping, LayerwiseNormalization
from tests.callbacks.clipping import Gradients, Regression, pairs, small_net, train

FIRST, LAST = ["net.0.weight", "net.0.bias"], ["net.2.weight", "net.2.bias"]
BOUND = 1e-2  # far below every layer's gradient


def norms_after(callback: Any, *names: str, module: Any = None) -> list[float]:
    after = Gradients()
    train([callback, after], Regression(small_net()) if module is None else module, pairs())
    return after.norms(*names)


@pytest.mark.parametrize(
    ("arguments", "shares"),
    [
        ({}, {tuple(FIRST): 1 / 2, tuple(LAST): 1 / 2}),
        # 6 * 8 + 8 entries in the first layer, 8 * 3 + 3 in the last.
        ({"weighted": True}, {tuple(FIRST): 56 / 83, tuple(LAST): 27 / 83}),
        ({"per": "parameter"}, {(name,): 1 / 4 for name in [*FIRST, *LAST]}),
        ({"per": "parameter", "weighted": True}, {(FIRST[0],): 48 / 83, (FIRST[1],): 8 / 83, (LAST[1],): 3 / 83}),
        ({"include": ["net.0"]}, {tuple(FIRST): 1.0}),
    ],
    ids=str,
)
def test_each_layer_has_its_share(arguments: dict[str, Any], shares: dict[tuple[str, ...], float]) -> None:
    for names, share in shares.items():
        found = norms_after(LayerwiseClipping(BOUND, **arguments), *names)
        assert found == pytest.approx([BOUND * share**0.5] * 6, rel=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_total_stays_under_the_bound(weighted: bool) -> None:
    norms = norms_after(LayerwiseClipping(BOUND, weighted))
    assert all(0.99 * BOUND < norm <= BOUND * (1 + 1e-6) for norm in norms)


def test_a_layer_under_its_share_is_left_alone() -> None:
    before, after = Gradients(), Gradients()
    patterns = {"net.0": BOUND, "net.2": 1e3}
    train([before, LayerwiseClipping(patterns), after], Regression(small_net()), pairs())
    for raw, clipped in zip(before.seen, after.seen, strict=True):
        assert all(torch.equal(raw[name], clipped[name]) for name in LAST)
    assert after.norms(*FIRST) == pytest.approx([BOUND] * 6, rel=1e-3)


def wide_net() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 3))


def test_a_second_fit_of_another_module_has_its_own_shares() -> None:
    callback = LayerwiseClipping(BOUND, weighted=True)
    norms_after(callback)
    # 6 * 2 + 2 entries and 2 * 3 + 3, under the same names as before.
    found = norms_after(callback, *FIRST, module=Regression(wide_net()))
    assert found == pytest.approx([BOUND * (14 / 23) ** 0.5] * 6, rel=1e-3)


@pytest.mark.parametrize("limit", ["norm", "clipped_layers", "clipped_share"])
def test_what_layerwise_clipping_logs(limit: str) -> None:
    before = Gradients()
    callbacks = [before, LayerwiseClipping({"net.0": BOUND, "net.2": 1e3})]
    trainer = train(callbacks, Regression(small_net()), pairs(), log_every_n_steps=1)
    found = {key: value.item() for key, value in trainer.callback_metrics.items() if f"/{limit}/" in key}
    expected = {
        "norm": (before.norms(*FIRST)[-1], before.norms(*LAST)[-1]),
        "clipped_layers": (1.0, 0.0),
        "clipped_share": (1.0, 0.0),
    }[limit]
    names = [f"grad_layers/layerwise_clipping/{limit}/net.{i}" for i in (0, 2)]
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in zip(names, expected, strict=True)}


# Normalization.


def test_gradients_get_the_norm_of_their_weights_and_vectors_stay() -> None:
    before, after = Gradients(), Gradients()
    weights: list[dict[str, float]] = []

    class Weights(Gradients):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            weights.append({name: p.detach().norm().item() for name, p in pl_module.named_parameters()})

    train([before, LayerwiseNormalization(0.1), after, Weights()], Regression(small_net()), pairs())
    for name in (FIRST[0], LAST[0]):
        assert after.norms(name) == pytest.approx([0.1 * held[name] for held in weights], rel=1e-5)
    for raw, normal in zip(before.seen, after.seen, strict=True):
        assert all(torch.equal(raw[name], normal[name]) for name in (FIRST[1], LAST[1]))


@pytest.mark.parametrize("per", ["module", "parameter"])
def test_vectors_are_normalised_on_request(per: str) -> None:
    net = small_net()
    callback = LayerwiseNormalization(0.1, vectors=True, per=per)
    start = {f"net.{name}": p.detach().clone() for name, p in net.named_parameters()}
    after = Gradients()
    train([callback, after], Regression(net), pairs(1))
    layers = [FIRST, LAST] if per == "module" else [[name] for name in [*FIRST, *LAST]]
    for names in layers:
        size = torch.cat([start[name].flatten() for name in names]).norm().item()
        assert after.norms(*names) == pytest.approx([0.1 * size], rel=1e-5)


def test_layers_that_begin_at_zero_train() -> None:
    net = small_net()
    nn.init.zeros_(net[2].weight)
    before, after = Gradients(), Gradients()
    train([before, LayerwiseNormalization(0.1), after], Regression(net), pairs(1))
    assert torch.equal(before.seen[0][LAST[0]], after.seen[0][LAST[0]])
    assert net[2].weight.norm() > 0.0


def test_the_largest_factor_is_bounded() -> None:
    before, after = Gradients(), Gradients()
    trainer = train(
        [before, LayerwiseNormalization(1e3, max_ratio=2.0), after],
        Regression(small_net()),
        pairs(),
        log_every_n_steps=1,
    )
    for name in (FIRST[0], LAST[0]):
        assert after.norms(name) == pytest.approx([2.0 * norm for norm in before.norms(name)], rel=1e-5)
    found = {key.rpartition("/")[2]: value.item() for key, value in trainer.callback_metrics.items()}
    assert found["least_factor"] == found["largest_factor"] == 2.0
    assert found["norm"] == pytest.approx(before.norms(FIRST[0], LAST[0])[-1], rel=1e-5)
