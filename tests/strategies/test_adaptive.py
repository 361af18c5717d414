"""Planned levels: those that a search over all choices finds, on all ranks, in messages, checkpoints, tables and lines."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.functional.communication.wire import kept_count
from lightning_grad.strategies import PowerSGDStrategy, _adaptive
from lightning_grad.testing import guarded, on_ranks
from tests.strategies.ranks import (
    BATCH,
    BATCHES,
    Result,
    Task,
    assert_close,
    assert_same,
    dgc,
    fit,
    said,
    samples,
    small_net,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

RANKS = 2
LAYERS = {"net.0.weight": (64, 32), "net.2.weight": (4, 64)}
DENSE = 4 * (64 + 4 + 1)  # the biases and the flag of a step


def power(**changes: Any) -> PowerSGDStrategy:
    """Return a strategy that compresses every matrix of the small net."""
    return PowerSGDStrategy(**{"rank": 2, "min_gain": 1.0, "min_numel": 1, **changes})


class Watch(pl.Callback):
    """Keeps the levels of each step."""

    def __init__(self) -> None:
        self.levels: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        self.levels.append(dict(trainer.strategy.levels))


class Saves(pl.Callback):
    """Saves a checkpoint after some steps, and what the strategy has then."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps
        self.state: Any = None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)
            self.state = kept_by(trainer.strategy)


class Looks(pl.Callback):
    """Keeps what the strategy has when a fit begins."""

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        self.state = kept_by(trainer.strategy)


def kept_by(strategy: Any) -> dict[str, Any]:
    seen = {name: kept["seen"].clone() for name, kept in strategy.memory.items() if "seen" in kept}
    return {"levels": dict(strategy.levels), "seen": seen}


# A plan is the best of all choices.

CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], int]] = {
    "dgc": (dgc, {}, BATCHES),
    "dgc, every 4 steps": (dgc, {"adapt_every": 4, "value_dtype": "float16", "correction": "error_feedback"}, 4),
    "dgc, feedback": (dgc, {"adapt": "lgreco_feedback"}, BATCHES),
    "power": (power, {}, BATCHES),
    "power, every 4 steps": (power, {"adapt_every": 4}, 4),
}


def run(case: str) -> Result:
    build, options, _ = CASES[case]
    watch = Watch()
    result = fit(build(**{"adapt": "lgreco", **options}), Task(momentum=0.9), [watch], epochs=3)
    return {**result, "levels": watch.levels}


@pytest.fixture(scope="module")
def runs() -> dict[str, list[Result]]:
    """Return what every rank has of each case."""
    everyone = on_ranks(RANKS, lambda: [run(case) for case in CASES])
    return {case: list(results) for case, *results in zip(CASES, *everyone, strict=True)}


def count_of(case: str) -> Callable[[str, float], int]:
    """Return what gives the bytes of a layer at a level."""
    build, options, _ = CASES[case]
    if build is power:
        return lambda name, level: 4 * int(level) * sum(LAYERS[name])
    pair = 6 if "value_dtype" in options else 8
    return lambda name, level: pair * kept_count(LAYERS[name][0] * LAYERS[name][1], level)


def uniform_of(case: str) -> dict[str, float]:
    build, options, _ = CASES[case]
    return dict.fromkeys(LAYERS, float(options.get("rank", 2)) if build is power else 0.05)


def levels_of(case: str, name: str) -> set[float]:
    """Return all levels of a layer, from an eighth of the uniform one to eight times."""
    uniform, shape = uniform_of(case)[name], LAYERS[name]
    steps = [uniform * 2 ** (quarter / 4) for quarter in range(-12, 13)]
    if CASES[case][0] is power:
        ranks = {min(*shape, max(1, round(step))) for step in steps}
        return {rank for rank in ranks if rank * sum(shape) < shape[0] * shape[1]} | {uniform}
    return {step for step in steps if step * count_of(case)(name, 1.0) < 4 * shape[0] * shape[1]} | {uniform}


def error_of(case: str, level: float, gradient: Tensor) -> float:
    if CASES[case][0] is power:
        return float(torch.linalg.svdvals(gradient.double())[int(level) :].square().sum())
    squares, count = (
        gradient.double().square().flatten().sort(descending=True).values,
        kept_count(gradient.numel(), level),
    )
    error = float(squares[count:].sum())
    if CASES[case][1].get("adapt") != "lgreco_feedback":
        return error
    carried = float(squares[:count].sum() / squares.sum())
    return float(squares.sum()) * (1 - carried) / carried


def table_of_errors(case: str, gradients: Sequence[dict[str, Tensor]]) -> dict[str, dict[float, float]]:
    """Return the mean error over ranks of each level of each layer."""
    return {
        name: {
            level: sum(error_of(case, level, rank[name]) for rank in gradients) / len(gradients)
            for level in levels_of(case, name)
        }
        for name in LAYERS
    }


def best_of_all(case: str, errors: dict[str, dict[float, float]], slack: float) -> int:
    """Return the least bytes of all choices whose error is at most that of the uniform setting times ``slack``."""
    bound = slack * sum(errors[name][level] for name, level in uniform_of(case).items())
    choices = [dict(zip(LAYERS, levels, strict=True)) for levels in itertools.product(*map(errors.get, LAYERS))]
    good = [choice for choice in choices if sum(errors[name][level] for name, level in choice.items()) <= bound]
    return min(sum(count_of(case)(*layer) for layer in choice.items()) for choice in good)


def plans_of(case: str, results: list[Result]) -> list[tuple[dict[str, float], list[dict[str, Tensor]]]]:
    """Return the levels of each plan, and the sums of the gradients of each rank from which it was made."""
    every, steps = CASES[case][2], len(results[0]["levels"])
    plans = []
    for begin in range(0, steps - every, every):
        local = [result["local"][begin : begin + every] for result in results]
        sums = [{name: sum(step[name] for step in rank) for name in LAYERS} for rank in local]
        plans.append((results[0]["levels"][begin + every], sums))
    return plans


@pytest.mark.parametrize("case", CASES)
def test_a_plan_sends_least_of_all_choices_with_no_more_error(case: str, runs: dict[str, list[Result]]) -> None:
    plans, gains = plans_of(case, runs[case]), 0
    assert len(plans) == (2 if CASES[case][2] == BATCHES else 4)
    for levels, sums in plans:
        errors = table_of_errors(case, sums)
        found = {name: min(errors[name], key=lambda one: abs(one - levels[name])) for name in LAYERS}
        assert found == pytest.approx(levels)
        of_uniform = sum(errors[name][level] for name, level in uniform_of(case).items())
        assert sum(errors[name][level] for name, level in found.items()) <= of_uniform * (1 + 1e-5)
        sent = sum(count_of(case)(*layer) for layer in levels.items())
        assert best_of_all(case, errors, 1 + 1e-5) <= sent <= best_of_all(case, errors, 1 - 1e-3)
        gains += sent < sum(count_of(case)(*layer) for layer in uniform_of(case).items())
    assert gains


def test_each_rank_alone_would_plan_something_else(runs: dict[str, list[Result]]) -> None:
    differ = [
        best_of_all(case, table_of_errors(case, sums[:1]), 1.0)
        != best_of_all(case, table_of_errors(case, sums[1:]), 1.0)
        for case in CASES
        for _, sums in plans_of(case, runs[case])
    ]
    assert any(differ)


@pytest.mark.parametrize("case", CASES)
def test_levels_and_weights_are_the_same_bits_on_all_ranks(case: str, runs: dict[str, list[Result]]) -> None:
    first, second = runs[case]
    assert first["levels"] == second["levels"]
    assert_same(first["weights"], second["weights"])
    assert_same(first["optimizer"], second["optimizer"])


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_the_levels_and_of_the_plans(case: str, runs: dict[str, list[Result]]) -> None:
    every = CASES[case][2]
    for result in runs[case]:
        for step, (sent, levels) in enumerate(zip(result["sent"], result["levels"], strict=True)):
            expected = DENSE + sum(count_of(case)(*layer) for layer in {**uniform_of(case), **levels}.items())
            if step and step % every == 0:  # 8 bytes an error, 4 a planned level
                expected += sum(8 * len(distinct(case, name)) + 4 for name in LAYERS)
            assert sent == -(-expected // 4) * 4
        assert not result["levels"][0]
        assert result["levels"][-1]


def distinct(case: str, name: str) -> set[int]:
    return {count_of(case)(name, level) for level in levels_of(case, name)}


@pytest.mark.parametrize("case", ["dgc, every 4 steps", "power", "power, every 4 steps"])
def test_what_arrived_and_what_is_unsent_are_all_gradients(case: str, runs: dict[str, list[Result]]) -> None:
    kind = "error" if CASES[case][0] is power else "residual"
    for name in LAYERS:
        arrived = RANKS * sum(mean[name] for mean in runs[case][0]["mean"])
        unsent = sum(result["memory"][name][kind] for result in runs[case]).view(arrived.shape)
        gradients = sum(local[name] for result in runs[case] for local in result["local"])
        assert ((arrived + unsent - gradients).norm() / gradients.norm()).item() < 1e-5


# Other settings.


def _composed() -> dict[str, Any]:
    found = {}
    settings: dict[str, tuple[Any, Any]] = {
        "warm-up": (dgc(warmup=[0.5, 0.06], adapt="lgreco"), None),
        "own share": (dgc(layer_ratios={"net.2": 0.5}, adapt="lgreco"), None),
        "excluded": (power(exclude=["net.2"], adapt="lgreco"), None),
        "dense start": (power(start_step=5, adapt="lgreco", adapt_every=4), None),
    }
    for name, (strategy, module) in settings.items():
        watch = Watch()
        found[name] = {**fit(strategy, module, [watch], epochs=3), "levels": watch.levels}
    return found


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return on_ranks(1, _composed)[0]


def test_a_warm_up_raises_planned_shares_as_it_raises_the_ratio(composed: dict[str, Any]) -> None:
    found, of_plan = composed["warm-up"], sum(8 * len(distinct("dgc", name)) + 4 for name in LAYERS)
    for step, (sent, levels) in enumerate(zip(found["sent"], found["levels"], strict=True)):
        warm = [0.5, 0.06, 0.0][step // BATCHES]
        shares = {name: max(warm, levels.get(name, 0.05)) for name in LAYERS}
        expected = DENSE + sum(8 * kept_count(r * c, shares[name]) for name, (r, c) in LAYERS.items())
        assert sent - expected == (0 if step % BATCHES or not step else of_plan)
    middle, last = (found["levels"][step] for step in (BATCHES, 2 * BATCHES))
    assert min(middle.values()) < 0.06 < max(middle.values()), "one is raised, one is not"
    density = sum(kept_count(r * c, last[name]) for name, (r, c) in LAYERS.items()) / (64 * 32 + 4 * 64)
    assert found["metrics"][-1]["comm/density"] == pytest.approx(density)


def test_only_layers_without_a_share_of_their_own_are_planned(composed: dict[str, Any]) -> None:
    found = composed["own share"]
    assert found["levels"][-1] == {"net.0.weight": 0.05}, "alone it has no error to trade"
    assert "seen" not in found["memory"]["net.2.weight"]
    assert found["sent"][-1] == DENSE + 8 * (kept_count(2048, 0.05) + 128)
    assert composed["excluded"]["levels"][-1] == {"net.0.weight": 2}


def test_gradients_that_went_dense_make_no_plan(composed: dict[str, Any]) -> None:
    found = composed["dense start"]
    assert [bool(levels) for levels in found["levels"]] == [step >= 8 for step in range(3 * BATCHES)]
    assert set(found["sent"][:5]) == {DENSE + 4 * (2048 + 256)}


class TwoHeads(nn.Module):
    """The second head is used in the first steps only."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.first, self.heads, self.left = small_net()[0], nn.ModuleList([small_net()[2], small_net()[2]]), steps

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        hidden = self.first(x).relu()
        return self.heads[0](hidden) + (self.heads[1](hidden.square()) if self.left >= 0 else 0.0)


def _stop_using() -> list[dict[str, float]]:
    watch = Watch()
    fit(dgc(adapt="lgreco", find_unused_parameters=True), Task(TwoHeads(BATCHES)), [watch], epochs=3)
    return watch.levels


def test_a_layer_that_no_rank_uses_keeps_its_level() -> None:
    levels, other = on_ranks(RANKS, _stop_using)
    assert levels == other
    planned, last = levels[BATCHES], levels[-1]
    assert planned["net.heads.1.weight"] == last["net.heads.1.weight"]
    assert planned["net.first.weight"] != last["net.first.weight"]


class Overflows(pl.Callback):
    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1 and trainer.global_rank == 1:
            trainer.strategy.memory["net.0.weight"]["seen"].fill_(torch.inf)


def _overflow() -> list[list[dict[str, float]]]:
    watches = [Watch(), Watch()]
    for strategy, watch in zip((dgc(adapt="lgreco"), power(adapt="lgreco")), watches, strict=True):
        fit(strategy, Task(), [Overflows(), watch], epochs=4)
    return [watch.levels for watch in watches]


def test_sums_that_overflow_on_one_rank_change_no_level() -> None:
    both, other = on_ranks(RANKS, _overflow)
    assert both == other
    for levels in both:
        first, second = (levels[epoch * BATCHES] for epoch in (1, 2))
        assert first == second
    assert both[0][-1] != both[0][BATCHES], "the next plan is made"


def _guard(adapt_every: int) -> list[str]:
    seen: list[str] = []
    strategy = power(adapt="lgreco", adapt_every=adapt_every)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(strategy), "_exchange", guarded(type(strategy)._exchange, seen, "_exchange"))
        fit(strategy, epochs=1, log_every_n_steps=1000)
    return seen


def _guard_both() -> None:
    assert _guard(1000).count("_exchange") == BATCHES
    with pytest.raises(AssertionError, match="waits for the device"):
        _guard(3)


def test_only_plans_wait_for_the_device() -> None:
    on_ranks(1, _guard_both)


# Checkpoints.


def _save(build: Callable[..., Any], folder: Path) -> Any:
    saves = Saves(folder / "saved.ckpt", 2 * BATCHES - 2)
    fit(build(adapt="lgreco"), Task(momentum=0.9), [saves], epochs=2)
    return saves.state


def _resume(build: Callable[..., Any], folder: Path, **changes: Any) -> tuple[Any, list[str], Result]:
    looks = Looks()
    strategy = build(**{"adapt": "lgreco", "residual_policy": "mean", **changes})
    with said() as lines:
        module, quiet = Task(momentum=0.9), {"logger": False, "enable_checkpointing": False}
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy=strategy,
            max_epochs=3,
            callbacks=[looks],
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **quiet,
        )
        trainer.fit(
            module, DataLoader(TensorDataset(*samples()), BATCH), ckpt_path=folder / "saved.ckpt", weights_only=True
        )
    return looks.state, lines, {"levels": dict(strategy.levels), "memory": strategy.memory}


@pytest.fixture(scope="module", params=[dgc, power], ids=["dgc", "power"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list[Any]]:
    """Return what builds a strategy, a folder with its checkpoint in the middle of an epoch, and each rank's state."""
    folder = tmp_path_factory.mktemp("saved")
    return request.param, folder, on_ranks(RANKS, _save, request.param, folder)


def test_one_rank_goes_on_with_the_levels_and_the_mean_of_the_sums(saved: tuple[Any, Path, list[Any]]) -> None:
    build, folder, states = saved
    ((found, _, after),) = on_ranks(1, _resume, build, folder)
    assert found["levels"] == states[0]["levels"] == states[1]["levels"]
    assert set(found["levels"]) == set(found["seen"]) == set(LAYERS)
    for name, sums in found["seen"].items():
        assert_close(sums, (states[0]["seen"][name] + states[1]["seen"][name]) / 2)
        assert not torch.equal(states[0]["seen"][name], states[1]["seen"][name])
    assert set(after["levels"]) == set(LAYERS)


def test_other_settings_start_from_the_uniform_level_and_say_so(saved: tuple[Any, Path, list[Any]]) -> None:
    build, folder, states = saved
    other = {"ratio": 0.1} if build is dgc else {"rank": 1}
    work = [{**other}, {"adapt": None}, {"adapt_every": 7}]
    found = on_ranks(RANKS, lambda: [_resume(build, folder, **changes) for changes in work])[0]
    (changed, lines, _), (off, _, after), (every, _, _) = found
    word = "shares" if build is dgc else "ranks"
    assert not changed["levels"]
    assert any(f"drops the {word} that were planned for other settings" in line for line in lines)
    assert not off["levels"]
    assert not off["seen"]
    assert not any("seen" in kept for kept in after["memory"].values())
    assert every["levels"] == states[0]["levels"]


# What is shown.


def _report(folder: Path) -> dict[str, Any]:
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_adaptive, "rank_zero_info", lines.append)
        strategy = power(adapt="lgreco")
        result = fit(strategy, epochs=3, logger=CSVLogger(folder, "", ""))
    return {"lines": lines, "metrics": result["metrics"], "levels": dict(strategy.levels), "sent": result["sent"]}


def test_lines_tables_and_values_show_the_plan(tmp_path: Path) -> None:
    (found,) = on_ranks(1, _report, tmp_path)
    first, second = found["lines"]
    assert first.startswith("PowerSGDStrategy planned ranks from ")
    assert " for 2 layers in " in first
    assert f"instead of {8 * (96 + 68):,}" in first
    assert "the plan before had" not in first
    assert "the plan before had" in second
    values = found["metrics"][-1]
    assert values["comm/plan_bytes"] == pytest.approx((found["sent"][-1] - DENSE) / (8 * (96 + 68)))
    assert f"{values['comm/plan_error']:.3g} times the error" in second
    assert values["comm/plan_ms"] > 0
    assert "comm/plan_bytes" not in found["metrics"][BATCHES - 1]
    assert "comm/plan_error" not in found["metrics"][BATCHES]
    with (tmp_path / "power_sgd_strategy_layers.csv").open() as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    for name, (r, c) in LAYERS.items():
        assert float(rows[name]["rank"]) == found["levels"][name]
        assert int(rows[name]["bytes"]) == 4 * found["levels"][name] * (r + c)
    assert rows["net.0.bias"]["rank"] == ""


class Unequal(pl.LightningModule):
    """A wide layer whose gradient is of rank one, and one that needs all of its rank."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.wide, self.small = nn.Linear(32, 128, bias=False), nn.Linear(32, 16, bias=False)

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = (part.chunk(self.trainer.world_size)[self.global_rank] for part in batch)
        target = F.one_hot(y, 4).float().repeat(1, 4) + x[:, :16]
        return 0.1 * self.wide(x.mean(0)).square().mean() + 10 * F.mse_loss(self.small(x), target)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def _train_unequal(adapt: Any) -> tuple[int, float, dict[str, float]]:
    strategy = power(adapt=adapt, rank=4, min_gain=1.0)
    result = fit(strategy, Unequal(), epochs=3)
    return result["sent"][-1], result["metrics"][-1].get("comm/plan_error", 1.0), dict(strategy.levels)


def test_unequal_layers_send_less_at_no_more_error() -> None:
    first, _ = on_ranks(RANKS, lambda: [_train_unequal(adapt) for adapt in (None, "lgreco")])
    (uniform, _, _), (adapted, error, levels) = first
    assert levels["wide.weight"] < 4 <= levels["small.weight"]
    assert adapted < 0.7 * uniform
    assert error < 1.0
