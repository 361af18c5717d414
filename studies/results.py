"""The results of trainings: a file of lines for each claim, each line with the origin of its numbers."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from lightning_grad import __version__
from studies import ROOT
from studies.claim import Claim, Result, Run, freeze, plain, restored
from studies.sources import digest_of, files_of

try:
    import fcntl
except ImportError:  # Windows: start one study at a time there
    fcntl = None  # type: ignore[assignment]

HAS_LOCKS: bool = fcntl is not None

FOLDER = ROOT / "studies" / "results"


@dataclass(frozen=True)
class Origin:
    """The origin of results.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        hardware: Names of the processor and of the GPU, and the number of CPU threads.
        versions: Versions of Python and of the packages.
        code: Digest of the code on which the results of the claim depend, see ``sources.py``.
        commit: Commit of the repository.
        dirty: Whether the files of that code had changes that were not committed.
    """

    device: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    code: str
    commit: str
    dirty: bool

    def __str__(self) -> str:
        hardware = ", ".join([self.hardware["gpu"] or self.hardware["cpu"], f"{self.hardware['threads']} thread(s)"])
        packages = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        changed = " with uncommitted changes" if self.dirty else ""
        return f"commit {self.commit}{changed} (code {self.code}), {hardware}, {packages}"

    @property
    def same(self) -> tuple[str, str]:
        """What must be equal for numbers to be comparable without a note."""
        return self.code, self.place

    @property
    def place(self) -> str:
        """The hardware and the versions, as text."""
        return freeze({"hardware": self.hardware, "versions": self.versions})


def origin_of(claim: Claim[Any]) -> Origin:
    """Return the origin of results of this process."""
    gpu = torch.cuda.get_device_name() if claim.device == "cuda" else None
    hardware = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "gpu": gpu}
    packages = {name: version(name) for name in ("torch", "lightning")}
    versions = {"python": platform.python_version(), **packages, "lightning-grad": __version__}
    return Origin(claim.device, hardware, versions, digest_of(claim), *commit(files_of(claim)))


@cache
def cpu_name() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@cache
def commit(files: tuple[str, ...]) -> tuple[str, bool]:
    """Return the commit, and whether some files of the working tree differ from it."""
    status = git("status", "--porcelain", "--", *files)
    return git("rev-parse", "--short=12", "HEAD") or "unknown", bool(status)


def git(*arguments: str) -> str:
    """Return what a git command prints, or nothing without git or a repository."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class Line:
    """One result with everything it depends on.

    Args:
        claim: Name of the claim.
        arm: What was trained.
        seed: Its seed.
        rate: Its peak learning rate; ``None`` for the rate of the module.
        settings: Settings of the claim.
        metrics: Measurements by name.
        seconds: Duration of the training.
        origin: Where the numbers come from.
        date: End of the training, UTC.
    """

    claim: str
    arm: str
    seed: int
    rate: float | None
    settings: dict[str, Any]
    metrics: dict[str, Any]
    seconds: float
    origin: Origin
    date: str

    @property
    def key(self) -> Run:
        """The training of which this is the result."""
        return Run(self.arm, self.seed, self.rate)

    def result(self, claim: Claim[Any]) -> Any:
        """Return the result as an object of its family."""
        return claim.result(self.arm, self.seed, self.rate, **self.metrics)


def line_of(claim: Claim[Any], result: Result, seconds: float, origin: Origin) -> Line:
    """Return the line of a result."""
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    key = (result.arm, result.seed, result.rate)
    return Line(claim.name, *key, claim.settings_of(result.arm), result.metrics, round(seconds, 2), origin, date)


class Store:
    """The results in a folder. Several processes may use it at the same time.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder

    def path(self, claim: Claim[Any]) -> Path:
        """Return the file of a claim."""
        return self.folder / f"{claim.name}.jsonl"

    def read(self, claim: Claim[Any], origin: Origin | None = None) -> list[Line]:
        """Return the results with the settings of a claim, on its device: of each training, the last one.

        Args:
            claim: The claim.
            origin: If given, ignore results of other code, versions or hardware.
        """
        lines = [line for line in self.history(claim) if origin is None or line.origin.same == origin.same]
        return list({line.key: line for line in lines}.values())

    def history(self, claim: Claim[Any]) -> list[Line]:
        """Return all results with the settings of a claim, on its device; of some trainings there are several."""
        wanted = {arm: freeze(claim.settings_of(arm)) for arm in claim.arms}
        return [
            line
            for line in self.all(claim)
            if line.arm in wanted and freeze(line.settings) == wanted[line.arm] and line.origin.device == claim.device
        ]

    def all(self, claim: Claim[Any]) -> list[Line]:
        """Return all results in the file of a claim."""
        path = self.path(claim)
        if not path.exists():
            return []
        with path.open("rb") as file, locked(file):
            written = file.read()
        whole, _, _ = written.rpartition(b"\n")  # what follows the last line break was not finished
        return list(parse(path, whole.splitlines()))

    def append(self, claim: Claim[Any], line: Line) -> None:
        """Write a result. It is on the disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path(claim).open("ab+") as file, locked(file):
            drop_half_line(file)
            file.write(json.dumps(plain(asdict(line))).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def reserve(self, claim: Claim[Any], run: Run) -> Iterator[bool]:
        """Yield True if no other process runs this training. A killed process frees its trainings."""
        words = freeze(
            {"key": (claim.name, claim.device, run.arm, run.seed, run.rate), "settings": claim.settings_of(run.arm)}
        )
        path = self.folder / ".running" / hashlib.sha256(words.encode()).hexdigest()[:16]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            yield is_free(file)


def parse(path: Path, lines: Iterable[bytes]) -> Iterator[Line]:
    """Yield the results of a file."""
    for number, text in enumerate(lines, start=1):
        try:
            read = json.loads(text)
            yield Line(**{**read, "metrics": restored(read["metrics"]), "origin": Origin(**read["origin"])})
        except (ValueError, TypeError, KeyError) as error:
            raise SystemExit(
                f"Cannot read line {number} of {path}: {error}. Delete the line; its training then runs again."
            ) from error


def drop_half_line(file: IO[bytes]) -> None:
    """Remove the end of a file that a killed process has not finished writing."""
    file.seek(0)
    written = file.read()
    whole = written.rfind(b"\n") + 1
    if whole < len(written):
        print(f"{file.name}: dropped an unfinished last line; its training runs again.", file=sys.stderr)
        file.truncate(whole)


@contextmanager
def locked(file: IO[bytes]) -> Iterator[None]:
    """Keep other processes from the file."""
    if HAS_LOCKS:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
    yield


def is_free(file: IO[bytes]) -> bool:
    """Return True if no other process has this file, and keep it until it is closed."""
    if not HAS_LOCKS:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
