"""Score files that are torn, damaged, foreign or hostile: each is refused in one error that names it."""

import dataclasses
import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_grad.data import SampleScores, load_scores, save_scores
from lightning_grad.data.fingerprints import Fingerprint
from tests.data.test_score_files import bare, full, same


def damaged(original: bytes) -> Iterator[bytes]:
    """Yield a file with ends missing, bits flipped, bytes overwritten, and parts twice."""
    generator = random.Random(0)
    yield from (original[: len(original) * part // 40] for part in range(40))
    for _ in range(250):
        changed = bytearray(original)
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        yield bytes(changed)
    for _ in range(50):
        start, size = generator.randrange(len(original)), generator.randrange(1, 40)
        yield original[:start] + generator.randbytes(size) + original[start + size :]
        yield original[:start] + original[start + size :]
        yield original[:start] + original[max(0, start - size) :]


def outcome(path: Path) -> SampleScores | None:
    """Return what a file holds, or None if it is refused by its name."""
    try:
        return load_scores(path)
    except ValueError as error:
        message = str(error)
    assert message.startswith(str(path))
    assert "\n" not in message
    return None


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_damage_is_taken_for_scores_or_raises_what_libraries_raise(save: Any, tmp_path: Path) -> None:
    path = save_scores(full(), tmp_path / "a.npz")
    with np.load(path) as file:
        save(path, **file)
    original, refused = path.read_bytes(), 0
    for content in damaged(original):
        path.write_bytes(content)
        found = outcome(path)
        refused += found is None
        assert found is None or same(found, full())
    assert refused > 200


@pytest.mark.parametrize("ending", ["csv", "npz"])
def test_tables_with_damage_are_refused_by_name_or_are_tables(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    table = "index,score\n" + "\n".join(f"{i},0.{i}" for i in range(20))
    for content in damaged(table.encode()):
        path.write_bytes(content)
        outcome(path)


class Executed:
    def __reduce__(self) -> Any:
        return os._exit, (3,)


def header(shape: tuple[int, ...], dtype: str = "<f8") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def promising(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """Write a file whose scores are the given bytes."""
    with np.load(save_scores(bare(), path)) as file:
        others = {key: file[key] for key in file.files if key != "scores"}
    np.savez(path, **others)
    with zipfile.ZipFile(path, "a", compression) as archive:
        archive.writestr("scores.npy", content)


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "a folder": lambda path: path.mkdir(),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Executed())),
    "a pickle in an array": lambda path: np.savez(path, scores=np.array([Executed()], dtype=object)),
    "a torch file": lambda path: torch.save({"scores": torch.zeros(3)}, path),
    "a zip of texts": lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "hello"),
    "an array that promises terabytes": lambda path: promising(path, header((10**12,))),
    "an array beyond all memory": lambda path: promising(path, header((2**62,))),
    "a shape below zero": lambda path: promising(path, header((-4,)) + b"0" * 32),
    "a matrix of nothing": lambda path: promising(path, header((10**9, 0))),
    "compressed in a way of its own": lambda path: promising(path, b"1" * 9, zipfile.ZIP_LZMA),
    "a header of a deep nest": lambda path: promising(path, b"\x93NUMPY\x01\x00\xff\x7f" + b"(" * 32767),
}


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("ending", ["npz", "csv"])
def test_what_is_no_score_file_is_refused_by_name(kind: str, ending: str, tmp_path: Path) -> None:
    made = tmp_path / "made.npz"
    FOREIGN[kind](made)
    made.rename(tmp_path / f"a.{ending}")
    assert outcome(tmp_path / f"a.{ending}") is None


@pytest.mark.parametrize(
    "entry",
    [
        {"scores": np.array(["a", "b"])},
        {"scores": np.array([1 + 1j, 2])},
        {"scores": np.zeros((2, 2))},
        {"scores": np.zeros(3)},
        {"scores": np.array(1.0)},
        {"scores": np.zeros(2, dtype=[("x", "f8")])},
        {"index": np.array([0.0, 1.5])},
        {"index": np.array([0, -1])},
        {"index": np.array([1, 1])},
        {"index": np.array([0, 2**64 - 1], dtype=np.uint64)},
        {"labels": np.array(["cat", "dog"])},
        {"labels": np.array([0.5, 1.0])},
        {"name": np.array(3)},
        {"name": np.array(["el2n", "grand"])},
        {"epoch": np.array("ten")},
        {"seed": np.array(0.5)},
        {"format": np.array("one")},
        {"format": np.array([1, 2])},
        {"fingerprint_length": np.array("many")},
        {"fingerprint_items": np.array(12)},
        {"fingerprint_seed": np.array("x")},
    ],
    ids=lambda entry: "-".join(f"{key} {value.dtype.kind}{value.shape}" for key, value in entry.items()),
)
def test_entries_of_wrong_types_are_refused_by_name(entry: dict[str, Any], tmp_path: Path) -> None:
    path = save_scores(dataclasses.replace(bare(), fingerprint=Fingerprint(2, "list", "0")), tmp_path / "a.npz")
    with np.load(path) as file:
        np.savez(path, **{**file, **entry})
    assert outcome(path) is None


TABLES = [
    *(
        "",
        "\n\n",
        "index,score",
        "index,score\n1\n",
        "index,score\n1,x",
        "index,score\n1.5,2",
        "score\n1,2,3\nx",
        "a\0b\n1",
    ),
    *("index,score\n" + "9" * 30 + ",1", "index,score\n-1,1", "index,score\n1,1\n1,2", "score\n" + "1" * 200_000),
    *('score\n"1', "\ufeff", "score,score\n1,2\nx,y"),
]


@pytest.mark.parametrize("text", TABLES)
def test_tables_that_are_none_are_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode())
    found = outcome(path)
    assert found is None or len(found.values) == 1


@pytest.mark.parametrize("path", ["", ".", "..", "/", "scores/", "a/.."])
def test_scores_are_written_to_files_only(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores").mkdir()
    with pytest.raises(ValueError, match=r"because it is a folder\. Name a \.npz file"):
        save_scores(bare(), path)
