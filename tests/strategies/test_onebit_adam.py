"""1-bit Adam against DDP before the freeze, and against the algorithm written out by hand and sums of gradients after it."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, AdamW, Optimizer

from lightning_grad import callbacks
from lightning_grad.functional.communication.sign_messages import sign_bytes
from lightning_grad.strategies import OneBitAdamStrategy
from lightning_grad.strategies._frozen_adam import why_not_frozen
from lightning_grad.strategies._local_momentum import why_not_moved
from lightning_grad.testing import on_ranks
from tests.strategies.ranks import (
    BATCH,
    BATCHES,
    Result,
    Task,
    assert_close,
    assert_same,
    fit,
    said,
    samples,
    small_net,
    with_schedule,
)

LARGE = ["0.weight", "2.weight"]
FREEZE = 3
FLOOR = 0.05


class AdamTask(Task):
    """The small task with another optimizer.

    Args:
        kind: Class of the optimizer.
        net: What is trained; default the small net.
        cycle: Whether rate and betas follow a ``OneCycleLR``.
        options: Of the optimizer.
    """

    def __init__(
        self, kind: type[Optimizer] = Adam, net: nn.Module | None = None, cycle: bool = False, **options: Any
    ) -> None:
        super().__init__(net, cycle, **{"lr": 0.01, **options})
        self.kind = kind

    def configure_optimizers(self) -> Any:
        optimizer = self.kind(self.parameters(), **self.options)
        return with_schedule(optimizer) if self.cycle else optimizer


def one_bit(**changes: Any) -> OneBitAdamStrategy:
    return OneBitAdamStrategy(**{"freeze_step": FREEZE, "variance_floor": FLOOR, "min_numel": 1, **changes})


# What differs from one_bit(), AdamTask(), Trainer() and DDP's own options.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Adam": ({}, {}, {}, {}),
    "AdamW": ({}, {"kind": AdamW, "weight_decay": 0.1}, {}, {}),
    "Adam with decay": ({}, {"weight_decay": 0.1}, {}, {}),
    "AMSGrad": ({}, {"amsgrad": True}, {}, {}),
    "maximize": ({}, {"maximize": True, "weight_decay": 0.1, "lr": 1e-3}, {}, {}),
    "schedule of rate and betas": ({}, {"kind": AdamW, "cycle": True}, {}, {}),
    "fused": ({}, {"kind": AdamW, "fused": True}, {}, {}),
    "a loop": ({}, {"foreach": False}, {}, {}),
    "clipped": ({"local_clip": 0.1}, {}, {}, {}),
    "accumulation": ({}, {}, {"accumulate_grad_batches": 2}, {}),
    "many buckets as views": ({"gradient_as_bucket_view": True}, {}, {}, {"bucket_cap_mb": 1e-4}),
}
CASES_OF = {1: ["Adam"], 2: list(CASES), 3: ["AdamW", "many buckets as views"]}
PLACES = [(ranks, case) for ranks, cases in CASES_OF.items() for case in cases]


def epochs_of(case: str) -> int:
    return 2 if CASES[case][2] else 1


def run(case: str) -> Result:
    strategy_options, optimizer, trainer, ddp = CASES[case]
    strategy = one_bit(**strategy_options)
    strategy._ddp_kwargs.update(ddp)
    return fit(strategy, AdamTask(**optimizer), epochs=epochs_of(case), precision="64-true", **trainer)


def scaled_signs(values: Tensor, ranks: int) -> Tensor:
    """Return signs times the mean magnitude of each rank's part, whose bounds are multiples of eight."""
    part = 8 * math.ceil(values.numel() / (8 * ranks))
    pieces = [piece.abs().mean().float().double() * (2.0 * (piece >= 0) - 1.0) for piece in values.split(part)]
    return torch.cat(pieces)


def by_hand(case: str, ranks: int) -> Result:
    """Return what a loop over ranks in one process gives, written from the paper's algorithm."""
    options, optimizer, trainer, _ = CASES[case]
    accumulate = trainer.get("accumulate_grad_batches", 1)
    net = small_net().double()
    weights = dict(net.named_parameters())
    task = AdamTask(net=net, **optimizer)
    configured = task.configure_optimizers()
    adam, schedule = (configured, None) if isinstance(configured, Optimizer) else (configured["optimizer"], configured)
    errors = [{name: torch.zeros(weights[name].numel()).double() for name in LARGE} for _ in range(ranks)]
    served = {name: torch.zeros(weights[name].numel()).double() for name in LARGE}
    variance: dict[str, Tensor] = {}
    x, y = samples()
    batches = list(zip(x.double().split(BATCH), y.split(BATCH), strict=True)) * epochs_of(case)
    for step in range(len(batches) // accumulate):
        gradients = []
        for rank in range(ranks):
            parts = [[half.chunk(ranks)[rank] for half in batch] for batch in batches[step * accumulate :][:accumulate]]
            loss = sum(F.cross_entropy(net(x), y) / accumulate for x, y in parts)
            found = torch.autograd.grad(loss, list(weights.values()))
            if "local_clip" in options:
                norm = torch.cat([g.flatten() for g in found]).norm()
                scale = (options["local_clip"] * math.sqrt(ranks) / (norm + 1e-6)).clamp(max=1.0)
                found = [g * scale for g in found]
            gradients.append(dict(zip(weights, found, strict=True)))
        sign = -1 if optimizer.get("maximize") else 1
        (group,) = adam.param_groups
        (beta1, beta2), t = group["betas"], step + 1
        for name, weight in weights.items():
            weight.grad = sum(g[name] for g in gradients) / ranks
            if name not in LARGE or step < FREEZE:
                continue
            state, weight.grad = adam.state[weight], None
            if name not in variance:
                key = "max_exp_avg_sq" if optimizer.get("amsgrad") else "exp_avg_sq"
                variance[name] = state[key] / (1 - beta2 ** (t - 1))
            decay = group["weight_decay"] * weight.detach()
            average = torch.zeros(weight.numel()).double()
            for rank in range(ranks):
                wanted = sign * beta1 * state["exp_avg"] + (1 - beta1) * gradients[rank][name]
                wanted = wanted.flatten() + errors[rank][name]
                average += scaled_signs(wanted, ranks) / ranks
                errors[rank][name] = wanted - scaled_signs(wanted, ranks)
            average += served[name]
            momentum = scaled_signs(average, ranks)
            served[name] = average - momentum
            state["exp_avg"] = sign * momentum.view(weight.shape)
            if optimizer.get("kind") is AdamW:
                weight.data -= group["lr"] * decay
            else:
                state["exp_avg"] += (1 - beta1) * decay
            floored = variance[name].clamp(min=FLOOR * variance[name].mean())
            weight.data -= group["lr"] * state["exp_avg"] / (1 - beta1**t) / (floored.sqrt() + group["eps"])
        adam.step()
        if schedule is not None:
            schedule["lr_scheduler"]["scheduler"].step()
    return {"weights": dict(net.state_dict(prefix="net.")), "errors": errors, "served": served, "variance": variance}


@pytest.fixture(scope="module")
def runs() -> dict[tuple[int, str], list[Result]]:
    """Return what every rank has of each case, by number of ranks and case."""
    found = {}
    for ranks, cases in CASES_OF.items():
        everyone = on_ranks(ranks, partial(lambda cases: [run(case) for case in cases], cases))
        for case, *results in zip(cases, *everyone, strict=True):
            found[ranks, case] = results
    return found


@pytest.mark.parametrize(("ranks", "case"), PLACES)
def test_it_is_the_algorithm_written_by_hand(ranks: int, case: str, runs: dict[tuple[int, str], list[Result]]) -> None:
    results, expected = runs[ranks, case], by_hand(case, ranks)
    assert_close(results[0]["weights"], expected["weights"], 1e-7)
    for rank, result in enumerate(results):
        assert set(result["memory"]) == {f"net.{name}" for name in LARGE}
        for name in LARGE:
            kept = result["memory"][f"net.{name}"]
            assert_close(kept["worker"], expected["errors"][rank][name], 1e-7)
            of_part = expected["served"][name].split(len(kept[f"server/{rank}"]))
            if rank < len(of_part):  # a small tensor has fewer parts
                assert_close(kept[f"server/{rank}"][: len(of_part[rank])], of_part[rank], 1e-7)
                assert not kept[f"server/{rank}"][len(of_part[rank]) :].any()


@pytest.mark.parametrize(("ranks", "case"), PLACES)
def test_weights_and_state_are_the_same_bits_on_all_ranks(
    ranks: int, case: str, runs: dict[tuple[int, str], list[Result]]
) -> None:
    first, *others = runs[ranks, case]
    for other in others:
        assert_same(other["weights"], first["weights"])
        assert_same(other["optimizer"], first["optimizer"])
    assert not torch.equal(first["weights"]["net.0.weight"].float(), small_net()[0].weight), "it has learnt"


@pytest.mark.parametrize(("ranks", "case"), [place for place in PLACES if place[1] != "schedule of rate and betas"])
def test_what_arrived_and_what_is_unsent_are_all_gradients(
    ranks: int, case: str, runs: dict[tuple[int, str], list[Result]]
) -> None:
    results = runs[ranks, case]
    for name in (f"net.{name}" for name in LARGE):
        sent = sum(mean[name] for mean in results[0]["mean"][FREEZE:])
        arrived = 0.1 * sent  # the momentum gets a tenth of each gradient
        gradients = 0.1 * sum(local[name] for result in results for local in result["local"][FREEZE:]) / ranks
        if case == "clipped":
            continue  # what is recorded is not clipped yet
        worker = sum(result["memory"][name]["worker"] for result in results).view(arrived.shape) / ranks
        parts = [result["memory"][name][f"server/{rank}"] for rank, result in enumerate(results)]
        server = torch.cat(parts)[: arrived.numel()].view(arrived.shape)
        assert ((arrived + worker + server - gradients).norm() / gradients.norm()).item() < 1e-6
        assert worker.norm() + server.norm() > 0.1 * gradients.norm(), "something waits"


@pytest.mark.parametrize(("ranks", "case"), PLACES)
def test_state_is_that_of_adam_with_the_variance_of_the_freeze(
    ranks: int, case: str, runs: dict[tuple[int, str], list[Result]]
) -> None:
    if case == "schedule of rate and betas":
        return  # betas of other steps
    state, expected = runs[ranks, case][0]["optimizer"]["state"], by_hand(case, ranks)["variance"]
    steps = epochs_of(case) * BATCHES // CASES[case][2].get("accumulate_grad_batches", 1)
    for index, name in ((0, LARGE[0]), (2, LARGE[1])):
        key = "max_exp_avg_sq" if CASES[case][1].get("amsgrad") else "exp_avg_sq"
        assert int(state[index]["step"]) == steps
        assert_close(state[index][key] / (1 - 0.999**steps), expected[name])


@pytest.mark.parametrize(("ranks", "case"), PLACES)
def test_bytes_are_those_of_the_signs(ranks: int, case: str, runs: dict[tuple[int, str], list[Result]]) -> None:
    steps = epochs_of(case) * BATCHES // CASES[case][2].get("accumulate_grad_batches", 1)
    dense = 8 * (2048 + 256 + 64 + 4 + 1)
    frozen = ranks * sum(8 * math.ceil(numel / (8 * ranks)) // 8 + 4 for numel in (2048, 256)) + 8 * (64 + 4 + 1)
    for result in runs[ranks, case]:
        assert result["sent"] == [dense] * FREEZE + [frozen] * (steps - FREEZE) or (
            case == "accumulation" and result["sent"][-1] == frozen
        )
        assert result["ledger"]["sent_bytes"] == FREEZE * dense + (steps - FREEZE) * frozen
    assert sign_bytes(2048, ranks) + sign_bytes(256, ranks) == frozen - 8 * (64 + 4 + 1)


# Before the freeze.


def test_before_the_freeze_it_is_adam_under_ddp() -> None:
    def work() -> tuple[Result, Result]:
        return fit(one_bit(freeze_step=100), AdamTask()), fit(DDPStrategy(), AdamTask())

    with said() as lines:
        for ours, ddp in on_ranks(2, work):
            assert_close(ours["weights"], ddp["weights"])
            assert ours["memory"] == {}
            assert ours["ratio"] == pytest.approx(1, abs=1e-3)
    assert lines == []  # a rank's


def test_a_run_that_ends_before_the_freeze_is_warned_about() -> None:
    def work() -> tuple[list[str], list[str]]:
        found = []
        for freeze in (2 * BATCHES, 2 * BATCHES - 1):
            with said() as lines:
                fit(one_bit(freeze_step=freeze), AdamTask())
            found.append([line for line in lines if "everything is sent dense" in line])
        return found[0], found[1]

    (((line,), none),) = on_ranks(1, work)
    assert f"after {2 * BATCHES} updates, but the run has {2 * BATCHES} steps" in line
    assert none == []


def test_a_parameter_is_frozen_after_its_own_updates() -> None:
    """One that gets its first gradient late has no variance to freeze yet."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.late, self.calls = *small_net()[::2], small_net()[0], 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            hidden = self.first(x).relu()
            return self.last(hidden + self.late(x) if self.calls > 4 else hidden)

    def work() -> tuple[list[float], set[str]]:
        result = fit(one_bit(find_unused_parameters=True), AdamTask(net=Late()))
        return [metrics["comm/frozen"] for metrics in result["metrics"]], set(result["memory"])

    for frozen, names in on_ranks(2, work):
        assert frozen == pytest.approx([0] * FREEZE + [2 / 3] * 4 + [1] * (2 * BATCHES - FREEZE - 4))
        assert names == {"net.first.weight", "net.last.weight", "net.late.weight"}


def test_a_tensor_without_any_gradient_is_not_frozen() -> None:
    """Its variance is zero, and so is its floor: signs would move it by rate / eps."""

    class Gated(nn.Module):
        def __init__(self, opens: int) -> None:
            super().__init__()
            self.net, self.branch, self.calls, self.opens = small_net(), small_net(), 0, opens

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.net(x) + float(self.calls > self.opens) * self.branch(x)

    def work() -> tuple[list[float], float]:
        result = fit(one_bit(), AdamTask(net=Gated(opens=FREEZE + 1), lr=1e-3))
        moved = result["weights"]["net.branch.0.weight"] - small_net()[0].weight.detach()
        return [metrics["comm/frozen"] for metrics in result["metrics"]], float(moved.abs().max())

    for frozen, moved in on_ranks(2, work):
        assert frozen == [0] * FREEZE + [1 / 2] * FREEZE + [1] * (2 * BATCHES - 2 * FREEZE)
        assert moved < 12 * 1e-3 / math.sqrt(FLOOR)


def test_a_second_update_with_one_gradient_keeps_the_variance_too() -> None:
    class Twice(AdamTask):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            optimizer.optimizer.step()

    def work() -> tuple[Tensor, Tensor]:
        kept = []

        class Keeps(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                state = trainer.optimizers[0].state[trainer.model.module.net[0].weight]
                kept.append(state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"])))

        fit(one_bit(freeze_step=4), Twice(lr=1e-4), [Keeps()], epochs=1)
        return kept[1], kept[-1]

    ((at_freeze, at_end),) = on_ranks(1, work)
    assert_close(at_end, at_freeze)


# The floor.


def test_the_floor_keeps_entries_without_gradient_where_they_are() -> None:
    """Inputs that were zero while the variance was estimated: their signs alone would move them by rate / eps."""

    def work() -> list[float]:
        x, y = samples()
        x[:, :16] = 0.0
        data = torch.utils.data.TensorDataset(x, y)
        moved = []
        for floor in (FLOOR, 1e-30):
            found = fit(one_bit(variance_floor=floor), AdamTask(lr=1e-3), data=data)["weights"]["net.0.weight"]
            moved.append(float((found - small_net()[0].weight.detach())[:, :16].abs().max()))
        return moved

    for held, unbounded in on_ranks(2, work):
        assert held < 12 * 1e-3 / math.sqrt(FLOOR)
        assert unbounded > 100


# Resuming.


class _Saves(pl.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def _resumed(path: Path, **options: Any) -> Result:
    strategy, task = one_bit(**options), AdamTask()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=torch.distributed.get_world_size(),
        strategy=strategy,
        max_steps=BATCHES,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_train_batches=BATCHES,
    )
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples()), BATCH)
    trainer.fit(task, data, ckpt_path=path)
    return {"memory": strategy.memory, "step": trainer.global_step}


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_another_number_of_ranks_keeps_the_sum_of_all_errors(before: int, after: int, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    saved = on_ranks(before, lambda: fit(one_bit(), AdamTask(), [_Saves(path, BATCHES)], epochs=1)["memory"])
    loaded = on_ranks(after, lambda: _resumed(path, residual_policy="mean"))  # at its last step: nothing is trained
    for name in (f"net.{name}" for name in LARGE):
        expected = sum(memory[name]["worker"] for memory in saved) / before
        parts = torch.cat([memory[name][f"server/{rank}"] for rank, memory in enumerate(saved)])
        expected = expected + parts[: len(expected)]
        for result in loaded:
            assert result["step"] == BATCHES
            assert_close(result["memory"][name]["worker"], expected)
        for rank, result in enumerate(loaded):
            assert set(result["memory"][name]) == {"worker", f"server/{rank}"}
            assert not result["memory"][name][f"server/{rank}"].any()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_another_number_of_ranks_goes_on_from_an_exchange_that_failed_on_all_ranks(tmp_path: Path) -> None:
    """Its gradients are in the errors already, and nothing is added to them before they are sent."""
    path = tmp_path / "run.ckpt"

    class Fails(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == FREEZE + 1:
                trainer.strategy.ranks.swap = self.fail

        def fail(self, rows: Tensor) -> Tensor:
            raise RuntimeError("the network is down")

        def on_exception(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(path)

    def work() -> None:
        with pytest.raises(RuntimeError, match="the network is down"):
            fit(one_bit(), AdamTask(), [Fails()], epochs=1)

    on_ranks(2, work)
    for result in on_ranks(3, lambda: _resumed(path, residual_policy="mean")):
        assert result["step"] == BATCHES


def test_adam_goes_on_from_a_checkpoint_under_ddp_with_the_variance_of_the_freeze(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"

    def work() -> Tensor:
        result = fit(one_bit(), AdamTask(lr=1e-3), [_Saves(path, BATCHES)], epochs=1)
        return result["optimizer"]["state"][0]["exp_avg_sq"]

    (variance, _) = on_ranks(2, work)
    state = torch.load(path, weights_only=True)["optimizer_states"][0]
    module = AdamTask(lr=1e-3)
    optimizer = module.configure_optimizers()
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[module.net[0].weight]["exp_avg_sq"], variance)
    assert int(optimizer.state[module.net[0].weight]["step"]) == BATCHES


# What is refused.


def _swapped() -> Any:
    return [callbacks.OptimizerSwap(optimizer="lion")]


class _OwnAdam(Adam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], tuple[str, ...]]] = {
    "SGD": (partial(AdamTask, torch.optim.SGD), list, {}, ("(exp_avg_sq) of Adam, and SGD", "ddp_powersgd")),
    "NAdam": (partial(AdamTask, torch.optim.NAdam), list, {}, ("but NAdam is not torch.optim.Adam or AdamW",)),
    "own step": (partial(AdamTask, _OwnAdam), list, {}, ("but _OwnAdam is not torch.optim.Adam",)),
    "differentiable": (partial(AdamTask, differentiable=True), list, {}, ("differentiable=True",)),
    "clipping": (AdamTask, list, {"gradient_clip_val": 0.5}, ("OneBitAdamStrategy(local_clip=0.5)", "as signs")),
    "a clipping callback": (AdamTask, lambda: [callbacks.ZClip()], {}, ("OneBitAdamStrategy(local_clip=...)",)),
    "reset moments": (AdamTask, lambda: [callbacks.MomentumReset(5)], {}, ("MomentumReset would set it to zero",)),
    "another optimizer": (AdamTask, _swapped, {}, ("a callback has replaced it by",)),
}


@pytest.fixture(scope="module")
def refusals() -> dict[str, str]:
    def provoke() -> dict[str, str]:
        words = {}
        for name, (make, others, options, _) in REFUSED.items():
            with pytest.raises(ValueError, match=r"\. ") as error:
                fit(one_bit(), make(), [_NoBatch(), *others()], **options)
            words[name] = str(error.value)
        return words

    return on_ranks(1, provoke)[0]


class _NoBatch(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("a batch was trained before the refusal")


@pytest.mark.parametrize(("kind", "why"), [(Adam, why_not_frozen), (torch.optim.SGD, why_not_moved)])
def test_a_subclass_that_keeps_the_step_is_no_other_optimizer(kind: type[Optimizer], why: Any) -> None:
    """torch gives each class a step of its own at the first instance."""
    weights = [nn.Parameter(torch.zeros(2))]
    assert why(type("Inherits", (kind,), {})(weights, lr=0.1)) == ""
    kind(weights, lr=0.1)
    assert why(type("Inherits", (kind,), {})(weights, lr=0.1)) == ""
    own = type("Own", (kind,), {"step": lambda self, closure=None: None})
    assert "Own is not torch.optim." in why(own(weights, lr=0.1))


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_the_first_batch(name: str, refusals: dict[str, str]) -> None:
    for words in REFUSED[name][3]:
        assert words in refusals[name]


def test_a_neutral_setting_refuses_no_optimizer() -> None:
    def work() -> tuple[Result, Result]:
        sgd = partial(AdamTask, torch.optim.SGD)
        options = {"gradient_clip_val": 0.5}
        return fit(one_bit(freeze_step=None), sgd(), **options), fit(DDPStrategy(), sgd(), **options)

    ((ours, ddp),) = on_ranks(1, work)
    assert_same(ours["weights"], ddp["weights"])
