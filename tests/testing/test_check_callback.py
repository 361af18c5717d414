"""``check_callback`` finds what a callback breaks, and nothing else; it keeps to what it says, and leaves no trace itself."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_grad.testing import Row, Rows, check_callback
from lightning_grad.testing.checks import CHECKS
from lightning_grad.testing.projects import projects_of
from tests.testing.broken import BROKEN, CAREFUL, FIT_FAILS, Broken, Careful, Hooked, ReadsLoss, Small, rows_of, small

# They read a fit with the callback alone, and one that is watched and saved. Each broken callback is put through them, and
# through those that it must fail; ``python -m tests.testing.broken`` puts each through all.
CHEAP = (
    "g1_trains_an_unmodified_module",
    "g3_no_trace_after_success",
    "g3_pickles_and_copies",
    "g3_copy_in_a_fit_holds_no_run",
    "g3_module_copied_in_a_fit_is_plain",
    "g4_state_dict_keys_in_a_fit",
    "g4_checkpoint_loads_by_default",
    "g4_other_checkpoints_hold_the_same_weights",
    "g5_saving_changes_nothing",
    "g8_warns_once",
)


def test_every_check_is_failed_by_a_callback() -> None:
    assert set(CHECKS) == {name for broken in (*BROKEN, *FIT_FAILS) for name in broken.fails}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.make.__name__)
def test_exactly_the_broken_guarantees_fail(broken: Broken) -> None:
    rows = rows_of(broken, {*CHEAP, *broken.fails})
    assert [row.check for row in rows.failed] == [name for name in CHECKS if name in broken.fails], f"\n{rows}"
    assert broken.words in " ".join(row.words for row in rows.failed), f"\n{rows}"
    if broken.at is not None:
        source, first = inspect.getsourcelines(broken.at)
        path, line = rows.failed[0].line.split(":")
        assert Path(path).name == "broken.py"
        assert int(line) in range(first, first + len(source)), f"\n{rows}"


@pytest.mark.parametrize("careful", CAREFUL, ids=lambda careful: careful.make.__name__)
def test_a_careful_callback_passes_every_check(careful: Broken) -> None:
    rows = rows_of(careful)
    assert not rows.failed, f"\n{rows}"
    applied = {row.check for row in rows if row.status == "ok" or row.refused}
    allowed = {"g2_neutral_is_identity", "g2_neutral_with_accumulation"} if careful.neutral is None else set()
    assert set(CHECKS) - applied <= allowed, f"\n{rows}"


@pytest.mark.parametrize("broken", FIT_FAILS, ids=lambda broken: broken.make.__name__)
def test_if_the_fit_fails_nothing_else_is_tried(broken: Broken) -> None:
    first, *others = check_callback(broken.make)
    assert (first.check, first.status) == (broken.fails[0], "failed")
    assert broken.words in first.words
    assert {row.status for row in others} == {"not applicable"}


# Arguments.


def test_arguments_that_make_no_sense_raise_at_once() -> None:
    same = Careful()

    def of(callback: Any) -> Any:
        return lambda: callback

    for arguments, error, words in (
        ({"make": Careful()}, TypeError, "make must be a function .*; got an object of type Careful"),
        ({"make": None}, TypeError, "make must be a function .*; got an object of type NoneType"),
        ({"make": of(None)}, TypeError, "make must be .*; it returned an object of type NoneType"),
        ({"make": list}, TypeError, "make must be .*; it returned an object of type list"),
        ({"make": of(same)}, ValueError, "make must be .*; it returned the same Careful twice"),
        ({"neutral": same}, TypeError, "neutral must be a function .*; got an object of type Careful"),
        ({"neutral": of(None)}, TypeError, "neutral must be .*; it returned an object of type NoneType"),
        ({"level": "fast"}, ValueError, "level must be 'quick' or 'full'; got 'fast'"),
        ({"expected_failed": ["g2"]}, TypeError, "expected_failed must map .* got a list"),
        (
            {"expected_failed": {"g5_resume_within_an_epoch": ""}},
            ValueError,
            "Did you mean 'g5_resumes_within_an_epoch'?",
        ),
        ({"expected_failed": {"G2": ""}}, ValueError, "Did you mean 'g2'?"),
        ({"expected_failed": {"hooks": ""}}, ValueError, "is no check. Guarantees are g1, g2, g3, g4, g5, g6, g7, g8"),
        ({"modules": small}, TypeError, "modules must be a list .* got small"),
        ({"modules": []}, ValueError, "modules is empty"),
        ({"modules": [Small()]}, TypeError, "must be a function that builds a module, not Small"),
        ({"modules": [list]}, TypeError, "list returned an object of type list. Return a LightningModule"),
        ({"modules": {"mine": lambda: (Small(), 1, 2, 3)}}, TypeError, r"mine returned \(Small, int, int, int\)"),
        ({"modules": [Small]}, ValueError, "Small does not train without the callback: .*train_dataloader"),
    ):
        with pytest.raises(error, match=words):
            check_callback(**{"make": Careful, **arguments})


class NeedsAnArgument(pl.Callback):
    def __init__(self, size: int) -> None:
        self.size = size


def test_an_error_of_make_itself_is_kept_and_explained() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'size'") as caught:
        check_callback(NeedsAnArgument)
    assert "lambda: MyCallback(0.1). It is called without arguments." in caught.value.__notes__[0]


# Modules of the caller.


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return small()[1]

    def val_dataloader(self) -> Any:
        return small()[2]


class OwnData(Small):
    """Brings its loaders, has dropout, and shuffles."""

    def __init__(self) -> None:
        super().__init__(manual=True)
        self.norm = torch.nn.Sequential(self.norm, torch.nn.Dropout(0.5))

    def train_dataloader(self) -> Any:
        return DataLoader(small()[1].dataset, 4, shuffle=True)


def test_modules_of_the_caller_are_named_and_need_not_resume() -> None:
    class Local(Small):
        pass

    rows = check_callback(Hooked, modules={"data": lambda: (Local(), Data()), "own": OwnData})
    assert not rows.failed, f"\n{rows}"
    of = {row.check: row for row in rows}
    assert len(of) == len(rows) == 2 * sum(check.level == "quick" for check in CHECKS.values())
    assert "dropout, a shuffled loader" in of["g5_resumes_within_an_epoch[own]"].words
    assert of["g5_resumes_within_an_epoch[data]"].status == "ok"
    assert of["g4_checkpoint_computes_what_was_validated[own]"].words.startswith("The module has no validation")
    assert of["g4_checkpoint_computes_what_was_validated[data]"].status == "ok"
    assert of["g6_accumulation[own]"].words.startswith("The module itself does not train so: Automatic gradient")
    assert of["g7_no_host_sync[own]"].words.startswith(
        "Only hooks were checked"
    )  # its training step steps the optimizers
    assert of["g7_no_host_sync[data]"].words == ""
    assert "manual optimization among the given" in of["g6_manual_optimization_with_two_optimizers[data]"].words


def test_functions_of_one_name_are_told_apart() -> None:
    assert [project.name for project in projects_of([lambda: 1, lambda: 2, small])] == [
        "<lambda> 0",
        "<lambda> 1",
        "small",
    ]


# Results.


def test_expected_failures_are_marked_and_entries_that_can_go_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("g1_trains_an_unmodified_module", "g3_pickles_and_copies", "g7_no_host_sync", "g8_warns_once")
    monkeypatch.setattr("lightning_grad.testing.checker.CHECKS", {name: CHECKS[name] for name in few})
    expected = {"g7": "reads the loss", "g8": "warned once", "g3_pickles_and_copies": "held a lambda"}
    rows = check_callback(ReadsLoss, expected_failed=expected, modules=[small], raises=True)
    of = {row.check: row for row in rows}
    assert of["g7_no_host_sync[small]"].status == "expected failure"
    assert of["g7_no_host_sync[small]"].words.startswith("reads the loss (on_train_batch_end: item()")
    assert of["g8_warns_once[small]"].words == "Passes, so remove 'g8' from expected_failed."
    assert "remove 'g3_pickles_and_copies'" in of["g3_pickles_and_copies[small]"].words
    assert not rows.failed
    assert "1 expected failure" in rows.summary()
    with pytest.raises(AssertionError, match=r"(?s)ReadsLoss, quick level: 1 failed\ng7_no_host_sync\[small\]  FAILED"):
        check_callback(ReadsLoss, modules=[small], raises=True)


def test_rows_print_as_a_table_and_as_markdown() -> None:
    rows = Rows(
        [
            Row("g1_trains", "ok"),
            Row("g2_neutral", "not applicable", "No neutral= was given."),
            Row("g5_resumes", "failed", "a " * 60 + "| b", "mine.py:9"),
            Row("g6_bf16", "ok", "refuses before the first batch: no"),
            *[Row(f"g8_{index}", "not applicable", "nothing") for index in range(5)],
        ],
        "Mine, full level",
    )
    assert str(rows).split("\n") == [
        "Mine, full level: 2 ok, 1 failed, 6 not applicable",
        "g1_trains      ok",
        "g2_neutral     not applicable  No neutral= was given.",
        "g5_resumes     FAILED          " + " ".join(["a"] * 45),
        " " * 31 + " ".join(["a"] * 15) + " | b",
        " " * 31 + "mine.py:9",
        "g6_bf16        ok              refuses before the first batch: no",
        "5 more checks  not applicable  nothing",
    ]
    assert rows.markdown().split("\n")[2:] == [
        "| g1_trains | ok |  |",
        "| g2_neutral | not applicable | No neutral= was given. |",
        "| g5_resumes | failed | " + "a " * 60 + "\\| b (`mine.py:9`) |",
        "| g6_bf16 | ok | refuses before the first batch: no |",
        "| 5 more checks | not applicable | nothing |",
    ]
    assert [row.check for row in rows if row.refused] == ["g6_bf16"]
    assert rows.failed[0].guarantee == "G5"


# What the tool itself leaves.


class Meddles(pl.Callback):
    """Changes what a process has one of, prints, and ends the process."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        os.environ["MEDDLED"] = "1"
        os.environ.pop("KEPT", None)
        os.chdir("/")
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(2)
        warnings.simplefilter("always")
        logging.disable(logging.CRITICAL)
        random.seed(0)
        print("printed")
        raise SystemExit(3)


def _surroundings() -> list[Any]:
    random_states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    of_torch = [torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()]
    of_process = [dict(os.environ), Path.cwd(), signal.getsignal(signal.SIGINT), sys.stdout, sys.stderr]
    return [random_states, of_torch, of_process, list(warnings.filters), logging.root.manager.disable]


@pytest.mark.parametrize("thread", [False, True], ids=["here", "in a thread"])
def test_nothing_is_left_of_the_tool(
    thread: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = _surroundings()

    def meddle() -> Any:
        with pytest.raises(TypeError):
            check_callback(Careful, modules=[Meddles])
        return check_callback(Meddles, modules=[small])

    if thread:
        with ThreadPoolExecutor(1) as pool:
            rows = pool.submit(meddle).result()
    else:
        rows = meddle()
    assert (rows[0].status, rows[0].words) == ("failed", "It ends the process.")
    assert Path(rows[0].line.split(":")[0]).name == "test_check_callback.py"
    assert _surroundings() == before
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


# Processes.

ALONE = """
import sys
import torch

sys.modules |= dict.fromkeys(("pytest", "pytorch_lightning", "jsonargparse"))
torch.set_num_threads(2)
torch.ones(512, 512) @ torch.ones(512, 512)  # starts the threads that a fork does not take along

from lightning_grad.testing import check_callback, checker
from tests.testing.broken import Careful, small

few = ("g1_trains_an_unmodified_module", "g6_compiled_submodules", "g6_two_ranks", "g8_yaml_round_trip")
every, checker.CHECKS = checker.CHECKS, {name: checker.CHECKS[name] for name in few}
for row in check_callback(Careful, level="full", modules=[small]):
    print(row.check, row.status, row.words, sep="|")
print(torch.get_num_threads())
checker.CHECKS = every
print("then")
"""


def _python(code: str, **environment: str) -> subprocess.Popen[str]:
    # The tests set OMP_NUM_THREADS, and Lightning as well.
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | environment
    ignored = ("DeprecationWarning", "ResourceWarning")  # torch 2.6 leaves a temporary folder to the end of the process
    flags = ["-W", "error", *(part for name in ignored for part in ("-W", f"ignore::{name}"))]
    command = [sys.executable, *flags, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, cwd=Path(__file__).parents[2], env=variables, **pipes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str, list[Path]]:
    """Run both programs in one process, and return what each printed, the errors, and what is left of its folder."""
    folder, started = tmp_path_factory.mktemp("temporary"), tmp_path_factory.mktemp("started") / "started"
    process = _python(ALONE + INTERRUPTED, TMPDIR=str(folder), STARTED=str(started))
    try:
        out, error = process.communicate(timeout=100)
    finally:
        process.kill()
    first, _, second = out.partition("then\n")
    return first, second, error, list(folder.iterdir())


def test_it_works_without_optional_packages_and_after_threads_of_torch(alone: Any) -> None:
    out, _, error, _ = alone
    assert error == ""
    *lines, threads = out.splitlines()
    assert threads == "2"
    of = {line.split("|")[0].split("[")[0]: line.split("|")[1:] for line in lines}
    assert of["g1_trains_an_unmodified_module"] == of["g6_compiled_submodules"] == of["g6_two_ranks"] == ["ok", ""]
    assert of["g8_yaml_round_trip"] == ["not applicable", "jsonargparse is not installed, which LightningCLI needs."]


INTERRUPTED = """
import multiprocessing, os, signal, sys, threading, time
from pathlib import Path
from lightning_grad.testing import check_callback
from tests.testing.broken import Broken, Hooked, rows_of, small

started = Path(os.environ["STARTED"])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process that is started in the background ignores it

class Slow(Hooked):
    ranks = 2

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.world_size == Slow.ranks:
            started.touch()
            time.sleep(60)

def interrupt():
    while not started.exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)

def two_ranks():
    rows_of(Broken(Slow, ()), ["g6_two_ranks"])

def one_rank():
    check_callback(Slow, modules=[small])

for ranks, work in ((2, two_ranks), (1, one_rank)):
    Slow.ranks = ranks
    started.unlink(missing_ok=True)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        work()
    except KeyboardInterrupt:
        print("interrupted", multiprocessing.active_children(), signal.getsignal(signal.SIGINT).__name__)
"""


def test_ctrl_c_ends_it_and_leaves_no_process_or_folder(alone: Any) -> None:
    _, out, error, left = alone
    assert error == ""
    assert out == "interrupted [] default_int_handler\n" * 2
    assert left == []


class HangsOnRankOne(pl.Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == 1:
            time.sleep(60)


def test_a_rank_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_grad.testing.checks.g6_composition._LIMIT", 3.0)
    (row,) = rows_of(Broken(HangsOnRankOne, ()), ["g6_two_ranks"])
    assert (row.status, row.words) == ("failed", "Rank 1 did not end in 3 s, or was killed.")
