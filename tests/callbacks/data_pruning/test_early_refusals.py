"""What a later epoch would stumble over is found before the first batch: score files, and files to be written."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_grad.callbacks import DataPruning
from lightning_grad.data import SampleScores, fingerprint, load_scores, save_scores
from lightning_grad.testing import fit, make_data

TOTAL = 48


class Batches(pl.Callback):
    count = 0

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.count += 1


def pruning(**arguments: Any) -> DataPruning:
    return DataPruning(**{"prune": 0.5, "epoch": 2, "figure": False, "num_shown": 0, **arguments})


def refused(error: type[Exception], says: str, **arguments: Any) -> None:
    """Check that a run is refused without a batch."""
    spy = Batches()
    callback = pruning(**arguments)
    with pytest.raises(error, match=says):
        fit([callback, spy], max_epochs=3)
    assert spy.count == 0


def scores(name: str = "el2n", total: int = TOTAL, data: Any = None, **arguments: Any) -> SampleScores:
    mark = None if data is None else fingerprint(data)
    return SampleScores(torch.arange(float(total)), name, fingerprint=mark, **arguments)


FILES: dict[str, tuple[Any, str]] = {
    "torn": (lambda path: path.write_bytes(path.read_bytes()[:300]), "a.npz is damaged, or not a score file"),
    "empty": (lambda path: path.write_bytes(b""), "a.npz is damaged, or not a score file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "a.npz cannot be read: Is a directory"),
    "of another length": (lambda path: save_scores(scores(total=40), path), r"the length \(40 against 48\)"),
    "beyond the data": (
        lambda path: save_scores(scores(total=2, index=torch.tensor([0, 60])), path),
        r"the length \(61 against 48\)",
    ),
    "of another data set": (lambda path: save_scores(scores(data=make_data(1)), path), "the items .* differs"),
}


@pytest.mark.parametrize("fault", FILES)
def test_score_files_are_read_before_the_first_batch(fault: str, tmp_path: Path) -> None:
    spoil, says = FILES[fault]
    path = save_scores(scores(data=make_data(0)), tmp_path / "a.npz")
    fit([pruning(score_files=[str(path)])], max_epochs=3)
    spoil(path)
    refused(ValueError, says, score_files=[str(path)])


def test_files_that_do_not_go_together_and_files_without_classes(tmp_path: Path) -> None:
    a, b = (str(save_scores(scores(name), tmp_path / f"{name}.npz")) for name in ("el2n", "grand"))
    refused(ValueError, "Scores must be of one kind to be averaged", score_files=[a, b])
    refused(ValueError, "balances classes, but the class of each sample is unknown", score_files=[a], balance="class")
    refused(
        FileNotFoundError, "DataPruning finds no score file '.*none.npz'", score_files=[a, str(tmp_path / "none.npz")]
    )


def test_the_files_are_those_that_were_there_at_the_start(tmp_path: Path) -> None:
    path = save_scores(scores(), tmp_path / "a.npz")

    class Remove(pl.Callback):
        def on_train_start(self, *arguments: Any) -> None:
            path.unlink()

    technique = pruning(score_files=[str(path)])
    fit([technique, Remove()], max_epochs=3)
    assert technique.kept is not None
    assert technique.kept.tolist() == list(range(24, 48))


@pytest.mark.filterwarnings("ignore:The scores in")
def test_a_mismatch_that_is_allowed_is_warned_of_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = save_scores(scores(total=40), tmp_path / "a.npz")
    fit([pruning(score_files=[str(path)], strict=False)], max_epochs=3)
    assert sum("belong to another data set" in str(warning.message) for warning in recwarn) <= 1


@pytest.mark.parametrize("path", ["", ".", "..", "/", "a/..", "there/"])
def test_a_path_that_names_no_file_is_refused_in_the_constructor(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match=r"^save_scores must be the path of a \.npz file; got '"):
        pruning(save_scores=path)


@pytest.mark.parametrize("path", ["file/a.npz", "file/b/c/a", "a" * 300, "a\0b.npz", "/proc/none/a.npz"])
@pytest.mark.parametrize("rounds", [2, [1, 2]])
def test_a_path_that_cannot_be_written_is_refused_before_the_first_batch(
    path: str, rounds: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    target = str(tmp_path / path) if not path.startswith("/") else path
    refused(
        ValueError,
        r"^DataPruning cannot write save_scores=.*Set it to a path that can",
        save_scores=target,
        epoch=rounds,
    )


def test_a_path_that_can_be_written_is_left_empty_until_then(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "scores"

    class Look(pl.Callback):
        def on_train_start(self, *arguments: Any) -> None:
            found.append(list(tmp_path.rglob("*.*")))

    found: list[Any] = []
    fit([pruning(save_scores=str(path)), Look()], max_epochs=3)
    assert found == [[]]
    assert load_scores(f"{path}.npz").name == "el2n"
    fit([pruning(save_scores=str(tmp_path / "no" / "scores"), keep="random")], max_epochs=3)
    assert not (tmp_path / "no").exists(), "there are no scores to write"


def test_all_ranks_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    technique = pruning(save_scores=str(tmp_path / "file" / "a.npz"))
    with pytest.raises(Exception, match="cannot write save_scores"):
        fit([technique], max_epochs=3, strategy="ddp_fork", devices=2)


@pytest.mark.parametrize("name", ["late", "späte Runde", "a: b", "v1.2"])
def test_a_name_stays_in_the_folder_of_the_run(name: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    technique = DataPruning(0.5, epoch=1, figure=False, num_shown=2, name=name)
    fit([technique], max_epochs=2, logger=CSVLogger(run, name="", version=""))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(run in path.parents for path in written)
    assert sum(path.suffix == ".npz" for path in written) == 1
    assert all(path.name.isascii() for path in written if path.suffix == ".npz")
