"""What came of a trial, and whether an error is a refusal or a failure."""

import importlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

import lightning_grad
from lightning_grad.cli.check.watch import Phase
from lightning_grad.core import Chosen

Status = Literal["runs", "refused", "FAILED", "in use", "not tried"]

_REFUSALS = (ValueError, TypeError, RuntimeError, LookupError, OSError, ImportError)
_PACKAGE = Path(lightning_grad.__file__).parent
_HERE = Path(__file__).parent


@dataclass
class Outcome:
    """What came of a fit.

    Args:
        status: Whether it ended well.
        words: What the technique said: its refusal, or its warnings; the traceback of a failure.
        seconds: Time of each batch that counts.
        batches: Number of training batches.
        calls: Calls of the module's steps outside of training batches.
        chosen: What the technique acted on.
        device: Device of the module.
        peak: Peak memory of the device in bytes.
        is_finite: Whether all weights are finite at the end.
    """

    status: Status = "runs"
    words: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    batches: int = 0
    calls: Mapping[Phase, int] = field(default_factory=dict)
    chosen: Chosen | None = None
    device: str = ""
    peak: int | None = None
    is_finite: bool = True


def outcome_of(error: BaseException, technique: type[Any] | None) -> Outcome:
    """Return a refusal if the technique itself raised the error in words about itself, otherwise a failure."""
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename)
    is_ours = raised_in.is_relative_to(_PACKAGE) and not raised_in.is_relative_to(_HERE)
    named = technique is not None and technique.__name__ in str(error)
    if named and is_ours and isinstance(error, _REFUSALS):
        return Outcome("refused", [str(error)])
    return Outcome("FAILED", [traceback_of(error)])


def traceback_of(error: BaseException) -> str:
    """Return the traceback of an error, from the user's code on.

    If the user's code was not reached, it begins with the technique. An error that neither of them raised, such as one
    about a missing loader, needs no traceback. A library may hide an error of the user's code behind its own.
    """
    errors = list(_causes_of(error))
    shown = next((cause for cause in errors if _frames(cause, _not_users())), error)
    frames = _frames(shown, _not_users()) or _frames(shown, [_HERE, _PACKAGE / "testing", *_libraries()])
    return "".join(traceback.format_list(frames) + traceback.format_exception_only(shown)).rstrip()


def _causes_of(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _frames(error: BaseException, skipped: list[Path]) -> list[traceback.FrameSummary]:
    """Return the frames of an error from the first one on that is in none of these folders."""
    frames = traceback.extract_tb(error.__traceback__)
    for start, frame in enumerate(frames):
        path = Path(frame.filename)
        if not frame.filename.startswith("<frozen") and not any(path.is_relative_to(folder) for folder in skipped):
            return frames[start:]
    return []


def _not_users() -> list[Path]:
    return [_PACKAGE, *_libraries()]


def _libraries() -> list[Path]:
    modules = (pl, torch, importlib, sys.modules.get("pytorch_lightning"), sys.modules.get("jsonargparse"))
    folders = [Path(module.__file__).parent for module in modules if module is not None and module.__file__]
    return [*folders, Path(pl.__file__).parents[1]]
