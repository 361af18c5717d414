"""Deep Gradient Compression against DDP, against the algorithm written out by hand, and against the sums of gradients."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn import functional as F

from lightning_grad.functional.communication.sparse_messages import pairs_bytes
from lightning_grad.functional.communication.wire import kept_count
from lightning_grad.testing import on_ranks
from tests.strategies.ranks import (
    BATCH,
    BATCHES,
    Result,
    Task,
    assert_close,
    assert_same,
    dgc,
    fit,
    one_cycle,
    samples,
    small_net,
)

LARGE = ["0.weight", "2.weight"]
MOMENTUM = {"momentum": 0.9}
ALL = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True, "cycle": True}

# What differs from dgc(), Task() and Trainer(): the strategy, the optimizer, the Trainer, and DDP's own options.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "error feedback": ({}, {}, {}, {}),
    "momentum": ({}, MOMENTUM, {}, {}),
    "momentum, not masked": ({"momentum_masking": False}, MOMENTUM, {}, {}),
    "decay without momentum": ({}, {"weight_decay": 1e-2}, {}, {}),
    "nesterov, decay, schedule": ({}, ALL, {}, {}),
    "nesterov, decay, schedule, not masked": ({"momentum_masking": False}, ALL, {}, {}),
    "warm-up by epochs": ({"warmup": [0.5]}, MOMENTUM, {}, {}),
    "warm-up by steps": ({"warmup": [0.5, 0.1], "warmup_steps": 4}, MOMENTUM, {}, {}),
    "shares by layer": ({"layer_ratios": {"net.2": 0.5}}, MOMENTUM, {}, {}),
    "clipped": ({"local_clip": 0.1}, MOMENTUM, {}, {}),
    "float16": ({"value_dtype": "float16"}, {}, {}, {}),
    "bfloat16": ({"value_dtype": "bfloat16"}, {}, {}, {}),
    "bfloat16 with momentum": ({"value_dtype": "bfloat16"}, MOMENTUM, {}, {}),
    "sampled": ({"selector": "sampled"}, {}, {}, {}),
    "chunk": ({"selector": "chunk"}, {}, {}, {}),
    "chunk, an odd share": ({"selector": "chunk", "ratio": 0.6}, {}, {}, {}),
    "buckets as views": ({"gradient_as_bucket_view": True}, {}, {}, {}),
    "static graph": ({"static_graph": True}, {}, {}, {}),
    "accumulation": ({}, {}, {"accumulate_grad_batches": 2}, {}),
    "many buckets": ({}, {}, {}, {"bucket_cap_mb": 1e-4}),
    "all options": (
        {"gradient_as_bucket_view": True, "value_dtype": "float16"},
        MOMENTUM,
        {"accumulate_grad_batches": 2},
        {"bucket_cap_mb": 1e-4},
    ),
}
ON_TWO = list(CASES)
ON_THREE = ["error feedback", "nesterov, decay, schedule", "sampled", "chunk", "clipped", "float16", "many buckets"]
ON_FOUR = ["nesterov, decay, schedule", "sampled", "chunk"]
ON_ONE = ["error feedback", "nesterov, decay, schedule", "clipped"]
PLACES = [(1, case) for case in ON_ONE] + [(2, case) for case in ON_TWO] + [(3, case) for case in ON_THREE]
PLACES += [(4, case) for case in ON_FOUR]


def epochs_of(case: str) -> int:
    """Return two epochs where something happens at the end of one, or where steps are few."""
    options, _, trainer, _ = CASES[case]
    return 2 if "warmup" in options or trainer else 1


def run(case: str) -> Result:
    strategy_options, optimizer, trainer, ddp = CASES[case]
    strategy = dgc(**strategy_options)
    strategy._ddp_kwargs.update(ddp)
    return fit(strategy, Task(**optimizer), epochs=epochs_of(case), precision="64-true", **trainer)


def by_hand(case: str, ranks: int) -> Result:
    """Return what a loop over ranks in one process gives, written from the paper's equations."""
    options, optimizer, trainer, _ = CASES[case]
    options = {"ratio": 0.05, "warmup": [], "momentum_masking": True, "layer_ratios": {}, **options}
    accumulate = trainer.get("accumulate_grad_batches", 1)
    net = small_net().double()
    weights = dict(net.named_parameters())
    # The optimizer moves small tensors; of the others it only tells the rate, momentum and decay of the moment.
    settings = {"lr": 0.1, **{key: value for key, value in optimizer.items() if key != "cycle"}}
    sgd = torch.optim.SGD([p for name, p in weights.items() if name not in LARGE], **settings)
    schedule = one_cycle(sgd) if optimizer.get("cycle") else None
    unsent = [{name: torch.zeros(weights[name].numel()).double() for name in LARGE} for _ in range(ranks)]
    velocity = [{name: torch.zeros(weights[name].numel()).double() for name in LARGE} for _ in range(ranks)]
    decayed: dict[str, Tensor] = {}
    x, y = samples()
    batches = list(zip(x.double().split(BATCH), y.split(BATCH), strict=True)) * epochs_of(case)
    for step in range(len(batches) // accumulate):
        group = sgd.param_groups[0]
        position = step * accumulate // BATCHES if "warmup_steps" not in options else step // options["warmup_steps"]
        gradients = []
        for rank in range(ranks):
            parts = [[half.chunk(ranks)[rank] for half in batch] for batch in batches[step * accumulate :][:accumulate]]
            loss = sum(F.cross_entropy(net(x), y) / accumulate for x, y in parts)
            gradients.append(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)))
            if "local_clip" in options:
                norm = torch.cat([g.flatten() for g in gradients[-1].values()]).norm()
                scale = (options["local_clip"] * math.sqrt(ranks) / (norm + 1e-6)).clamp(max=1.0)
                gradients[-1] = {name: g * scale for name, g in gradients[-1].items()}
        for name, weight in weights.items():
            if name not in LARGE:
                weight.grad = sum(g[name] for g in gradients) / ranks
                continue
            share = next((s for layer, s in options["layer_ratios"].items() if f"net.{name}".startswith(layer)), None)
            ratio = options["ratio"] if share is None else share
            warmup = options["warmup"]
            density = max(warmup[position], ratio) if position < len(warmup) else ratio
            total = torch.zeros(weight.numel()).double()
            for rank in range(ranks):
                u, v, g = velocity[rank][name], unsent[rank][name], gradients[rank][name].flatten()
                u.mul_(group["momentum"]).add_(g)
                v.add_(g + group["momentum"] * u if group["nesterov"] else u)
                chosen = largest(v, math.ceil(density * len(v) - 1e-9), options.get("selector") == "chunk")
                sent = v[chosen].to(getattr(torch, options.get("value_dtype", "float32"))).double()
                v[chosen] -= sent
                if options["momentum_masking"]:
                    u[chosen] = 0.0
                total[chosen] += sent / ranks
            force = group["weight_decay"] * weight.detach()
            before = decayed.get(name, torch.zeros_like(force))
            decayed[name] = group["momentum"] * before + force
            ahead = force + group["momentum"] * decayed[name] if group["nesterov"] else decayed[name]
            with torch.no_grad():
                weight -= group["lr"] * (ahead + total.view(weight.shape))
        sgd.step()
        if schedule is not None:
            schedule.step()
    return {"weights": dict(net.state_dict(prefix="net.")), "unsent": unsent, "velocity": velocity}


def largest(values: Tensor, count: int, chunk: bool) -> Tensor:
    if not chunk:
        return values.abs().argsort(descending=True)[:count]
    size = math.ceil(len(values) / count)
    return torch.tensor([i + int(values[i : i + size].abs().argmax()) for i in range(0, len(values), size)])


@pytest.fixture(scope="module")
def runs() -> dict[tuple[int, str], list[Result]]:
    """Return what every rank has of each case, by number of ranks and case."""
    found = {}
    for ranks, cases in ((1, ON_ONE), (2, ON_TWO), (3, ON_THREE), (4, ON_FOUR)):
        work = partial(lambda cases: [run(case) for case in cases], cases)
        everyone = on_ranks(ranks, work)
        for case, *results in zip(cases, *everyone, strict=True):
            found[ranks, case] = results
    return found


@pytest.mark.parametrize(("ranks", "case"), PLACES)
def test_it_is_the_algorithm_written_by_hand(ranks: int, case: str, runs: dict[tuple[int, str], list[Result]]) -> None:
    results, expected = runs[ranks, case], by_hand(case, ranks)
    assert_close(results[0]["weights"], expected["weights"])
    for rank, result in enumerate(results):
        assert set(result["memory"]) == {f"net.{name}" for name in LARGE}
        for name in LARGE:
            kept = result["memory"][f"net.{name}"]
            assert_close(kept["residual"], expected["unsent"][rank][name])
            assert ("velocity" in kept) == ("momentum" in CASES[case][1])
            if "velocity" in kept:
                assert_close(kept["velocity"], expected["velocity"][rank][name])


@pytest.mark.parametrize(("ranks", "case"), PLACES)
def test_weights_are_the_same_bits_on_all_ranks(
    ranks: int, case: str, runs: dict[tuple[int, str], list[Result]]
) -> None:
    first, *others = runs[ranks, case]
    for other in others:
        assert_same(other["weights"], first["weights"])
        assert_same(other["optimizer"], first["optimizer"])
    assert not torch.equal(first["weights"]["net.0.weight"].float(), small_net()[0].weight), "it has learnt"


@pytest.mark.parametrize(("ranks", "case"), [place for place in PLACES if "momentum" not in CASES[place[1]][1]])
def test_what_arrived_and_what_is_unsent_are_all_gradients(
    ranks: int, case: str, runs: dict[tuple[int, str], list[Result]]
) -> None:
    results = runs[ranks, case]
    for name in (f"net.{name}" for name in LARGE):
        arrived = ranks * sum(mean[name] for mean in results[0]["mean"])
        unsent = sum(result["memory"][name]["residual"] for result in results).view(arrived.shape)
        gradients = sum(local[name] for result in results for local in result["local"])
        if "local_clip" in CASES[case][0]:
            continue
        assert ((arrived + unsent - gradients).norm() / gradients.norm()).item() < 1e-6
        assert unsent.norm() > 0.01 * gradients.norm(), "something waits"


@pytest.mark.parametrize("nesterov", [False, True])
def test_with_momentum_the_sums_are_those_of_the_velocity(nesterov: bool) -> None:
    def work() -> Result:
        return fit(dgc(momentum_masking=False), Task(momentum=0.5, nesterov=nesterov))

    results = on_ranks(2, work)
    for name in (f"net.{name}" for name in LARGE):
        arrived = 2 * sum(mean[name] for mean in results[0]["mean"])
        added = torch.zeros_like(arrived)
        for result in results:
            velocity = torch.zeros_like(arrived)
            for local in result["local"]:
                velocity = 0.5 * velocity + local[name]
                added += local[name] + 0.5 * velocity if nesterov else velocity
            assert_close(result["memory"][name]["velocity"].view(arrived.shape), velocity)
        unsent = sum(result["memory"][name]["residual"] for result in results).view(arrived.shape)
        assert ((arrived + unsent - added).norm() / added.norm()).item() < 1e-6


@pytest.mark.parametrize(("ranks", "case"), PLACES)
def test_bytes_are_those_of_the_formula(ranks: int, case: str, runs: dict[tuple[int, str], list[Result]]) -> None:
    options = CASES[case][0]
    value = getattr(torch, options.get("value_dtype", "float32"))
    steps = epochs_of(case) * BATCHES // CASES[case][2].get("accumulate_grad_batches", 1)
    sizes = {"net.0.weight": 2048, "net.2.weight": 256}
    expected = []
    for step in range(steps):
        warmup = options.get("warmup", [])
        position = step // options["warmup_steps"] if "warmup_steps" in options else 2 * step // steps
        density = warmup[position] if position < len(warmup) else options.get("ratio", 0.05)
        shares = [max(options.get("layer_ratios", {}).get(name.removesuffix(".weight"), density), 0) for name in sizes]
        counts = [kept_count(size, share) for size, share in zip(sizes.values(), shares, strict=True)]
        expected.append(
            pairs_bytes(counts, value) + 8 * (64 + 4 + 1)
        )  # the module is float64, and so is its dense part
    for result in runs[ranks, case]:
        ledger = result["ledger"]
        assert ledger["steps"] == steps
        assert ledger["sent_bytes"] == sum(expected)
        assert ledger["dense_bytes"] == steps * 8 * (2048 + 256 + 64 + 4)
        assert set(expected) <= set(result["sent"])


def test_the_options_of_ddp_took_effect(runs: dict[tuple[int, str], list[Result]]) -> None:
    assert runs[2, "many buckets"][0]["buckets"] > 2
    assert runs[2, "all options"][0]["buckets"] > 2
    assert runs[2, "error feedback"][0]["buckets"] == 1


@pytest.fixture(scope="module")
def beside_ddp() -> dict[Any, list[Result]]:
    """Return runs of DDP, of ratio 1, and of everything sent as pairs, by number of ranks, strategy and optimizer."""
    strategies = {
        "ddp": DDPStrategy,
        "neutral": lambda: dgc(ratio=1.0),
        "all sent": lambda: dgc(ratio=0.9999999, momentum_masking=False),
    }
    optimizers = {"plain": {}, "momentum": MOMENTUM, "all": ALL}

    def work(chosen: list[tuple[str, str]]) -> list[Result]:
        return [fit(strategies[strategy](), Task(**optimizers[optimizer])) for strategy, optimizer in chosen]

    found = {}
    # Ratio 1 registers no hook, so that four ranks are DDP's own affair.
    for ranks, chosen in (
        (2, list(itertools.product(strategies, optimizers))),
        (4, [("ddp", "all"), ("all sent", "all")]),
    ):
        for case, *results in zip(chosen, *on_ranks(ranks, work, chosen), strict=True):
            found[ranks, *case] = results
    return found


@pytest.mark.parametrize("optimizer", ["plain", "momentum", "all"])
def test_ratio_one_is_ddp(optimizer: str, beside_ddp: dict[Any, list[Result]]) -> None:
    for found, expected in zip(beside_ddp[2, "neutral", optimizer], beside_ddp[2, "ddp", optimizer], strict=True):
        for key in ("weights", "optimizer", "mean"):
            assert_same(found[key], expected[key])
        assert found["memory"] == {}
        assert found["ledger"]["sent_bytes"] == 0, "no hook was there to count"


@pytest.mark.parametrize(("ranks", "optimizer"), [(2, "plain"), (2, "momentum"), (2, "all"), (4, "all")])
def test_everything_sent_is_ddp(ranks: int, optimizer: str, beside_ddp: dict[Any, list[Result]]) -> None:
    pairs = zip(beside_ddp[ranks, "all sent", optimizer], beside_ddp[ranks, "ddp", optimizer], strict=True)
    for found, expected in pairs:
        assert set(found["memory"]) == {"net.0.weight", "net.2.weight"}
        assert all(kept["residual"].eq(0).all() for kept in found["memory"].values())
        assert_close(found["weights"], expected["weights"])
        if optimizer == "plain":
            assert_same(found["weights"], expected["weights"])


def test_a_layer_of_a_million_entries_shrinks_as_promised() -> None:
    def work() -> list[float]:
        ratios = []
        for value in ("float32", "float16"):
            net = torch.nn.Sequential(torch.nn.Linear(32, 32 * 1000), torch.nn.Unflatten(1, (1000, 32)))
            net = torch.nn.Sequential(net, torch.nn.Flatten(), torch.nn.Linear(32_000, 4, bias=False))
            net[0][0].bias = None
            strategy = dgc(ratio=0.001, value_dtype=value, min_numel=1024)
            ratios.append(fit(strategy, Task(net), epochs=1, limit_train_batches=2)["ratio"])
        return ratios

    for single, half in on_ranks(2, work):
        assert 499 <= single <= 500
        assert 660 <= half <= 667
