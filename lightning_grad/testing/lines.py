"""Find the line of a callback's code that an error or a leftover comes from."""

from __future__ import annotations

import functools
import inspect
import sysconfig
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

_STANDARD = Path(sysconfig.get_path("stdlib"))
_PACKAGES = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
_LIBRARIES = [Path(__file__).parent, Path(torch.__file__).parent, Path(pl.__file__).parents[1]]


def line_of_error(error: BaseException, callback: type) -> str:
    """Return the place of the last call in the callback's own file, or else in code of no library.

    Args:
        error: An error that was raised and caught.
        callback: Class of the callback.

    Returns:
        str: ``"path:line"``; empty if only libraries took part.
    """
    own = _file_of(callback)
    frames = [(Path(frame.f_code.co_filename), line) for frame, line in _walk(error)]
    for belongs in (lambda path: path == own, lambda path: not _is_library(path)):
        for path, line in reversed(frames):
            if belongs(path):
                return place(path, line)
    return ""


def line_of_function(function: Any) -> str:
    """Return where a function, method, partial or wrapper is defined; empty for code of libraries and builtins."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    if code is None or _is_library(Path(code.co_filename)):
        return ""
    return place(Path(code.co_filename), code.co_firstlineno)


def line_of_class(cls: type, *methods: str) -> str:
    """Return where the first of the methods that the class overrides is defined, or else the class."""
    own = _file_of(cls)
    for name in methods:
        function = getattr(cls, name, None)
        code = getattr(function, "__code__", None)
        if code is None or function is getattr(pl.Callback, name, None):
            continue
        path = Path(code.co_filename)
        if path == own or not _is_library(path):
            return place(path, code.co_firstlineno)
    try:
        return "" if own is None else place(own, inspect.getsourcelines(cls)[1])
    except (OSError, TypeError):  # defined in an interactive session
        return ""


def place(path: Path, line: int) -> str:
    """Return ``"path:line"``, with the path relative to the installed packages or the working directory that hold it."""
    for folder in (*_PACKAGES, Path.cwd()):
        if path.is_relative_to(folder):
            return f"{path.relative_to(folder)}:{line}"
    return f"{path}:{line}"


def _walk(error: BaseException) -> list[tuple[Any, int]]:
    """Return the frames of an error, then those of the error that it was raised from."""
    cause = error.__cause__
    return [*traceback.walk_tb(error.__traceback__), *(_walk(cause) if cause is not None else [])]


def _file_of(cls: type) -> Path | None:
    try:
        return Path(inspect.getfile(cls))
    except (OSError, TypeError):
        return None


def _is_library(path: Path) -> bool:
    standard = path.is_relative_to(_STANDARD) and "site-packages" not in path.parts
    return standard or str(path).startswith("<") or any(path.is_relative_to(library) for library in _LIBRARIES)
