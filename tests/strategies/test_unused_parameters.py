"""Parameters that some steps do not use: against DDP, and against the algorithms written out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.functional import initial_factor
from lightning_grad.strategies import PowerSGDStrategy
from lightning_grad.testing import StopIn, on_ranks
from tests.strategies.ranks import BATCH, BATCHES, Result, Task, assert_close, assert_same, dgc, fit, samples
from tests.strategies.test_odd_runs import finish as finish_on_one_batch
from tests.strategies.test_odd_runs import stop
from tests.strategies.test_powersgd import gram_schmidt

pytestmark = [
    pytest.mark.filterwarnings("ignore:PowerSGDStrategy has nothing to compress and is plain DDP"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]

Uses = Callable[[int, int], bool]
LARGE = ["first", "branch", "last"]
EPOCHS = 1  # long enough for two rounds of the longest pattern
OPTIMIZER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}

# Whether a rank's step uses the branch, by step and rank.
PATTERNS: dict[str, Uses] = {
    "on one rank": lambda step, rank: rank == 0,
    "on no rank": lambda step, rank: False,
    "on all ranks": lambda step, rank: True,
    "in every second step": lambda step, rank: step % 2 == 1,
    "on either rank by turns": lambda step, rank: (step + rank) % 2 == 0,
    "on one rank or none": lambda step, rank: step % 3 == rank,
    "on no rank after a while": lambda step, rank: step < 3,
}
STATIC = ["on one rank", "on no rank", "on all ranks"]
PLACES = [(pattern, "find_unused_parameters") for pattern in PATTERNS] + [(p, "static_graph") for p in STATIC]
UNDER_ACCUMULATION: Uses = lambda batch, rank: batch % 4 == 0  # noqa: E731  # the first half of every second step


class Net(nn.Module):
    """Three matrices of 2048, 4096 and 256 entries, of which the one in the middle need not be used."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first, self.branch, self.last = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor, use: bool) -> Tensor:
        x = self.first(x).relu()
        return self.last(x + self.branch(x).tanh() if use else x)


class Branching(Task):
    """Uses the branch of its net in some steps."""

    def __init__(self, uses: Uses) -> None:
        super().__init__(Net(), **OPTIMIZER)
        self.uses = uses

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (part.chunk(self.trainer.world_size)[self.global_rank] for part in batch)
        use = self.uses(self.current_epoch * BATCHES + batch_idx, self.global_rank)
        return F.cross_entropy(self.net(x, use), y)


def power(**changes: Any) -> PowerSGDStrategy:
    return PowerSGDStrategy(**{"rank": 2, "min_gain": 1.0, "min_numel": 1, **changes})


def gradients_of(net: Net, uses: Uses, batch: int, accumulate: int, rank: int, ranks: int) -> dict[str, Tensor | None]:
    """Return a rank's gradient by name, ``None`` of what it has not used."""
    x, y = samples()
    loss: Any = 0.0
    for number in range(batch, batch + accumulate):
        place = number % BATCHES * BATCH
        part = [half[place : place + BATCH].chunk(ranks)[rank] for half in (x.double(), y)]
        loss = loss + F.cross_entropy(net(part[0], uses(number, rank)), part[1]) / accumulate
    weights = dict(net.named_parameters())
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))


def by_hand(kind: str, uses: Uses, ranks: int = 2, accumulate: int = 1, epochs: int = EPOCHS) -> Result:
    """Return what a loop over ranks in one process gives; what no rank has used is skipped in its step."""
    net = Net().double()
    weights = dict(net.named_parameters())
    scheme = {"dgc": HandMadeDGC, "power": HandMadePowerSGD}[kind](weights, ranks)
    sgd = torch.optim.SGD(weights.values(), **OPTIMIZER)
    for step in range(epochs * BATCHES // accumulate):
        everyone = [gradients_of(net, uses, step * accumulate, accumulate, rank, ranks) for rank in range(ranks)]
        sgd.zero_grad()
        for name, weight in weights.items():
            if all(gradients[name] is None for gradients in everyone):
                continue
            found = [torch.zeros_like(weight) if g[name] is None else g[name] for g in everyone]
            if name.endswith("bias"):
                weight.grad = sum(found) / ranks
            else:
                scheme.step(name, weight, found)
        sgd.step()
    return {"weights": dict(net.state_dict(prefix="net.")), "unsent": scheme.unsent}


class HandMadeDGC:
    """Moves large weights by itself, and leaves the others to the optimizer."""

    def __init__(self, weights: dict[str, Tensor], ranks: int) -> None:
        large = {name: torch.zeros(weight.numel()).double() for name, weight in weights.items() if weight.dim() > 1}
        self.unsent = [{name: zeros.clone() for name, zeros in large.items()} for _ in range(ranks)]
        self.velocity = [{name: zeros.clone() for name, zeros in large.items()} for _ in range(ranks)]
        self.decayed: dict[str, Tensor] = {}

    def step(self, name: str, weight: Tensor, gradients: list[Tensor]) -> None:
        total = torch.zeros(weight.numel()).double()
        for rank, gradient in enumerate(gradients):
            u, v = self.velocity[rank][name], self.unsent[rank][name]
            u.mul_(OPTIMIZER["momentum"]).add_(gradient.flatten())
            v.add_(u)
            chosen = v.abs().argsort(descending=True)[: math.ceil(0.05 * len(v) - 1e-9)]
            sent = v[chosen].float().double()
            v[chosen] -= sent
            u[chosen] = 0.0
            total[chosen] += sent / len(gradients)
        before = self.decayed.get(name, torch.zeros_like(weight))
        self.decayed[name] = OPTIMIZER["momentum"] * before + OPTIMIZER["weight_decay"] * weight.detach()
        with torch.no_grad():
            weight -= OPTIMIZER["lr"] * (self.decayed[name] + total.view(weight.shape))


class HandMadePowerSGD:
    """Gives all weights to the optimizer, with the gradient that arrives."""

    def __init__(self, weights: dict[str, Tensor], ranks: int) -> None:
        large = {name: weight for name, weight in weights.items() if weight.dim() > 1}
        self.right = {n: initial_factor(w.shape[1], 2, 0, f"net.{n}").double() for n, w in large.items()}
        self.unsent = [{name: torch.zeros_like(w).detach() for name, w in large.items()} for _ in range(ranks)]

    def step(self, name: str, weight: Tensor, gradients: list[Tensor]) -> None:
        matrices = [g + kept[name] for g, kept in zip(gradients, self.unsent, strict=True)]
        left = gram_schmidt(sum(matrix @ self.right[name] for matrix in matrices) / len(matrices))
        self.right[name] = sum(matrix.t() @ left for matrix in matrices) / len(matrices)
        weight.grad = left @ self.right[name].t()
        for kept, matrix in zip(self.unsent, matrices, strict=True):
            kept[name] = matrix - weight.grad


def train(strategy: Any, uses: Uses, **options: Any) -> Result:
    module = Branching(uses)
    result = fit(strategy, module, precision="64-true", **{"epochs": EPOCHS, **options})
    assert not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())
    return result


BUILDS = {"dgc": dgc, "power": power}


@pytest.fixture(scope="module", params=BUILDS)
def runs(request: pytest.FixtureRequest) -> tuple[str, dict[Any, list[Result]]]:
    """Return what both ranks have of each pattern and option."""
    build = BUILDS[request.param]

    def work() -> dict[Any, Result]:
        made = {(pattern, option): train(build(**{option: True}), PATTERNS[pattern]) for pattern, option in PLACES}
        option = {"find_unused_parameters": True}
        made["views"] = train(build(gradient_as_bucket_view=True, **option), PATTERNS["on one rank or none"])
        made["accumulated"] = train(build(**option), UNDER_ACCUMULATION, accumulate_grad_batches=2, epochs=2)
        made["both options"] = train(build(static_graph=True, **option), PATTERNS["on no rank"])
        return made

    first, second = on_ranks(2, work)
    return request.param, {key: [first[key], second[key]] for key in first}


_EXPECTED: dict[Any, tuple[Uses, int]] = {
    **{place: (PATTERNS[place[0]], 1) for place in PLACES},
    "views": (PATTERNS["on one rank or none"], 1),
    "accumulated": (UNDER_ACCUMULATION, 2),  # of two epochs
    "both options": (PATTERNS["on no rank"], 1),
}


@pytest.mark.parametrize("place", _EXPECTED, ids=str)
def test_it_is_the_algorithm_written_by_hand(place: Any, runs: tuple[str, dict[Any, list[Result]]]) -> None:
    kind, found = runs
    uses, accumulate = _EXPECTED[place]
    expected = by_hand(kind, uses, accumulate=accumulate, epochs=EPOCHS * accumulate)
    assert_same(found[place][1]["weights"], found[place][0]["weights"])
    assert_close(found[place][0]["weights"], expected["weights"])
    kept = {"dgc": "residual", "power": "error"}[kind]
    for rank, result in enumerate(found[place]):
        for name in LARGE:
            unsent = expected["unsent"][rank][f"{name}.weight"].flatten()
            memory = result["memory"].get(f"net.{name}.weight", {kept: torch.zeros_like(unsent)})
            assert_close(memory[kept], unsent)


def test_what_no_rank_uses_has_no_gradient_and_no_memory(runs: tuple[str, dict[Any, list[Result]]]) -> None:
    for option in ("find_unused_parameters", "static_graph"):
        for result in runs[1]["on no rank", option]:
            assert set(result["memory"]) == {"net.first.weight", "net.last.weight"}
            assert all("net.branch.weight" not in mean for mean in result["mean"])
            assert torch.equal(result["weights"]["net.branch.weight"], Net().branch.weight.double())


def test_what_no_rank_uses_sends_no_bytes(runs: tuple[str, dict[Any, list[Result]]]) -> None:
    kind, found = runs
    branch = {"dgc": 8 * math.ceil(0.05 * 64 * 64), "power": 8 * 2 * (64 + 64)}[
        kind
    ] + 8 * 64  # of the matrix and the bias
    sent = found["in every second step", "find_unused_parameters"][0]["sent"]
    assert [more - less for less, more in zip(sent[::2], sent[1::2], strict=True)] == [branch] * (EPOCHS * BATCHES // 2)
    everything = found["on all ranks", "find_unused_parameters"][0]["sent"]
    assert set(everything) == set(sent[1::2])
    static = found["on all ranks", "static_graph"][0]["sent"]
    assert set(static) == {everything[0] - 6}, "one byte for each of six parameters says whether it was used"


class ZeroesInPlace(Branching):
    """Leaves zeros where there were gradients, which momentum and decay act upon, used or not."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


def _zeroes_in_place(pattern: str, views: bool) -> dict[str, Result]:
    def run(strategy: Any) -> Result:
        return fit(strategy, ZeroesInPlace(PATTERNS[pattern]), epochs=EPOCHS, precision="64-true")

    options = {"find_unused_parameters": True, "gradient_as_bucket_view": views}
    return {
        "ddp": run(DDPStrategy(**options)),
        "all sent": run(dgc(ratio=0.9999999, momentum_masking=False, **options)),
        "full rank": run(power(rank=1000, min_gain=0.1, **options)),
        "dgc": run(dgc(**options)),
        "power": run(power(**options)),
    }


ZEROES = list(
    itertools.product(["in every second step", "on one rank or none", "on no rank after a while"], [False, True])
)


@pytest.fixture(scope="module")
def zeroes() -> list[dict[Any, Any]]:
    """Return what each rank has of each pattern, with and without views."""
    return on_ranks(2, lambda: {place: _zeroes_in_place(*place) for place in ZEROES})


@pytest.mark.parametrize("place", ZEROES, ids=str)
def test_a_gradient_of_zeros_moves_a_parameter_as_under_ddp(place: Any, zeroes: list[dict[Any, Any]]) -> None:
    first, second = (found[place] for found in zeroes)
    for name in ("all sent", "full rank"):
        assert_close(first[name]["weights"], first["ddp"]["weights"])
    for name in first:
        assert_same(first[name]["weights"], second[name]["weights"])
        assert first[name]["weights"]["net.branch.weight"].isfinite().all()
    name, both = "net.branch.weight", (first["power"], second["power"])
    arrived = 2 * sum(mean[name] for mean in first["power"]["mean"] if name in mean)
    unsent = sum(result["memory"][name]["error"] for result in both).view(arrived.shape)
    assert_close(arrived + unsent, sum(local[name] for result in both for local in result["local"] if name in local))


def _beside_ddp(pattern: str, option: str) -> dict[str, Result]:
    uses = PATTERNS[pattern]
    strategies = {
        "ddp": DDPStrategy(**{option: True}),
        "all sent": dgc(ratio=0.9999999, momentum_masking=False, **{option: True}),
        "dense so far": power(start_step=1000, **{option: True}),
    }
    if pattern in WITHOUT_A_HOOK:
        strategies["neutral dgc"] = dgc(ratio=1.0, **{option: True})
        strategies["neutral power"] = power(exclude=["*"], **{option: True})
    return {name: train(strategy, uses) for name, strategy in strategies.items()}


# Where neutral strategies are tried: they register no hook, so that DDP is on its own under any pattern.
WITHOUT_A_HOOK = ("on one rank", "on one rank or none")


@pytest.fixture(scope="module")
def beside_ddp() -> list[dict[Any, Any]]:
    """Return what each rank has of each pattern and option."""
    return on_ranks(2, lambda: {place: _beside_ddp(*place) for place in PLACES})


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_neutral_is_ddp_bit_by_bit_and_all_sent_is_ddp(place: Any, beside_ddp: list[dict[Any, Any]]) -> None:
    for ran in beside_ddp:
        found = dict(ran[place])
        expected, all_sent = found.pop("ddp"), found.pop("all sent")
        assert len(found) == (3 if place[0] in WITHOUT_A_HOOK else 1)
        for neutral in found.values():
            assert_same(neutral["weights"], expected["weights"])
            assert_same(neutral["optimizer"], expected["optimizer"])
        assert_close(all_sent["weights"], expected["weights"])


class _Counts(Branching):
    """Uses the branch by the count of updates, so that a batch that is run again uses what it did."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (part.chunk(self.trainer.world_size)[self.global_rank] for part in batch)
        return F.cross_entropy(self.net(x, self.uses(self.trainer.global_step, self.global_rank)), y)


STEPS = [3, 4, 5]  # which use the branch on rank 0, on rank 1, on neither


def _stop_and_resume(build: Any, folder: Path) -> dict[Any, Any]:
    """Return what an uninterrupted run leaves, by ``None``, and one that stopped, by its step."""

    def made() -> tuple[Any, Any]:
        return build(find_unused_parameters=True), _Counts(PATTERNS["on one rank or none"])

    def finished(ckpt: Path | None) -> Any:
        strategy, module = made()
        return finish_on_one_batch(strategy, (), module, ckpt)

    left = {None: finished(None)}
    for step in STEPS:
        strategy, module = made()
        callbacks = [StopIn("on_before_optimizer_step", step), OnExceptionCheckpoint(folder, str(step))]
        stop("on purpose", strategy, callbacks, module)
        left[step] = finished(folder / f"{step}.ckpt")
    return left


@pytest.fixture(scope="module", params=BUILDS)
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return on_ranks(2, _stop_and_resume, BUILDS[request.param], tmp_path_factory.mktemp("stopped"))


@pytest.mark.parametrize("step", STEPS)
def test_a_run_that_stops_between_an_exchange_and_its_update_goes_on_exactly(
    step: int, stopped: list[dict[Any, Any]]
) -> None:
    for left in stopped:
        assert_same(left[step], left[None])


def _without_the_option(build: Any) -> str:
    with pytest.raises(RuntimeError) as error:
        train(build(), PATTERNS["on no rank"])
    assert train(build(find_unused_parameters=True), PATTERNS["on no rank"])["ledger"]["steps"] == EPOCHS * BATCHES
    return str(error.value)


@pytest.mark.parametrize("build", [dgc, power])
def test_without_the_option_the_error_names_the_parameters_and_the_option(build: Any) -> None:
    for words in on_ranks(2, _without_the_option, build):
        name = type(build()).__name__
        assert f"{name}: some parameters (net.branch.weight, net.branch.bias) got no gradient in a step" in words
        assert f"{name}(find_unused_parameters=True)" in words


class _UsesOnlyWhatIsNotMoved(Branching):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.branch.parameters(), lr=0.1)


def _train_what_is_used_now_and_then(build: Any) -> int:
    module = _UsesOnlyWhatIsNotMoved(PATTERNS["in every second step"])
    arguments = {"local_clip": 1.0} if build is dgc else {}
    return int(fit(build(find_unused_parameters=True, **arguments), module)["ledger"]["steps"])


@pytest.mark.parametrize("build", [dgc, power])
def test_a_step_may_use_nothing_that_the_optimizer_moves(build: Any) -> None:
    assert on_ranks(2, _train_what_is_used_now_and_then, build) == [2 * BATCHES] * 2


class _Breaks(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("on purpose")


def _break() -> list[int]:
    module = Branching(PATTERNS["on one rank"])
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(dgc(find_unused_parameters=True), module, [_Breaks()])
    dist.barrier()
    return [len(parameter._post_accumulate_grad_hooks or ()) for parameter in module.parameters()]


def test_an_exception_leaves_no_hook_on_a_parameter() -> None:
    for left in on_ranks(2, _break):
        assert left == [0] * 6
