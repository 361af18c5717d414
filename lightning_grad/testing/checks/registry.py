"""The list of checks: each is a function of a subject, which returns words, or raises."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lightning_grad.testing.environment import interruptible
from lightning_grad.testing.lines import line_of_error
from lightning_grad.testing.rows import REFUSES, Row
from lightning_grad.testing.subject import NotApplicableError, RefusedError, Subject

Level = Literal["quick", "full"]
Function = Callable[[Subject], str | None]


class GuaranteeError(AssertionError):
    """A guarantee is broken, at a known line of the callback's code."""

    def __init__(self, words: str, line: str = "") -> None:
        super().__init__(words)
        self.line = line


@dataclass(frozen=True)
class Check:
    """One check of one guarantee.

    Args:
        name: Name that begins with the guarantee.
        level: ``"quick"`` if the quick level runs it too.
        function: Function of a subject. It returns words or ``None`` if all is well, and raises an error if it is not, or
            :class:`NotApplicableError`.
        about: What it checks, in one line.
        feature: The field of :class:`~lightning_grad.core.Compatibility` that it tries; empty if none.
    """

    name: str
    level: Level
    function: Function
    about: str
    feature: str = ""

    @property
    def guarantee(self) -> str:
        """The guarantee, such as ``"g3"``."""
        return self.name.split("_")[0]

    def __str__(self) -> str:
        return self.name

    def of(self, subject: Subject) -> Row:
        """Run the check, and return its row. Only Ctrl-C ends it."""
        try:
            with interruptible():
                return Row(self.name, "ok", self.function(subject) or "")
        except NotApplicableError as reason:
            return Row(self.name, "not applicable", str(reason))
        except RefusedError as refusal:  # a check of G6 catches it: there it is the result
            return Row(self.name, "not applicable", f"{REFUSES}{refusal}")
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning makes this of Ctrl-C in a fit
                raise KeyboardInterrupt from error
            return Row(self.name, "failed", "It ends the process.", _line(error, subject))
        except Exception as error:
            return Row(self.name, "failed", _words(error), _line(error, subject))


def _words(error: Exception) -> str:
    """Return the message, with the class unless a comparison of this package failed."""
    text, trace = str(error).strip(), traceback.extract_tb(error.__traceback__)
    compared = isinstance(error, AssertionError) and (not trace or Path(trace[-1].filename).is_relative_to(_HERE))
    return text if compared and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def _line(error: BaseException, subject: Subject) -> str:
    known = str(getattr(error, "line", "")) if isinstance(error, GuaranteeError) else ""
    return known or line_of_error(error, subject.kind)


_HERE = Path(__file__).parents[1]
CHECKS: dict[str, Check] = {}


def check(level: Level, feature: str = "") -> Callable[[Function], Function]:
    """Return a decorator that adds a function to the checks. Its name and first docstring line are those of the check."""
    assert level in get_args(Level)

    def add(function: Function) -> Function:
        name = function.__name__
        about = (inspect.getdoc(function) or "").split("\n")[0]
        CHECKS[name] = Check(name, level, function, about, feature)
        return function

    return add
