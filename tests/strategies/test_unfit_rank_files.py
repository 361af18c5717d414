"""Rank files that are not those of the checkpoint are refused by name, and every way out that is offered works."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_grad.strategies import DGCStrategy
from lightning_grad.testing import on_ranks
from tests.strategies.ranks import Task, assert_same, dgc, said
from tests.strategies.test_odd_runs import LooksAtStart, SavesEpochs, finish, fit, power

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
]

EPOCHS = 3


class NoBatch(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("a batch was trained before the refusal")


class Saved:
    """Checkpoints of a run after each epoch, of which the second is damaged by a test.

    Args:
        folder: With ``0.ckpt``, ``1.ckpt`` and their rank files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "1.ckpt"

    def file(self, rank: int, epoch: int = 1) -> Path:
        """Return a rank file."""
        (save,) = (self.folder / f"{epoch}.ckpt.ranks").iterdir()
        return save / f"{rank}.pt"

    def change(self, rank: int, change: Callable[[dict[str, Any]], None]) -> None:
        """Write a rank file with something else in it."""
        content = torch.load(self.file(rank), weights_only=True)
        change(content)
        torch.save(content, self.file(rank))


def _save(folder: Path) -> list[Any]:
    """Save what DGC has after each epoch, and return what an uninterrupted run leaves; PowerSGD saves in a folder in it."""
    expected = finish(dgc(), [SavesEpochs(folder)], epochs=EPOCHS)
    fit(power(), [SavesEpochs(folder / "power")], epochs=EPOCHS)
    return expected


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("original")
    return folder, on_ranks(2, _save, folder)


@pytest.fixture
def saved(original: tuple[Path, list[Any]], tmp_path: Path) -> Saved:
    return Saved(Path(shutil.copytree(original[0], tmp_path / "run")))


def _tear(saved: Saved) -> None:
    content = saved.file(1).read_bytes()
    saved.file(1).write_bytes(content[: len(content) // 2])


def _rename(content: dict[str, Any]) -> None:
    content["own"]["memory"] = {f"other.{name}": kept for name, kept in content["own"]["memory"].items()}


def _rename_all(content: dict[str, Any]) -> None:
    _rename(content)
    for part in ("parameters", "memory"):
        content["identity"][part] = {f"other.{name}": kept for name, kept in content["identity"][part].items()}


def _shrink(content: dict[str, Any]) -> None:
    content["own"]["memory"]["net.0.weight"]["residual"] = torch.zeros(5)


def _swap(saved: Saved) -> None:
    first = saved.file(0).read_bytes()
    saved.file(0).write_bytes(saved.file(1).read_bytes())
    saved.file(1).write_bytes(first)


def _make_folder(saved: Saved) -> None:
    saved.file(1).unlink()
    saved.file(1).mkdir()


def _take_power(saved: Saved) -> None:
    shutil.copy(Saved(saved.folder / "power").file(1), saved.file(1))


# What is done to the files, which of them is named, and what is said of it.
DAMAGE: dict[str, tuple[Callable[[Saved], Any], int, str]] = {
    "torn": (_tear, 1, "cannot be read ("),
    "torn, of rank 0": (
        lambda saved: saved.file(0).write_bytes(saved.file(0).read_bytes()[:1000]),
        0,
        "cannot be read (",
    ),
    "empty": (lambda saved: saved.file(1).write_bytes(b""), 1, "cannot be read (EOFError"),
    "text": (lambda saved: saved.file(1).write_text("not a checkpoint"), 1, "cannot be read (UnpicklingError"),
    "a folder": (_make_folder, 1, "cannot be read (IsADirectoryError"),
    "an empty dictionary": (lambda saved: torch.save({}, saved.file(1)), 1, "does not contain the state of a rank"),
    "a tensor": (lambda saved: torch.save(torch.zeros(2), saved.file(1)), 1, "does not contain the state of a rank"),
    "a checkpoint": (lambda saved: shutil.copy(saved.path, saved.file(1)), 1, "does not contain the state of a rank"),
    "without memory": (
        lambda saved: saved.change(1, lambda c: c["own"].clear()),
        1,
        "does not contain the state of a rank",
    ),
    "of another save": (
        lambda saved: shutil.copy(saved.file(1, 0), saved.file(1)),
        1,
        "belongs to another checkpoint: its save is",
    ),
    "of rank 0": (
        lambda saved: shutil.copy(saved.file(0), saved.file(1)),
        1,
        "belongs to rank 0 of 2, not to rank 1 of 2",
    ),
    "swapped": (_swap, 0, "belongs to rank 1 of 2, not to rank 0 of 2"),
    "of another scheme": (_take_power, 1, "belongs to PowerSGDStrategy, not to DGCStrategy"),
    "renamed": (
        lambda saved: saved.change(1, _rename),
        1,
        "belongs to another model: it contains 'other.net.0.weight'",
    ),
    "of another model": (
        lambda saved: saved.change(1, _rename_all),
        1,
        "belongs to another model: it contains 'other.net.0.weight'",
    ),
    "shrunk": (lambda saved: saved.change(1, _shrink), 1, "was changed after it was saved"),
}


def _refused(path: Path, policy: Any, build: Any = dgc, module: Any = None, kind: Any = ValueError) -> str:
    with pytest.raises(kind) as error:
        fit(build(residual_policy=policy), [NoBatch()], None if module is None else module(), path, EPOCHS)
    return str(error.value)


def _begin_empty(path: Path, module: Any = None) -> tuple[Any, Any, list[str]]:
    look = LooksAtStart()
    with said() as lines:
        left = finish(dgc(residual_policy="reset"), [look], None if module is None else module(), path, EPOCHS)
    return (look.memory, look.steps), left, lines


def _try_all(path: Path) -> tuple[list[str], Any]:
    return [_refused(path, "strict"), _refused(path, "mean")], _begin_empty(path)


@pytest.fixture(scope="module")
def damaged(original: tuple[Path, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a damaged copy for each kind of damage, and what each rank says of it."""
    copies = {
        name: Saved(Path(shutil.copytree(original[0], tmp_path_factory.mktemp("damaged") / "run"))) for name in DAMAGE
    }
    for name, saved in copies.items():
        DAMAGE[name][0](saved)
    first, second = on_ranks(2, lambda: {name: _try_all(saved.path) for name, saved in copies.items()})
    return {name: (saved, [first[name], second[name]]) for name, saved in copies.items()}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_does_not_fit_is_named_on_every_rank_and_reset_begins_empty(damage: str, damaged: Any) -> None:
    _, rank, words = DAMAGE[damage]
    saved, results = damaged[damage]
    for messages, (start, left, _) in results:
        for message in messages:
            assert f"DGCStrategy cannot resume from {saved.path}: the rank file {saved.file(rank)} {words}" in message
            assert "resume from another checkpoint, or set residual_policy='reset'" in message
            assert message == results[0][0][0], "the same on all ranks and under both policies"
        assert start == ({}, 0)
        assert left["steps"] == EPOCHS * 6
    lines = results[0][1][2]
    (line,) = (line for line in lines if "starts without unsent gradients" in line)
    assert f"are lost, because the rank file {saved.file(rank)} {words}" in line
    assert_same(results[0][1][1]["module"], results[1][1][1]["module"])


def _resume(path: Path) -> Any:
    return finish(dgc(), ckpt=path, epochs=EPOCHS)


def _resume_from_another_and_from_what_is_mended(saved: Saved, right: Path) -> tuple[Any, Any]:
    earlier = _resume(saved.folder / "0.ckpt")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copy(right, saved.file(1))
    dist.barrier()
    return earlier, _resume(saved.path)


def test_the_other_ways_out_of_a_bad_file(saved: Saved, original: tuple[Path, list[Any]]) -> None:
    """Another checkpoint goes on; so does this one, exactly, once the right file is back."""
    _tear(saved)
    results = on_ranks(2, _resume_from_another_and_from_what_is_mended, saved, Saved(original[0]).file(1))
    for (earlier, mended), expected in zip(results, original[1], strict=True):
        assert_same(earlier["steps"], expected["steps"])
        assert_same(mended, expected)


def test_a_folder_of_another_checkpoint_is_told_from_one_that_is_missing(saved: Saved) -> None:
    save = saved.file(0, 0).parent.name
    shutil.rmtree(saved.folder / "1.ckpt.ranks")
    (saved.folder / "0.ckpt.ranks").rename(saved.folder / "1.ckpt.ranks")
    for message in on_ranks(2, _refuse_missing, saved.path):
        assert f"2 of the 2 files with the unsent gradients are missing, the first is {saved.folder}" in message
        assert f"found files of other checkpoints next to it: save {save}" in message
        assert "Copy 1.ckpt.ranks along with the checkpoint, or set residual_policy='reset'" in message


@pytest.fixture(scope="module", params=[1, 4])
def elsewhere(
    request: pytest.FixtureRequest, original: tuple[Path, list[Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Saved, Saved, list[Any]]:
    """Return a copy as it is, one with a torn file, and what other ranks say of either."""
    whole, torn = (
        Saved(Path(shutil.copytree(original[0], tmp_path_factory.mktemp(n) / "run"))) for n in ("whole", "torn")
    )
    _tear(torn)

    def work() -> tuple[str, Any, str]:
        return _refused(whole.path, "strict"), _begin_empty(whole.path), _refused(torn.path, "mean")

    return whole, torn, on_ranks(request.param, work)


def test_other_ranks_are_refused_or_begin_empty(elsewhere: tuple[Saved, Saved, list[Any]]) -> None:
    """Under 'mean' they continue, see test_rank_files.py."""
    saved, _, results = elsewhere
    words = f"it was saved on 2 rank(s), and this run has {len(results)}"
    for message, (start, left, _), _ in results:
        assert f"DGCStrategy cannot resume from {saved.path}: {words}. Each rank has unsent gradients" in message
        assert "set residual_policy='mean' to spread them over the new ranks, or 'reset' to drop them" in message
        assert start == ({}, 0)
        assert_same(left["module"], results[0][1][1]["module"])
    (line,) = (line for line in results[0][1][2] if "starts without unsent gradients" in line)
    assert f"are lost, because {words}." in line


def test_a_mean_of_files_of_which_one_is_torn_is_refused_by_its_name(elsewhere: tuple[Saved, Saved, list[Any]]) -> None:
    _, torn, results = elsewhere
    for _, _, message in results:
        assert f"the rank file {torn.file(1)} cannot be read (" in message
        assert "residual_policy='reset'" in message


def _refuse_missing(path: Path) -> str:
    return _refused(path, "strict", kind=FileNotFoundError)


class Wider(Task):
    """Has another head, so that the weights of a checkpoint are loaded as far as they go."""

    def __init__(self) -> None:
        super().__init__(momentum=0.9, weight_decay=0.01)
        self.net = nn.Sequential(self.net[0], self.net[1], nn.Linear(64, 10))
        self.strict_loading = False

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = self.state_dict()
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: w for n, w in weights.items() if n in own and own[n].shape == w.shape}
        checkpoint["optimizer_states"] = [torch.optim.SGD(self.parameters(), 0.1, 0.9).state_dict()]


def _change_the_head(path: Path) -> tuple[str, Any]:
    return _refused(path, "strict", module=Wider), _begin_empty(path, Wider)


def test_a_model_of_another_shape_is_told_which_tensor_differs(saved: Saved) -> None:
    for message, (start, left, _) in on_ranks(2, _change_the_head, saved.path):
        assert "belongs to another model: its 'net.2.weight' has shape [4, 64], this module's has [10, 64]" in message
        assert start == ({}, 0)
        assert left["memory"]["net.2.weight"]["residual"].numel() == 640


class Kernels(Task):
    """Has a kernel whose entries lie in memory in the usual order, or with the channels last."""

    def __init__(self, memory_format: Any = torch.contiguous_format) -> None:
        super().__init__(momentum=0.9, weight_decay=0.01)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            kernel = nn.Conv2d(2, 8, 3, padding=1)
            head = nn.Linear(8 * 16, 4)
        self.net = nn.Sequential(nn.Unflatten(1, (2, 4, 4)), kernel, nn.Flatten(), head)
        self.net.to(memory_format=memory_format)


def _change_the_format(folder: Path) -> str:
    fit(dgc(), [SavesEpochs(folder)], Kernels())
    dist.barrier()
    message = _refused(folder / "0.ckpt", "strict", module=lambda: Kernels(torch.channels_last))
    finish(dgc(), (), Kernels(), folder / "0.ckpt")
    return message


def test_a_kernel_that_lies_in_memory_otherwise_does_not_get_the_residual_of_other_entries(tmp_path: Path) -> None:
    for message in on_ranks(2, _change_the_format, tmp_path):
        assert "belongs to a model whose 'net.1.weight' has strides [18, 9, 3, 1] in memory" in message
        assert "use the memory format of the saved run" in message


# Settings that change when a run resumes.

CHANGES: list[tuple[Any, dict[str, Any], str]] = [
    (dgc, {"ratio": 0.2}, "ratio=0.2 (was 0.05)"),
    (dgc, {"warmup": [0.5]}, "warmup=[0.5] (was None)"),
    (dgc, {"warmup": [0.5, 0.2], "warmup_steps": 4}, "warmup=[0.5, 0.2] (was None), warmup_steps=4 (was None)"),
    (dgc, {"value_dtype": "float16"}, "value_dtype='float16' (was 'float32')"),
    (dgc, {"correction": "error_feedback"}, "correction='error_feedback' (was 'momentum')"),
    (dgc, {"momentum_masking": False}, "momentum_masking=False (was True)"),
    (dgc, {"local_clip": 0.5}, "local_clip=0.5 (was None)"),
    (dgc, {"selector": "chunk"}, "selector='chunk' (was 'auto')"),
    (dgc, {"layer_ratios": {"net.0": 0.5}}, "layer_ratios={'net.0': 0.5} (was {})"),
    (dgc, {"min_numel": 2}, "min_numel=2 (was 1)"),
    (power, {"rank": 1}, "rank=1 (was 2)"),
    (power, {"start_step": 15}, "start_step=15 (was 0)"),
    (power, {"min_gain": 1.5}, "min_gain=1.5 (was 1.0)"),
    (power, {"seed": 7}, "seed=7 (was 0)"),
    (dgc, {"residual_policy": "mean"}, ""),
    (dgc, {"correction": "momentum"}, ""),  # what auto stood for
    (power, {}, ""),
]


class NotesBytes(pl.Callback):
    def __init__(self) -> None:
        self.sent: list[int] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.sent.append(trainer.strategy.ledger.step_sent)


def _change_each(folder: Path) -> list[tuple[list[str], list[int], Any]]:
    found = []
    for build, changes, _ in CHANGES:
        path = (folder if build is dgc else folder / "power") / "1.ckpt"
        notes = NotesBytes()
        with said() as lines:
            left = finish(build(**changes), [notes], None, path, EPOCHS)
        own = [line for line in lines if line.startswith(("DGCStrategy", "PowerSGDStrategy"))]
        found.append((own[1:], notes.sent, left["memory"]))  # the first is that of every fit
    return found


@pytest.fixture(scope="module")
def changed(original: tuple[Path, list[Any]]) -> list[list[tuple[list[str], list[int], Any]]]:
    return on_ranks(2, _change_each, original[0])


@pytest.mark.parametrize("number", range(len(CHANGES)), ids=lambda number: str(CHANGES[number][1]))
def test_changed_settings_are_said_in_one_line(number: int, changed: Any) -> None:
    build, _, words = CHANGES[number]
    lines = [line for line in changed[0][number][0] if "changed settings" in line]
    name = type(build()).__name__
    assert lines == ([f"{name} resumes with changed settings: {words}."] if words else [])


def _bytes_sent(changes: dict[str, Any], changed: Any) -> list[int]:
    (number,) = (n for n, (_, made, _) in enumerate(CHANGES) if made == changes)
    return list(changed[0][number][1])


def test_changed_settings_are_followed(changed: Any) -> None:
    dense = 4 * (64 + 4 + 1)
    assert _bytes_sent({"ratio": 0.2}, changed) == [8 * (410 + 52) + dense] * 6
    assert _bytes_sent({"value_dtype": "float16"}, changed) == [6 * (103 + 13) + dense] * 6
    assert _bytes_sent({"layer_ratios": {"net.0": 0.5}}, changed) == [8 * (1024 + 13) + dense] * 6
    assert _bytes_sent({"rank": 1}, changed) == [4 * (64 + 32 + 4 + 64) + dense] * 6
    assert _bytes_sent({"warmup": [0.5]}, changed) == [8 * (103 + 13) + dense] * 6, "its only epoch is over"
    everything, factors = 4 * (2048 + 256) + dense, 4 * 2 * (64 + 32 + 4 + 64) + dense
    assert _bytes_sent({"start_step": 15}, changed) == [everything] * 3 + [factors] * 3, "these are steps 12 to 17"


def test_what_a_changed_setting_loses_or_cannot_change_is_said(changed: Any) -> None:
    words = {number: " ".join(changed[0][number][0]) for number in range(len(CHANGES))}
    for number, (_, changes, _) in enumerate(CHANGES):
        stops_moving = changes.get("correction") == "error_feedback"
        assert ("momentum of compressed gradients starts at zero" in words[number]) == stops_moving
        assert ("the new seed applies only to gradients that have no factors yet" in words[number]) == (
            "seed" in changes
        )
        assert ("sends everything dense until step 15" in words[number]) == ("start_step" in changes)
        for rank in (0, 1):
            memory = changed[rank][number][2]
            assert all(("velocity" in kept) != stops_moving for kept in memory.values() if "residual" in kept)


class StartsLate(DGCStrategy):
    """A scheme of one's own with a setting that a checkpoint cannot hold as it is."""

    def __init__(self, choose: Callable[..., Any] = sorted, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.choose = choose


def _resume_with_a_function(folder: Path) -> list[str]:
    arguments = {"ratio": 0.05, "warmup": None, "min_numel": 1}
    fit(StartsLate(**arguments), [SavesEpochs(folder)])
    dist.barrier()
    with said() as lines:
        fit(StartsLate(max, **arguments), ckpt=folder / "0.ckpt")
    return copy.copy(lines)


def test_a_setting_that_is_a_function_is_compared_by_name(tmp_path: Path) -> None:
    lines, _ = on_ranks(2, _resume_with_a_function, tmp_path)
    assert "StartsLate resumes with changed settings: choose='builtins.max' (was 'builtins.sorted')." in lines
