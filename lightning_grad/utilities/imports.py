"""Optional packages, imported where they are used and named clearly when they are missing."""

from __future__ import annotations

from importlib.util import find_spec


def is_installed(package: str) -> bool:
    """Say whether a package can be imported, without importing it."""
    return find_spec(package) is not None


def require(package: str, extra: str, needed_by: str) -> None:
    """Raise if an optional package is missing.

    Args:
        package: Name to import.
        extra: The extra of lightning-grad that brings it.
        needed_by: Who needs it, for the error.

    Raises:
        ModuleNotFoundError: With the command that installs it.
    """
    if not is_installed(package):
        raise ModuleNotFoundError(f"{needed_by} needs {package}: pip install 'lightning-grad[{extra}]'.")
