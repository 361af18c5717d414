"""Sphinx extension: write formulas as MathML, which browsers show without scripts and network access."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert

# Commands that latex2mathml 3.81 does not convert after \Big and \left.
_DELIMITERS = {
    r"\lVert": "‖",
    r"\rVert": "‖",
    r"\|": "‖",
    r"\{": "{",
    r"\}": "}",
    r"\lceil": "⌈",
    r"\rceil": "⌉",
    r"\lfloor": "⌊",
    r"\rfloor": "⌋",
}
_LIMITS = ("max", "min", "argmax")  # operators whose subscript is below them in a displayed formula
_STYLES = {"double-struck": "DOUBLE-STRUCK", "script": "SCRIPT"}


class UnknownFormulaError(ValueError):
    """A formula contains an unknown command."""


def as_mathml(formula: str, display: str = "inline") -> str:
    r"""Convert a LaTeX formula to MathML.

    Raises:
        UnknownFormulaError: If a part of it cannot be converted.

    Example:
        >>> as_mathml(r"\sqrt{2}")
        '<math display="inline"><mrow><msqrt><mrow><mn>2</mn></mrow></msqrt></mrow></math>'
    """
    latex = formula.replace(r"\operatorname*{arg\,max}", r"\operatorname{argmax}")
    latex = re.sub(r"\\[bB]igg?([lr])(?![a-z])", lambda side: r"\left" if side[1] == "l" else r"\right", latex)
    try:
        written = convert(latex, display=display)
    except Exception as error:
        raise UnknownFormulaError(f"{formula!r} cannot be written as MathML: {error}") from error
    tree = ElementTree.fromstring(written.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', ""))
    for element in tree.iter():
        _repair(element, display, formula)
    return ElementTree.tostring(tree, encoding="unicode")


def _repair(element: ElementTree.Element, display: str, formula: str) -> None:
    """Adapt one element to current browsers."""
    text = element.text or ""
    element.text = text.replace(r"\_", "_") if element.tag == "mtext" else _DELIMITERS.get(text, text)
    if element.text in ("‖", "|") and "form" not in element.attrib:
        element.attrib |= {"stretchy": "false", "lspace": "0", "rspace": "0"}
    variant = element.attrib.pop("mathvariant", None)
    if variant in _STYLES:
        element.text = _letter(element.text, _STYLES[variant])
    if display == "block" and element.tag == "msub" and element[0].text in _LIMITS:
        element.tag = "munder"
    if "\\" in (element.text or ""):
        raise UnknownFormulaError(f"{formula!r}: {element.text!r} cannot be written as MathML.")


def _letter(letter: str, style: str) -> str:
    """Return the code point of a letter or digit in a style; browsers dropped the attribute mathvariant."""
    kind = unicodedata.name(letter).removeprefix("LATIN ").replace("CAPITAL LETTER", "CAPITAL")
    for name in (f"MATHEMATICAL {style} {kind}", f"{style} {kind}"):
        with contextlib.suppress(KeyError):
            return unicodedata.lookup(name)
    raise UnknownFormulaError(f"Unicode has no {letter!r} in the style {style}.")


def visit_inline(writer: Any, node: Any) -> None:
    """Write an inline formula."""
    from docutils import nodes

    writer.body.append(as_mathml(node.astext()))
    raise nodes.SkipNode


def visit_block(writer: Any, node: Any) -> None:
    """Write a displayed formula. It scrolls if it is wider than the page."""
    from docutils import nodes

    writer.body.append(f'<div class="formula">{as_mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    """Register the renderer of formulas."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
