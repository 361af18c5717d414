"""TrainingDoctor finds what sleeps, syncs and allocates, whoever wrote it; its shares add up, and nothing of it stays."""

import copy
import csv
import pickle
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import PyTorchProfiler
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_grad.callbacks import AdversarialTraining, GradientMonitor, NormClipping, TrainingDoctor
from lightning_grad.callbacks.diagnostics._doctor_table import text_of
from lightning_grad.callbacks.diagnostics._host_events import EventRecorder
from lightning_grad.callbacks.diagnostics._owner_stack import REST, OwnerStack, StepClock
from lightning_grad.core import wrap_method
from lightning_grad.core.dispatch import MethodDispatcher
from lightning_grad.functional.torch_version import TORCH
from lightning_grad.testing import StopAt, fit, loaders, make_classifier, make_trainer, on_ranks, traces, trainer_traces

_TOLD = "lightning_grad.callbacks.diagnostics.training_doctor.rank_zero_info"


class _Time:
    """A clock on which only :meth:`sleep` takes time; every look at it takes a nanosecond more."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 1
        return self.now

    def sleep(self, milliseconds: float = 1.0) -> None:
        self.now += round(milliseconds * 1e6)


TIME = _Time()


@pytest.fixture(autouse=True, scope="module")
def _clock() -> Iterator[None]:
    """No test depends on the speed of the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_grad.callbacks.diagnostics._owner_stack.perf_counter_ns", TIME)
        yield


def milliseconds(number: float) -> Any:
    """Return what equals a time in milliseconds, apart from the looks at the clock."""
    return pytest.approx(number, abs=0.01)


class Sleeps(pl.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        TIME.sleep()


class Syncs(pl.Callback):
    """Waits for a GPU four times in each batch, in four ways."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        x = torch.arange(4.0)
        self.seen = [x.sum().item(), bool((x > 0).any()), x[x > 1], torch.masked_select(x, x > 1)]


class Allocates(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        torch.zeros(1_000_000)


class Registers(pl.Callback):
    """Sleeps in hooks of the optimizer and of a layer, in a wrapper around the step, and before the step in none."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        sleep = lambda *_: TIME.sleep()  # noqa: E731

        def around(inner: Any, *args: Any) -> Any:
            TIME.sleep()
            return inner(*args)

        optimizer = trainer.optimizers[0].register_step_post_hook(sleep)
        layer = pl_module.head.register_forward_hook(sleep)
        self.ends = [optimizer.remove, layer.remove, wrap_method(pl_module, "training_step", around)]

    def on_fit_end(self, *_: Any) -> None:
        for end in self.ends:
            end()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect what the callback prints."""
    lines: list[str] = []
    monkeypatch.setattr(_TOLD, lines.append)
    monkeypatch.setattr("lightning_grad.core.callback.rank_zero_info", lines.append)
    return lines


def watched(*callbacks: Any, batches: int = 4, **arguments: Any) -> tuple[dict[str, dict[str, Any]], TrainingDoctor]:
    """Fit with a doctor that is listed last, and return its rows by name."""
    doctor = TrainingDoctor(batches=batches)
    fit([*callbacks, doctor], arguments.pop("module", None), **{"max_epochs": 2, **arguments})
    return {row["name"]: row for row in doctor.rows}, doctor


# What it finds.


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("doctor")
    found, _ = watched(Sleeps(), Syncs(), Allocates(), Registers(), Sleeps(), logger=CSVLogger(folder))
    found["folder"] = {"path": folder / "lightning_logs/version_0"}
    return found


def test_the_time_of_a_callback_is_its_own(rows):
    times = {name: row["milliseconds"] for name, row in rows.items() if name != "folder"}
    assert times["Sleeps (1)"] == milliseconds(1)
    assert times["Sleeps (2)"] == milliseconds(1)
    assert all(times[name] == milliseconds(0) for name in ("Syncs", "Allocates", "training_step", "optimizer step"))


def test_hooks_and_wrappers_that_a_callback_adds_count_for_it(rows):
    assert rows["Registers"]["milliseconds"] == milliseconds(3)


def test_shares_add_up(rows):
    parts = [row for name, row in rows.items() if name != "folder"]
    assert sum(row["share"] for row in parts) == pytest.approx(1.0)
    assert all(row["share"] >= 0 for row in parts)
    assert sum(row["milliseconds"] for row in parts) == milliseconds(5)
    assert rows["Registers"]["share"] == pytest.approx(3 / 5, abs=0.01)
    assert all(
        rows[part]["share"] > 0 for part in ("training_step", "backward", "optimizer step", "data loading", REST)
    )


def test_syncs_are_counted_for_the_callback_that_causes_them(rows):
    assert {name: row["host_syncs"] for name, row in rows.items() if row.get("is_callback")} == {
        "Sleeps (1)": 0,
        "Sleeps (2)": 0,
        "Syncs": 4,
        "Allocates": 0,
        "Registers": 0,
    }
    assert rows["training_step"]["host_syncs"] == 0
    assert rows["optimizer step"]["host_syncs"] is None  # reads its own step counts, which are on the host


def test_memory_is_counted_for_the_callback_that_allocates_it(rows):
    assert rows["Allocates"]["megabytes"] == pytest.approx(4.0)
    assert rows["Sleeps (1)"]["megabytes"] == 0
    assert 0 < rows["Syncs"]["megabytes"] < 0.01


class _Reads(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        x = torch.ones(1_000_000, device=pl_module.device)
        self.seen = [x.sum().item(), x[:2].cpu(), x[:2].tolist()]


_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize(
    ("device", "syncs"), [("cpu", 1), pytest.param("gpu", 3, marks=[pytest.mark.needs_gpu, _NO_GPU])]
)
def test_copies_to_the_host_are_syncs_on_a_gpu(device, syncs):
    rows, _ = watched(_Reads(), accelerator=device, max_epochs=1)
    assert rows["_Reads"]["host_syncs"] == syncs
    assert rows["_Reads"]["megabytes"] == pytest.approx(4.0, rel=0.2)


def test_table_goes_to_the_logger_and_the_figure_next_to_it(rows):
    folder: Path = rows["folder"]["path"]
    lines = list(csv.DictReader((folder / "training_doctor.csv").read_text().splitlines()))
    assert [line["name"] for line in lines] == [name for name in rows if name != "folder"]
    assert float(lines[0]["share"]) == pytest.approx(
        max(row["share"] for n, row in rows.items() if row.get("is_callback"))
    )
    assert (folder / "training_doctor.png").stat().st_size > 0
    logged = [
        row for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines()) if row["doctor/batch_ms"]
    ]
    assert len(logged) == 1
    assert float(logged[0]["doctor/callbacks_host_syncs"]) == 4


def test_only_the_last_run_of_a_repeated_step_is_the_training():
    """An attack runs the step more often: it is the attack that costs this."""
    module = make_classifier()
    module.head.register_forward_hook(lambda *_: TIME.sleep())
    rows, _ = watched(AdversarialTraining(epsilon=0.01, attack="pgd", steps=3), module=module, limit_train_batches=6)
    assert rows["training_step"]["milliseconds"] == milliseconds(1)
    assert rows["AdversarialTraining"]["milliseconds"] == milliseconds(3)


def test_time_between_batches_has_a_column_of_its_own():
    class Validates(pl.Callback):
        def on_validation_start(self, *_: Any) -> None:
            TIME.sleep()

    rows, _ = watched(Validates(), batches=8)
    assert rows["Validates"]["seconds_between_batches"] == pytest.approx(1e-3, rel=0.01)
    assert rows["Validates"]["milliseconds"] == 0


# What it leaves alone.


class _Calls(TorchDispatchMode):
    """Counts the operators of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _operators(callbacks: list[Any]) -> list[str]:
    calls = _Calls()
    modes = LambdaCallback(
        on_train_start=lambda *_: calls.__enter__(), on_train_end=lambda *_: calls.__exit__(None, None, None)
    )
    fit([modes, *callbacks], max_epochs=1, limit_val_batches=0)
    return calls.names


def test_it_adds_no_tensor_call():
    plain = _operators([])
    assert len(plain) > 100
    assert _operators([TrainingDoctor(batches=2)]) == plain
    assert _operators([TrainingDoctor(batches=100)]) == plain  # watches to the end


class _Looks(pl.Callback):
    """Notes, at the start of each batch, which callbacks have something in their ``__dict__`` that dispatches."""

    def __init__(self, others: list[Any]) -> None:
        self.others, self.wrapped = others, []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        watched = [*self.others, trainer.strategy, trainer.profiler, trainer.fit_loop.epoch_loop]
        self.wrapped.append(any(isinstance(v, MethodDispatcher) for one in watched for v in vars(one).values()))
        for copied in (pickle.loads(pickle.dumps(self.others[0])), copy.deepcopy(self.others[0])):
            assert not any(isinstance(value, MethodDispatcher) for value in vars(copied).values())
        copy.deepcopy(pl_module.head)


def test_it_stops_watching_in_the_middle_of_a_fit():
    others = [NormClipping(max_norm=1.0), Registers()]
    looks = _Looks(others)
    doctor = TrainingDoctor(batches=2)
    fit([looks, doctor, *others], max_epochs=2)
    assert looks.wrapped[:5] == [True] * 5  # one batch that is skipped, two that are recorded, two that are timed
    assert looks.wrapped[5:] == [False] * (len(looks.wrapped) - 5)
    assert doctor._watch is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_watch_shows_what_it_has_and_leaves_nothing(error, told):
    other, module, trainers = Sleeps(), make_classifier(), []
    doctor = TrainingDoctor(batches=100)
    begin = LambdaCallback(setup=lambda trainer, *_, **__: trainers.append(trainer))
    with suppress(RuntimeError, SystemExit):
        fit([begin, doctor, other, StopAt(5, error)], module)
    assert any("mean of 2\n" in line for line in told)
    assert not any(isinstance(value, MethodDispatcher) for value in vars(other).values())
    trainer, plain = fit([])
    assert traces(module) == traces(plain)
    assert trainer_traces(trainers[0])["strategy"] == trainer_traces(trainer)["strategy"]
    assert not torch._C._autograd._profiler_enabled()


def test_an_error_in_a_recorded_batch_ends_the_recording(told):
    doctor = TrainingDoctor()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit([doctor, Sleeps(), StopAt(2)])
    assert not torch._C._autograd._profiler_enabled()
    assert any("has no times" in line for line in told)


# Other runs.


def test_a_short_run_shows_what_it_has(told):
    rows, _ = watched(Sleeps(), batches=100, max_epochs=1)
    assert rows["Sleeps"]["milliseconds"] == milliseconds(1)
    assert len([line for line in told if "host time of a batch" in line]) == 1


def test_a_run_that_ends_before_the_first_timed_batch_says_so(told):
    _, doctor = watched(Sleeps(), limit_train_batches=3, max_epochs=1)
    assert doctor.rows == []
    assert told[-1] == "TrainingDoctor has no times: it times from batch 4 on, and the fit ended before."


def test_a_list_without_any_callback():
    rows, _ = watched()
    assert [name for name, row in rows.items() if row["is_callback"]] == []
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("arguments", [{"accumulate_grad_batches": 3}, {"module": "manual"}])
def test_accumulation_and_manual_optimization(arguments):
    if "module" in arguments:
        arguments = {"module": make_classifier(manual=True)}
    rows, _ = watched(Sleeps(), Syncs(), **arguments)
    assert rows["Sleeps"]["milliseconds"] == milliseconds(1)
    for part in ("training_step", "backward", "optimizer step"):
        assert rows[part]["share"] > 0
    assert rows["Syncs"]["host_syncs"] == (8 if "module" in arguments else 2)  # of two optimizers; in every third batch


def test_a_resumed_run_is_watched_again(tmp_path, told):
    def run(**arguments: Any) -> None:
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        fit([TrainingDoctor(batches=2), saving], resumable=True, **arguments)

    run(max_epochs=1)
    run(max_epochs=2, ckpt=str(tmp_path / "epoch=0.ckpt"))
    assert len([line for line in told if "host time of a batch" in line]) == 2


def test_a_profiler_around_the_fit_keeps_its_events():
    with torch.autograd.profiler.profile(use_kineto=True) as profile:
        rows, _ = watched(Syncs(), batches=1, max_epochs=1, limit_train_batches=4, limit_val_batches=0)
    assert rows["Syncs"]["host_syncs"] is None
    assert sum(event.name == "aten::masked_select" for event in profile.function_events or []) == 4


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events", "ignore:.*default schedule will be overridden")
def test_another_profiler_keeps_its_events(tmp_path, told):
    rows, _ = watched(Syncs(), profiler=PyTorchProfiler(tmp_path, "trace", export_to_chrome=False))
    assert rows["Syncs"]["host_syncs"] is None
    assert rows["Syncs"]["megabytes"] is None
    table = next(line for line in told if "host time of a batch" in line)
    assert "Syncs" in table
    assert "Host syncs and memory were not counted" in table
    assert "would wait for a GPU" not in table


def _graphs(doctors: list[Any]) -> tuple[int, int]:
    """Return how often a layer compiles in a fit, and how often its graph runs."""
    torch._dynamo.reset()
    made, runs, module = [], [], make_classifier()

    def backend(graph: Any, _: Any) -> Any:
        made.append(graph)
        return lambda *args: runs.append(graph) or graph(*args)

    module.head.compile(backend=backend)
    hooks = LambdaCallback(on_fit_start=lambda _, m: m.head.register_forward_hook(lambda *_: None))
    fit([hooks, *doctors], module, max_epochs=1, limit_train_batches=6, limit_val_batches=0)
    return len(made), len(runs)


@pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6 does not compile a layer that has a hook")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of dynamo, about the layer's input
def test_compiled_layers_run_their_graph_and_do_not_compile_again():
    made, runs = _graphs([])
    assert runs >= 6
    assert _graphs([TrainingDoctor(batches=2)]) == (made, runs)


def test_callbacks_of_the_other_namespace_are_timed():
    other = pytest.importorskip("pytorch_lightning")

    class SleepsToo(other.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, *_: Any) -> None:
            TIME.sleep()

    doctor, module = TrainingDoctor(batches=2), make_classifier(other.LightningModule)
    trainer = make_trainer(other.Trainer, callbacks=[SleepsToo(), doctor], max_epochs=1)
    trainer.fit(module, *loaders())
    assert doctor.rows[0]["name"] == "SleepsToo"
    assert doctor.rows[0]["milliseconds"] == milliseconds(1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the search for a learning rate
def test_steps_of_a_search_for_a_learning_rate_are_not_watched(told):
    module = make_classifier()
    module.lr = 1e-3
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=module.lr)
    search = LearningRateFinder(num_training_steps=8, early_stop_threshold=None)
    rows, _ = watched(search, Sleeps(), module=module)
    assert rows["LearningRateFinder"]["milliseconds"] == 0
    assert rows["Sleeps"]["milliseconds"] == milliseconds(1)


def _two_ranks() -> tuple[int, list[str], list[bool]]:
    doctor, other = TrainingDoctor(batches=2, host_syncs=False), NormClipping(max_norm=1.0)
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_TOLD, lines.append)
        looks = _Looks([other])
        fit([looks, doctor, other], max_epochs=2, devices=2, strategy="ddp")
    return len(doctor.rows), lines, looks.wrapped


def test_only_rank_zero_watches_and_prints():
    (count, lines, wrapped), (other_count, other_lines, other_wrapped) = on_ranks(2, _two_ranks)
    assert count > 0 == other_count
    assert len(lines) == 1
    assert other_lines == []
    assert any(wrapped)
    assert not any(other_wrapped)


def test_two_are_refused():
    with pytest.raises(ValueError, match="Use only one TrainingDoctor"):
        fit([TrainingDoctor(), TrainingDoctor(name="second")])


def test_table_is_text_in_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    shown: dict[str, str] = {}
    logger = TensorBoardLogger(tmp_path)
    monkeypatch.setattr(logger.experiment, "add_text", lambda key, text, **_: shown.update({key: text}))
    watched(Sleeps(), logger=logger, max_epochs=1)
    assert "| Sleeps |" in shown["doctor/table"]


# Its parts.


def test_a_part_that_a_callback_runs_itself_counts_for_the_callback():
    clock = StepClock(["Probes"])
    clock.begin()
    clock.begin_batch()
    clock.call("Probes", clock.call_part, "training_step", TIME.sleep)
    clock.end_batch()
    clock.end()
    assert clock.in_batches["Probes"] == pytest.approx(1e6, rel=0.01)
    assert clock.in_batches["training_step"] == 0


def test_calls_from_another_thread_do_not_count():
    stack = OwnerStack([])
    stack.begin()
    assert stack.counts
    stack._thread += 1
    assert not stack.counts


def _event(name: str, start: int, duration: int = 0, size: int = 0, device: str = "CPU") -> Any:
    return SimpleNamespace(
        name=lambda: name,
        start_ns=lambda: start,
        duration_ns=lambda: duration,
        nbytes=lambda: size,
        device_type=lambda: SimpleNamespace(name=device),
    )


def test_events_of_a_gpu_are_read():
    """Copies to the host wait; memory is that of the device. The events are made up: no GPU is needed."""
    mark = "TrainingDoctor: "
    events = [
        _event(f"{mark}Copies", 10, 100),
        _event("aten::_to_copy", 20, 30),
        _event("[memory]", 25, size=8),
        _event("aten::_to_copy", 60, 20),  # to the device
        _event("[memory]", 65, size=1000, device="CUDA"),
        _event("[memory]", 70, size=-1000, device="CUDA"),
        _event(f"{mark}Masks", 120, 50),
        _event("aten::masked_select", 130, 20),
        _event("aten::nonzero", 135, 10),
        _event("aten::_local_scalar_dense", 300, 5),
    ]
    recorder = EventRecorder(["Copies", "Masks"], "cuda")
    recorder._read(reversed(events))
    assert recorder.syncs == {"Copies": 1, "Masks": 1, REST: 1}
    assert recorder.memory["Copies"] == 1000


def test_small_callbacks_share_a_line():
    def row(name: str, share: float, syncs: float | None, is_callback: bool = True) -> dict[str, Any]:
        costs = {"share": share, "milliseconds": 10 * share, "seconds_between_batches": 0.0}
        return {"name": name, "is_callback": is_callback, **costs, "host_syncs": syncs, "megabytes": 0.0}

    rows = [
        row("Large", 0.5, 0),
        row("Syncing", 0.0005, 2),
        row("Tiny", 0.0005, 0),
        row("backward", 0.499, None, False),
    ]
    text = text_of(rows, 50, "cuda")
    assert "Below 0.1 % each: Tiny." in text
    assert "Syncing" in text
    assert "s between batches" not in text
    assert "What the GPU still computes counts where Python waits for it." in text
    assert text.startswith("host time of a batch, mean of 50\n")


def test_monitor_and_doctor_work_together_in_either_order():
    for callbacks in ([GradientMonitor(figure=False)], [Sleeps(), GradientMonitor(figure=False)]):
        rows, _ = watched(*callbacks)
        assert rows["GradientMonitor"]["share"] > 0
