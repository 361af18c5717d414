"""Read files that may be truncated, damaged or malicious, with one kind of error that names the file."""

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_LONGEST_REASON = 200  # characters


@contextmanager
def errors_that_name(path: Path) -> Iterator[None]:
    """Convert any error that libraries raise for a damaged file into a ValueError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}. Pass a readable file.") from error
    except Exception as error:  # zipfile, zlib, numpy and csv raise dozens of types
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        raise ValueError(
            f"{path} is damaged, or not a score file: it must be a .npz file of save_scores, or a .csv ({reason}). "
            "Compute the scores again, or name another file."
        ) from error


def read_entries(path: Path) -> dict[str, Any]:
    """Return the arrays in a ``.npz`` file; a damaged file raises an error before memory is allocated."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) != _promised_members(path, archive):
            raise ValueError("its table of contents is damaged")  # zipfile reads a truncated one without an error
        for member in members:
            _refuse_promise(archive, member)
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def _promised_members(path: Path, archive: zipfile.ZipFile) -> int:
    end = 22 + len(archive.comment)  # bytes of the last record (PKWARE's specification of zip files, 4.3.16)
    with path.open("rb") as file:
        file.seek(-end, os.SEEK_END)
        return int.from_bytes(file.read(22)[10:12], "little")


def _refuse_promise(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raise if the header of an array declares more bytes than the file has: numpy would allocate all of them."""
    with archive.open(member) as file:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[np.lib.format.read_magic(file)](file)
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"{member.filename} is too short for its shape {shape}")
