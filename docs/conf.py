"""Sphinx: the method cards in Markdown, and the API from docstrings. Built with warnings as errors."""

from lightning_grad import __version__

project = "lightning-grad"
author = "The lightning-grad developers"
copyright = "The lightning-grad developers"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"lightning-grad {__version__}"

myst_enable_extensions = ["dollarmath", "tasklist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
