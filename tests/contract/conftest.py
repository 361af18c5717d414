"""Order of the tests in this folder: all of one technique, then all of the next, so that they share its runs."""

from pathlib import Path
from typing import Any


def pytest_collection_modifyitems(items: list[Any]) -> None:
    places = [i for i, item in enumerate(items) if _technique(item)]
    order = {name: i for i, name in enumerate(dict.fromkeys(_technique(items[place]) for place in places))}
    ordered = sorted((items[place] for place in places), key=lambda item: order[_technique(item)])
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


def _technique(item: Any) -> str:
    """Return the name of the technique that a test of this folder is about, empty for any other test."""
    if Path(__file__).parent not in item.path.parents or not hasattr(item, "callspec"):
        return ""
    return str(item.callspec.params.get("technique", ""))
