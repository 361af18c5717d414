"""Optional packages: asked for where they are used, and never imported before."""

from importlib.util import find_spec


def is_installed(package: str) -> bool:
    """Say whether a package can be imported, without importing it."""
    return find_spec(package) is not None
