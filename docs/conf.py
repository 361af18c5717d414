"""Configuration of Sphinx: Markdown pages, and the API from docstrings. Warnings are errors."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from exported import all_techniques

from lightning_grad import __version__
from lightning_grad.cli.catalog import works_with

project = "lightning-grad"
author = "The lightning-grad developers"
copyright = "The lightning-grad developers"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "mathml",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
smartquotes_action = "D"  # only dashes: quotes and dots of error messages must not change
html_theme = "furo"
pygments_dark_style = "github-dark"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_extra_path = ["llms.txt", "techniques.json"]
html_title = f"lightning-grad {__version__}"

myst_enable_extensions = ["dollarmath", "tasklist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def add_works_with(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Append the declared compatibility of a technique to its docstring."""
    if found in all_techniques():
        lines += ["", "**Works with**", ""]
        lines += [f"- {line.replace('`', '``')}" for line in works_with(found)]
        lines.append("")


def setup(app: Any) -> None:
    """Register the hook for docstrings."""
    app.connect("autodoc-process-docstring", add_works_with)
