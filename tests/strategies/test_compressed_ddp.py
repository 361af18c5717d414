"""What holds for every compressed strategy in a training: bad gradients, logs, odd modules, precisions, accumulation."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import SkipNonFinite
from lightning_grad.functional.communication.sparse_messages import pairs_bytes
from lightning_grad.strategies import PowerSGDStrategy
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
    samples,
    small_net,
)

KINDS: dict[str, Callable[..., Any]] = {
    "DGC": dgc,
    "PowerSGD": lambda **changes: PowerSGDStrategy(**{"rank": 2, "min_gain": 1.0, "min_numel": 1, **changes}),
}
RESIDUAL = {"DGC": "residual", "PowerSGD": "error"}
kinds = pytest.mark.parametrize("kind", KINDS)

BYTES = {"DGC": pairs_bytes([103, 13]) + 4 * (64 + 4 + 1), "PowerSGD": 4 * (2 * (64 + 32) + 2 * (4 + 64) + 64 + 4 + 1)}
DENSE = 4 * (2048 + 256 + 64 + 4)


def noise_after(results: list[Result], steps: Iterable[int]) -> list[float]:
    """Return what is logged if two ranks' noise is measured in these steps, from gradients that were recorded."""
    found, terms = [], None
    for step in steps:
        each = [torch.cat([g.flatten() for g in result["local"][step].values()]).double() for result in results]
        small = sum(float(g.square().sum()) for g in each) / 2
        big = float((sum(each) / 2).square().sum())
        now = (small - big) / (1 - 1 / 2), (2 * big - small) / (2 - 1)
        terms = now if terms is None else tuple(0.9 * old + 0.1 * new for old, new in zip(terms, now, strict=True))
        found.append(terms[0] / terms[1] if terms[1] > 0 else float("inf"))
    return found


class Clear(Task):
    """Has a part of the gradient that all samples share, so that the noise scale is a number and not infinity."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        return loss + self.net[2].bias.sum()  # which moves no prediction


# A gradient that is not finite.


class Broken(Clear):
    """The second rank's loss is no number in the second batch, and infinite in the fourth."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        if self.global_rank == 1 and self.trainer.current_epoch == 0 and batch_idx in (1, 3):
            loss = loss * float("nan" if batch_idx == 1 else "inf")
        return loss


class Remember(pl.Callback):
    """Keeps copies of the memory and the weights after each batch."""

    def __init__(self) -> None:
        self.memory: list[dict[str, dict[str, Tensor]]] = []
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        memory = trainer.strategy.memory.items()
        self.memory.append({name: {key: v.clone() for key, v in kept.items()} for name, kept in memory})
        self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))


@pytest.fixture(scope="module")
def broken() -> dict[str, list[tuple[Result, Remember]]]:
    """Return, for each kind, both ranks' runs in which one rank's gradients are not finite twice."""

    def work() -> dict[str, tuple[Result, Remember]]:
        found = {}
        for kind, make in KINDS.items():
            remember = Remember()
            module = Broken(momentum=0.9) if kind == "DGC" else Broken()
            found[kind] = fit(make(log_noise_scale=True), module, [SkipNonFinite(max_warnings=0), remember]), remember
        return found

    everyone = on_ranks(2, work)
    return {kind: [found[kind] for found in everyone] for kind in KINDS}


@kinds
def test_the_mean_is_nan_on_all_ranks(kind: str, broken: dict[str, list[tuple[Result, Remember]]]) -> None:
    """Recorded after SkipNonFinite, which sets gradients to None; so none is there."""
    for result, _ in broken[kind]:
        assert [step for step, mean in enumerate(result["mean"]) if not mean] == [1, 3]
        assert all(value.isfinite().all() for mean in result["mean"] for value in mean.values())


@kinds
def test_without_a_guard_every_mean_holds_nan_on_every_rank(kind: str) -> None:
    def work() -> Result:
        return fit(KINDS[kind](), Broken(), epochs=1, limit_train_batches=2)

    first, second = on_ranks(2, work)
    for result in (first, second):
        assert all(value.isfinite().all() for value in result["mean"][0].values())
        assert all(value.isnan().any() for value in result["mean"][1].values())
        for kept in result["memory"].values():
            assert all(value.isfinite().all() for value in kept.values())
    for name, value in first["mean"][1].items():
        assert torch.equal(value.isnan(), second["mean"][1][name].isnan())


@kinds
def test_the_step_is_skipped_everywhere_and_training_goes_on(
    kind: str, broken: dict[str, list[tuple[Result, Remember]]]
) -> None:
    (first, watched), (second, _) = broken[kind]
    assert_same(first["weights"], second["weights"])
    assert_same(first["optimizer"], second["optimizer"])
    for step in range(1, len(watched.weights)):
        assert torch.equal(watched.weights[step], watched.weights[step - 1]) == (step in (1, 3)), step
    assert watched.weights[-1].isfinite().all()


@kinds
def test_nothing_counts_as_sent(kind: str, broken: dict[str, list[tuple[Result, Remember]]]) -> None:
    """The finite rank keeps all of its gradient, with the momentum, and the other one what it had."""
    for rank, (result, remember) in enumerate(broken[kind]):
        for step in (1, 3):
            for name, kept in remember.memory[step].items():
                before = remember.memory[step - 1][name]
                local = result["local"][step][name].flatten().nan_to_num(0.0, 0.0, 0.0) * (rank == 0)
                if kind == "DGC":
                    local = 0.9 * before["velocity"] + local
                    assert_close(kept["velocity"], local)
                assert_close(kept[RESIDUAL[kind]], before[RESIDUAL[kind]] + local)
                assert local.any() or (kind == "PowerSGD" and rank == 1)


@kinds
def test_bad_steps_are_left_out_of_the_noise(kind: str, broken: dict[str, list[tuple[Result, Remember]]]) -> None:
    results = [result for result, _ in broken[kind]]
    steps = [step for step in range(2 * BATCHES) if step not in (1, 3)]
    expected = noise_after(results, steps)[-1]
    assert expected < 1e3
    assert results[0]["metrics"][-1]["comm/noise_scale"] == pytest.approx(expected, rel=1e-3)


# What is logged.


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Result]], Any]:
    """Return, for each kind, both ranks' runs with a logger, and the folder of the logs."""
    folder = tmp_path_factory.mktemp("logged")

    def work() -> dict[str, Result]:
        found = {}
        for kind, make in KINDS.items():
            logger = CSVLogger(folder, name=None, version=kind)
            changes = {"warmup": [0.5], "ratio": 0.05} if kind == "DGC" else {}
            strategy = make(log_noise_scale=True, **changes)
            found[kind] = fit(strategy, Clear(), logger=logger, log_every_n_steps=2)
        return found

    everyone = on_ranks(2, work)
    return {kind: [found[kind] for found in everyone] for kind in KINDS}, folder


def rows(folder: Any, kind: str) -> list[dict[str, str]]:
    with (folder / kind / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("comm/bytes_sent")]


@kinds
def test_keys_and_steps_of_the_log(kind: str, logged: Any) -> None:
    keys = {"bytes_sent", "ratio", "residual_norm", "compress_ms", "noise_scale"}
    keys |= {"density"} if kind == "DGC" else set()
    found = rows(logged[1], kind)
    assert [int(row["step"]) for row in found] == [1, 3, 5, 7, 9, 11]
    for row in found:
        assert {key.removeprefix("comm/") for key, value in row.items() if value and key.startswith("comm/")} == keys
        assert 0.0 < float(row["comm/compress_ms"]) < 60_000
    assert {f"comm/{key}" for key in keys} <= logged[0][kind][0]["metrics"][-1].keys()


@kinds
def test_logged_bytes_ratio_and_residual(kind: str, logged: Any) -> None:
    results, folder = logged[0][kind], logged[1]
    noise = 4 * (2048 + 256 + 64 + 4 + 1)  # in log steps a sample of the gradient goes too, here all of it
    sizes = (
        [pairs_bytes([1024, 128]) + 4 * 69] * BATCHES + [BYTES[kind]] * BATCHES if kind == "DGC" else [BYTES[kind]] * 12
    )
    for place, row in enumerate(rows(folder, kind)):
        size = sizes[2 * place + 1] + noise
        assert float(row["comm/bytes_sent"]) == size
        assert float(row["comm/ratio"]) == pytest.approx(DENSE / size)
    assert results[0]["sent"] == [size + noise * (step % 2) for step, size in enumerate(sizes)]
    kept = torch.cat([kept[RESIDUAL[kind]] for kept in results[0]["memory"].values()])
    assert float(row["comm/residual_norm"]) == pytest.approx(float(kept.norm()), rel=1e-5)


def test_the_logged_density_is_that_of_the_warm_up(logged: Any) -> None:
    assert [float(row["comm/density"]) for row in rows(logged[1], "DGC")] == [0.5, 0.5, 0.5, 0.05, 0.05, 0.05]


@kinds
def test_the_noise_scale_is_that_of_the_recorded_gradients(kind: str, logged: Any) -> None:
    expected = noise_after(logged[0][kind], range(1, 2 * BATCHES, 2))
    assert all(0 < value < 1e3 for value in expected)
    found = [float(row["comm/noise_scale"]) for row in rows(logged[1], kind)]
    assert found == pytest.approx(expected, rel=1e-3)


@kinds
def test_the_end_of_a_run_is_summed_up(kind: str, logged: Any) -> None:
    results, folder = logged[0][kind], logged[1] / kind
    ledger = results[0]["ledger"]
    with (folder / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["comm/total_megabytes"]) == pytest.approx(ledger["sent_bytes"] / 1e6)
    assert float(last["comm/final_ratio"]) == pytest.approx(ledger["dense_bytes"] / ledger["sent_bytes"])
    stem = {"DGC": "dgc_strategy", "PowerSGD": "power_sgd_strategy"}[kind]
    with (folder / f"{stem}_layers.csv").open() as file:
        layers = {row["layer"]: row for row in csv.DictReader(file)}
    assert {name: int(row["entries"]) for name, row in layers.items()} == {
        "net.0.weight": 2048,
        "net.0.bias": 64,
        "net.2.weight": 256,
        "net.2.bias": 4,
    }
    assert sum(int(row["bytes"]) for row in layers.values()) + 4 == BYTES[kind]
    assert (folder / f"{stem}.png").stat().st_size > 1000
    assert [row["step"] for row in ledger["record"]["rows"]] == [1, 3, 5, 7, 9, 11], "as the loggers count"
    with (folder / f"{stem}.csv").open() as file:
        sent = [row["bytes_sent"] for row in csv.DictReader(file)]
    assert sent == [row["comm/bytes_sent"] for row in rows(logged[1], kind)]


# Modules of all sorts.


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = small_net()[0]
        self.second = nn.Linear(64, 64)
        self.third = nn.Linear(64, 64)
        self.third.weight = self.second.weight
        self.last = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.third(self.second(self.first(x).relu()).relu()))


def frozen() -> nn.Module:
    net = Tied()
    net.first.requires_grad_(False)
    return net


def compiled() -> nn.Module:
    net = small_net()
    net[0] = torch.compile(net[0], backend="eager")
    return net


def transposed() -> nn.Module:
    net = nn.Sequential(nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 16, 3), nn.Flatten(), nn.Linear(64, 4))
    net = net.to(memory_format=torch.channels_last)
    net[3].weight = nn.Parameter(net[3].weight.detach().t().contiguous().t())  # column by column in memory
    return net


class TwoTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = small_net()[0], small_net()[2].double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu().double())


MODULES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "tied": (Tied, {"first", "second", "last"}),
    "frozen": (frozen, {"second", "last"}),
    "compiled": (compiled, {"0", "2"}),
    "transposed": (transposed, {"1", "3"}),
    "two types": (TwoTypes, {"first", "last"}),
}


@pytest.fixture(scope="module")
def odd() -> dict[str, list[Result]]:
    """Return both ranks' runs of each odd module under DDP, DGC that sends all, DGC, and PowerSGD."""
    strategies = {
        "DDP": DDPStrategy,
        "all sent": lambda: dgc(ratio=0.9999999, momentum_masking=False),
        **KINDS,
    }

    def work() -> dict[str, Result]:
        found = {}
        for name, (make, _) in MODULES.items():
            for strategy, build in strategies.items():
                if (name, strategy) == ("two types", "PowerSGD"):
                    continue  # see test_powersgd.py
                torch.manual_seed(5)
                found[f"{name}, {strategy}"] = fit(build(), Task(make(), momentum=0.9, weight_decay=0.01), epochs=1)
        return found

    everyone = on_ranks(2, work)
    return {name: [found[name] for found in everyone] for name in everyone[0]}


@pytest.mark.parametrize("name", MODULES)
def test_odd_modules_train_as_under_ddp(name: str, odd: dict[str, list[Result]]) -> None:
    for found, expected in zip(odd[f"{name}, all sent"], odd[f"{name}, DDP"], strict=True):
        assert_close(found["weights"], expected["weights"])


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in MODULES for kind in KINDS if (name, kind) != ("two types", "PowerSGD")]
)
def test_odd_modules_are_compressed_by_name(name: str, kind: str, odd: dict[str, list[Result]]) -> None:
    first, second = odd[f"{name}, {kind}"]
    assert_same(first["weights"], second["weights"])
    expected = {f"net.{layer}.weight" for layer in MODULES[name][1]}
    assert set(first["memory"]) == expected, "once each, without a compiler's prefix"
    assert any(kept[RESIDUAL[kind]].any() for kept in first["memory"].values())
    assert not torch.equal(first["mean"][0][next(iter(first["mean"][0]))], torch.tensor(0.0))


def test_layouts_in_memory_do_not_move_entries(odd: dict[str, list[Result]]) -> None:
    """With momentum 0.9 and masking, what is unsent is still at its own place: weights and residual have one order."""
    result = odd["transposed, DGC"][0]
    weight = result["weights"]["net.1.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    mean = result["mean"][0]["net.1.weight"]
    assert mean.is_contiguous(memory_format=torch.channels_last)
    local = [ranks["local"][0]["net.1.weight"].flatten() for ranks in odd["transposed, DGC"]]
    sent = mean.permute(0, 2, 3, 1).flatten()  # in the order of memory, as the recorded gradients are
    chosen = [g.abs().topk(15).indices for g in local]
    expected = torch.zeros_like(sent)
    for g, places in zip(local, chosen, strict=True):
        expected[places] += g[places] / 2
    assert_close(sent, expected)


# Precision.


@kinds
def test_bf16(kind: str) -> None:
    def work() -> dict[str, Result]:
        modules = {precision: Task(momentum=0.9) for precision in ("bf16-mixed", "bf16-true")}
        return {precision: fit(KINDS[kind](), module, precision=precision) for precision, module in modules.items()}

    first, second = on_ranks(2, work)
    for precision, value in (("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)):
        assert_same(first[precision]["weights"], second[precision]["weights"])
        for result in (first[precision], second[precision]):
            assert result["weights"]["net.0.weight"].dtype == value
            for kept in result["memory"].values():
                assert all(tensor.dtype == torch.float32 for tensor in kept.values())
                assert kept[RESIDUAL[kind]].any()
        assert first[precision]["ledger"]["dense_bytes"] == 12 * DENSE * value.itemsize / 4


# The loop.


class Sometimes(Task):
    """Makes no loss in the third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 2 else loss


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@kinds
def test_a_batch_without_a_loss_is_left_out(kind: str) -> None:
    def work() -> tuple[Result, Remember]:
        remember = Remember()
        return fit(KINDS[kind](), Sometimes(momentum=0.9), [remember], epochs=1), remember

    ((first, watched),) = on_ranks(1, work)  # Lightning refuses it on several
    assert first["ledger"]["steps"] == BATCHES - 1
    assert_same(watched.memory[2], watched.memory[1])
    assert not torch.equal(watched.weights[3], watched.weights[2])


@kinds
def test_one_exchange_a_step_under_accumulation(kind: str) -> None:
    def work() -> Result:
        return fit(KINDS[kind](), accumulate_grad_batches=4, epochs=2)

    for result in on_ranks(2, work):
        assert len(result["local"]) == result["ledger"]["steps"] == 4, "two an epoch, the second of two batches"
        assert len(result["mean"]) == 4


@kinds
def test_lightnings_own_way_of_starting_ranks(kind: str, tmp_path: Any) -> None:
    """All other tests here start their ranks themselves."""

    class Save(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            torch.save(pl_module.state_dict(), tmp_path / f"{trainer.global_rank}.pt")

    name = {"DGC": "ddp_dgc_fork", "PowerSGD": "ddp_powersgd_fork"}[kind]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=name,
        max_epochs=1,
        callbacks=[Save()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Task()
    trainer.fit(module, DataLoader(TensorDataset(*samples()), BATCH))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(dict(first), dict(second))
    assert_same(dict(first), dict(module.state_dict()))


# Optimizers of users.


class Groups(Task):
    """Two groups of different settings, and one that joins later."""

    def configure_optimizers(self) -> Any:
        first, second, last = self.net[0], self.net[2].weight, self.net[2].bias
        groups = [
            {"params": list(first.parameters()), "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
            {"params": [last], "lr": 0.05, "momentum": 0.0},
        ]
        self.later = second
        return torch.optim.SGD(groups, lr=0.1, momentum=0.5)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.optimizers().add_param_group({"params": [self.later]})


class Look(pl.Callback):
    """Notes what hooks of the optimizer's step see."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for register in ("register_step_pre_hook", "register_step_post_hook"):
            getattr(trainer.optimizers[0], register)(self.note)

    def note(self, optimizer: Any, *_: Any) -> None:
        groups = optimizer.param_groups
        self.seen.append([(g["momentum"], g["nesterov"], g["weight_decay"], len(g["params"])) for g in groups])


def test_groups_of_different_settings_and_one_that_joins() -> None:
    def work() -> tuple[Result, Result, list[Any]]:
        look = Look()
        sent = fit(dgc(ratio=0.9999999, momentum_masking=False), Groups(), [look])
        return sent, fit(DDPStrategy(), Groups()), look.seen

    for sent, ddp, seen in on_ranks(2, work):
        assert_close(sent["weights"]["net.0.weight"], ddp["weights"]["net.0.weight"])
        assert sent["optimizer"]["param_groups"] == ddp["optimizer"]["param_groups"]
        assert_close(sent["weights"], ddp["weights"])
        before = [(0.9, True, 0.01, 2), (0.0, False, 0, 1)]
        assert seen == [before] * 12 + [[*before, (0.5, False, 0, 1)]] * 12


def test_monitors_see_the_users_momentum(tmp_path: Any) -> None:
    def work() -> None:
        for strategy, version in ((dgc(), "dgc"), (DDPStrategy(), "ddp")):
            logger = CSVLogger(tmp_path, name=None, version=version)
            fit(strategy, Task(momentum=0.9, cycle=True), [LearningRateMonitor(log_momentum=True)], logger=logger)

    on_ranks(2, work)
    found = {}
    for version in ("dgc", "ddp"):
        with (tmp_path / version / "metrics.csv").open() as file:
            table = list(csv.DictReader(file))
        found[version] = [(row["lr-SGD"], row["lr-SGD-momentum"]) for row in table if row.get("lr-SGD")]
    assert found["dgc"] == found["ddp"]
    assert len(set(found["dgc"])) == 12


class Adam(Task):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def test_any_optimizer_after_plain_error_feedback() -> None:
    def work() -> tuple[Result, Result, Result]:
        all_sent = dgc(ratio=0.9999999, correction="error_feedback")
        return fit(dgc(correction="error_feedback"), Adam()), fit(all_sent, Adam()), fit(DDPStrategy(), Adam())

    (sparse, sent, ddp), (other, _, _) = on_ranks(2, work)
    assert_same(sparse["weights"], other["weights"])
    assert all(kept.keys() == {"residual"} for kept in sparse["memory"].values())
    assert_same(sent["weights"], ddp["weights"])
    assert_same(sent["optimizer"], ddp["optimizer"])


def test_error_feedback_leaves_the_momentum_to_sgd() -> None:
    def work() -> tuple[Result, Result]:
        return fit(dgc(correction="error_feedback"), Task(momentum=0.9)), fit(DDPStrategy(), Task(momentum=0.9))

    for result, ddp in on_ranks(2, work):
        weight = small_net()[0].weight.detach()
        buffer = torch.zeros_like(weight)
        for mean in result["mean"]:
            buffer = 0.9 * buffer + mean["net.0.weight"]
            weight = weight - 0.1 * buffer
        assert_close(result["weights"]["net.0.weight"], weight)
        assert result["optimizer"]["state"].keys() == ddp["optimizer"]["state"].keys()
