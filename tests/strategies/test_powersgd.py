"""PowerSGD against the algorithm written out by hand, against torch's hook, and against the sums of gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn import functional as F

from lightning_grad.functional import initial_factor
from lightning_grad.strategies import PowerSGDStrategy, powersgd
from lightning_grad.testing import on_ranks
from tests.strategies.ranks import BATCH, BATCHES, Result, Task, assert_close, assert_same, fit, samples, small_net

LARGE = ["0.weight", "2.weight"]
ALL = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}

# What differs from PowerSGDStrategy(rank=2, min_gain=1, min_numel=1), Task(), Trainer() and DDP's own options.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}, {}, {}),
    "rank 1": ({"rank": 1}, ALL, {}, {}),
    "a rank above the rows": ({"rank": 8, "min_gain": 0.1}, {}, {}, {}),
    "dense at the beginning": ({"start_step": 3}, {}, {}, {}),
    "buckets as views": ({"gradient_as_bucket_view": True}, {}, {}, {}),
    "static graph": ({"static_graph": True}, {}, {}, {}),
    "accumulation": ({}, {}, {"accumulate_grad_batches": 2}, {}),
    "many buckets": ({}, ALL, {}, {"bucket_cap_mb": 1e-4}),
}
CASES_OF = {1: ["plain"], 2: list(CASES), 3: ["plain", "rank 1", "many buckets"], 4: ["rank 1"]}
PLACES = [(ranks, case) for ranks, cases in CASES_OF.items() for case in cases]


def epochs_of(case: str) -> int:
    return 2 if CASES[case][2] else 1


def run(case: str) -> Result:
    strategy_options, optimizer, trainer, ddp = CASES[case]
    strategy = PowerSGDStrategy(**{"rank": 2, "min_gain": 1.0, "min_numel": 1, **strategy_options})
    strategy._ddp_kwargs.update(ddp)
    return fit(strategy, Task(**optimizer), epochs=epochs_of(case), precision="64-true", **trainer)


def by_hand(case: str, ranks: int) -> Result:
    """Return what a loop over ranks in one process gives, written from the paper's algorithms 1 and 2."""
    options, optimizer, trainer, _ = CASES[case]
    rank, accumulate = options.get("rank", 2), trainer.get("accumulate_grad_batches", 1)
    net = small_net().double()
    weights = dict(net.named_parameters())
    sgd = torch.optim.SGD(net.parameters(), **{"lr": 0.1, **optimizer})
    right = {n: initial_factor(weights[n].shape[1], min(rank, *weights[n].shape), 0, f"net.{n}") for n in LARGE}
    right = {name: factor.double() for name, factor in right.items()}
    error = [{name: torch.zeros_like(weights[name]) for name in LARGE} for _ in range(ranks)]
    x, y = samples()
    batches = list(zip(x.double().split(BATCH), y.split(BATCH), strict=True)) * epochs_of(case)
    for step in range(len(batches) // accumulate):
        gradients = []
        for of in range(ranks):
            parts = [[half.chunk(ranks)[of] for half in batch] for batch in batches[step * accumulate :][:accumulate]]
            loss = sum(F.cross_entropy(net(x), y) / accumulate for x, y in parts)
            gradients.append(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)))
        for name, weight in weights.items():
            if name not in LARGE or step < options.get("start_step", 0):
                weight.grad = sum(g[name] for g in gradients) / ranks
                continue
            matrices = [g[name] + e[name] for g, e in zip(gradients, error, strict=True)]
            left = gram_schmidt(sum(matrix @ right[name] for matrix in matrices) / ranks)
            right[name] = sum(matrix.t() @ left for matrix in matrices) / ranks
            weight.grad = left @ right[name].t()
            for kept, matrix in zip(error, matrices, strict=True):
                kept[name] = (matrix - weight.grad).detach()
        sgd.step()
    return {"weights": dict(net.state_dict(prefix="net.")), "error": error}


def gram_schmidt(matrix: Tensor) -> Tensor:
    columns: list[Tensor] = []
    for column in matrix.t():
        rest = column
        for _ in range(2):  # once is not enough for a column that depends on the ones before
            for done in columns:
                rest = rest - (done @ rest) * done
        columns.append(rest / rest.norm())
    return torch.stack(columns, 1)


@pytest.fixture(scope="module")
def runs() -> dict[tuple[int, str], list[Result]]:
    """Return what every rank has of each case, by number of ranks and case."""
    found = {}
    for ranks, cases in CASES_OF.items():
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
            found = result["memory"][f"net.{name}"]["error"]
            assert_close(found, expected["error"][rank][name].flatten())


@pytest.mark.parametrize(("ranks", "case"), PLACES)
def test_weights_are_the_same_bits_on_all_ranks(
    ranks: int, case: str, runs: dict[tuple[int, str], list[Result]]
) -> None:
    first, *others = runs[ranks, case]
    for other in others:
        assert_same(other["weights"], first["weights"])
        assert_same(other["optimizer"], first["optimizer"])
        for name, kept in first["memory"].items():
            assert_same(other["memory"][name]["right"], kept["right"])
    assert not torch.equal(first["weights"]["net.0.weight"].float(), small_net()[0].weight), "it has learnt"


@pytest.mark.parametrize(("ranks", "case"), PLACES)
def test_what_arrived_and_what_is_unsent_are_all_gradients(
    ranks: int, case: str, runs: dict[tuple[int, str], list[Result]]
) -> None:
    results = runs[ranks, case]
    for name in (f"net.{name}" for name in LARGE):
        arrived = ranks * sum(mean[name] for mean in results[0]["mean"])
        unsent = sum(result["memory"][name]["error"] for result in results).view(arrived.shape)
        gradients = sum(local[name] for result in results for local in result["local"])
        assert ((arrived + unsent - gradients).norm() / gradients.norm()).item() < 1e-6
        if (case, name) != ("a rank above the rows", "net.2.weight"):
            assert unsent.norm() > 0.01 * gradients.norm(), "something waits"


@pytest.mark.parametrize(("ranks", "case"), PLACES)
def test_bytes_are_those_of_the_factors(ranks: int, case: str, runs: dict[tuple[int, str], list[Result]]) -> None:
    options, _, trainer, _ = CASES[case]
    rank, steps = options.get("rank", 2), epochs_of(case) * BATCHES // trainer.get("accumulate_grad_batches", 1)
    factors = 8 * (min(rank, 32) * (64 + 32) + min(rank, 4) * (4 + 64) + 64 + 4 + 1)
    dense = 8 * (2048 + 256 + 64 + 4 + 1)
    begin = options.get("start_step", 0)
    for result in runs[ranks, case]:
        assert result["sent"][-1] == factors
        assert result["ledger"]["sent_bytes"] == begin * dense + (steps - begin) * factors


class TorchsPowerSGD(DDPStrategy):
    """DDP with torch's own hook, which tells the first right factors that it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Tensor] = {}

    def _register_ddp_hooks(self) -> None:
        self.state = PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=1)
        self.names = {id(parameter): name for name, parameter in self.model.module.named_parameters()}
        self.model.register_comm_hook(self, _hook)


def _hook(strategy: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    if strategy.state.iter == 2 and not strategy.first:
        with torch.random.fork_rng():
            torch.manual_seed(np.random.RandomState(0).randint(1_000_000_000))
            for parameter in bucket.parameters():
                if parameter.dim() > 1:
                    strategy.first[strategy.names[id(parameter)]] = torch.randn(
                        1, parameter.shape[1], 2, dtype=parameter.dtype
                    )[0]
    return powerSGD_hook(strategy.state, bucket)


# The annotations are strings in this file, and torch wants the classes.
_hook.__annotations__ = {"bucket": torch.distributed.GradBucket, "return": torch.futures.Future[torch.Tensor]}


@pytest.mark.parametrize("ranks", [2, 3])
def test_it_trains_as_torchs_hook_does(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> tuple[Result, Result]:
        torchs = TorchsPowerSGD()
        theirs = fit(torchs, Task(**ALL), precision="64-true")
        monkeypatch.setattr(powersgd, "initial_factor", lambda columns, rank, seed, name: torchs.first[name])
        ours = fit(PowerSGDStrategy(rank=2, min_gain=1.0, min_numel=1, start_step=2), Task(**ALL), precision="64-true")
        return theirs, ours

    for theirs, ours in on_ranks(ranks, work):
        assert set(ours["memory"]) == {"net.0.weight", "net.2.weight"}
        assert_close(ours["weights"], theirs["weights"], 1e-8)


def test_a_full_rank_sends_all_of_a_small_matrix() -> None:
    def work() -> tuple[Result, Result]:
        strategy = PowerSGDStrategy(rank=4, min_gain=0.5, min_numel=1, exclude=["net.0"])
        return fit(strategy), fit(DDPStrategy())

    first, second = on_ranks(2, work)
    for ours, ddp in (first, second):
        assert set(ours["memory"]) == {"net.2.weight"}
        assert_close(ours["weights"], ddp["weights"], 1e-5)
    both = [ours["memory"]["net.2.weight"]["error"] for ours, _ in (first, second)]
    assert_close(both[0], -both[1], 1e-5)  # each rank misses what sets it apart from the mean
    assert both[0].norm() > 0.1


def test_kernels_are_matrices_and_what_gains_too_little_goes_dense() -> None:
    def work() -> Result:
        net = nn.Sequential(nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Flatten())
        net = nn.Sequential(*net, nn.Linear(256, 4)).to(memory_format=torch.channels_last)
        return fit(PowerSGDStrategy(rank=3, min_gain=2.0, min_numel=1), Task(net))

    first, second = on_ranks(2, work)
    assert_same(first["weights"], second["weights"])
    kept = first["memory"]["net.1.weight"]
    assert kept["right"].shape == (18, 3)
    assert kept["error"].shape == (16 * 18,)
    assert "net.4.weight" not in first["memory"], "3 * (4 + 256) * 2 is above 4 * 256"
    assert first["weights"]["net.1.weight"].is_contiguous(memory_format=torch.channels_last)


def test_a_weight_that_gets_no_gradient_does_not_break_the_factors() -> None:
    def work() -> Result:
        net = small_net()
        nn.init.zeros_(net[2].weight)  # the first layer's gradient is zero in the first step
        return fit(PowerSGDStrategy(rank=2, min_numel=1), Task(net))

    first, second = on_ranks(2, work)
    assert all(value.isfinite().all() for value in first["weights"].values())
    assert_same(first["weights"], second["weights"])
    assert not torch.equal(first["weights"]["net.0.weight"], small_net()[0].weight)


class TwoTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = small_net()[0], small_net()[2].double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu().double())


def test_weights_may_be_of_two_types() -> None:
    def work() -> Result:
        return fit(PowerSGDStrategy(rank=2, min_gain=1.0, min_numel=1), Task(TwoTypes()), epochs=1)

    first, second = on_ranks(2, work)
    assert_same(first["weights"], second["weights"])
    assert set(first["memory"]) == {"net.first.weight", "net.last.weight"}
