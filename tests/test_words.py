"""Words that do not stand in what people read: docs, docstrings, comments, errors. CONTRIBUTING.md says why."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLAIN = {
    r"anew": "again, or re- as in recompute",
    r"beside": "next to, or with",
    r"for ever": "forever, or permanently",
    r"goe?s? on with": "continues with, or keeps",
    r"hand(s|ed)? over": "pass",
    r"hardly ever": "rarely",
    r"in vain": "without effect",
    r"is none of": "must be one of",
    r"leav(e|es|ing) out|left out": "drop, omit, exclude",
    r"nobody|somebody|whoever": "no callback, a callback, the caller",
    r"nor is|nor are|nor does|nor do": "a second sentence with not",
    r"(is|are|was|were) passed over": "skip",
    r"say whether|tell whether": "return True if",
    r"shall": "must, should, or the present tense",
    r"such as come": "those that come",
    r"thereby|whereby|therein|thereof|hereby": "the noun itself",
    r"weigh(s|ed)? up": "give more weight",
    r"which of both": "the two by name",
}
READ = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "examples", "studies", "benchmarks", "lightning_grad")


def texts() -> Iterator[Path]:
    for name in READ:
        path = ROOT / name
        found = [path] if path.is_file() else path.rglob("*")
        yield from (p for p in found if p.suffix in {".md", ".py", ".yaml", ".ipynb"} and "_build" not in p.parts)


@pytest.mark.parametrize("old", PLAIN)
def test_prose_uses_plain_words(old: str) -> None:
    word = re.compile(rf"\b(?:{old})\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if word.search(line)
    ]
    assert not found, f"Write {PLAIN[old]}:\n" + "\n".join(found)


def test_the_words_are_found() -> None:
    """The patterns match what they are meant to match, or the test above could not fail."""
    for sentence in ("computed anew", "Nobody asks", "which is left out", "it goes on with the rest", "shall be"):
        assert any(re.search(rf"\b(?:{old})\b", sentence, re.IGNORECASE) for old in PLAIN), sentence
