"""Write ``examples/quickstart.ipynb`` from the text and code of ``docs/quickstart.md``."""

from __future__ import annotations

import json
import re
from typing import Any

from exported import ROOT

SOURCE = "docs/quickstart.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```text\n.*?^```\n)?", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?://|#)([^)]+)\)")
_NOT_HERE = re.compile(r"^<!-- page -->\n.*?^<!-- /page -->\n", re.DOTALL | re.MULTILINE)


def write_notebook() -> str:
    """Return the notebook, without outputs."""
    page = _NOT_HERE.sub("", (ROOT / SOURCE).read_text(encoding="utf-8"))
    cells, end = [], 0
    for block in _BLOCK.finditer(page):
        cells += [*_texts(page[end : block.start()]), _cell("code", block[1])]
        end = block.end()
    cells += _texts(page[end:])
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def _texts(text: str) -> list[dict[str, Any]]:
    """Return the text between two blocks as a list of at most one cell, with links relative to the notebook."""
    text = _LINK.sub(lambda link: f"](../docs/{link[1]})".replace("docs/../", ""), text.strip())
    return [_cell("markdown", text)] if text else []


def _cell(kind: str, source: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "metadata": {}, "source": source.strip().splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})
