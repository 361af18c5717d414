"""What came of a trial, and whether an error is a refusal or a failure."""

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

import lightning_grad
from lightning_grad.cli.check.watch import Phase
from lightning_grad.core import Chosen

Status = Literal["runs", "refused", "FAILED", "in use", "not tried"]

_REFUSALS = (ValueError, TypeError, RuntimeError, LookupError, OSError)
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


def outcome_of(error: Exception, technique: type[Any] | None) -> Outcome:
    """Return a refusal if the technique itself raised the error in words about itself, otherwise a failure."""
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename)
    is_ours = raised_in.is_relative_to(_PACKAGE) and not raised_in.is_relative_to(_HERE)
    named = technique is not None and technique.__name__ in str(error)
    if named and is_ours and isinstance(error, _REFUSALS):
        return Outcome("refused", [str(error)])
    return Outcome("FAILED", [traceback_of(error)])


def traceback_of(error: Exception) -> str:
    """Return the traceback of an error; it begins with the user's code, if that was reached."""
    lines = traceback.extract_tb(error.__traceback__)
    known = [_PACKAGE, Path(pl.__file__).parents[1], Path(torch.__file__).parent]
    outside = [not any(Path(frame.filename).is_relative_to(folder) for folder in known) for frame in lines]
    start = outside.index(True) if True in outside else 0
    shown = traceback.format_list(lines[start:]) + traceback.format_exception_only(error)
    return "".join(shown).rstrip()
