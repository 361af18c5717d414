"""The hardest and easiest samples as a page for a browser, which needs no other file and runs no script."""

from __future__ import annotations

import base64
import html

from lightning_grad.callbacks.data_pruning._samples import ORDERS, Groups, Sample
from lightning_grad.callbacks.data_pruning._scored import ScoredSet
from lightning_grad.utilities.png import png_bytes

_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --soft: #5c5c5c; --back: #ffffff; --card: #f3f3f3; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --text: #ececec; --soft: #a8a8a8; --back: #151515; --card: #242424; --wrong: #ff8a80; }
}
body { margin: 0 auto; max-width: 72rem; padding: 1rem; font: 1rem/1.4 system-ui, sans-serif; color: var(--text);
  background: var(--back); }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
p { margin: 0.2rem 0; overflow-wrap: anywhere; }
ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 0.75rem; padding: 0; }
ul.wide { grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); }
li { list-style: none; background: var(--card); border-radius: 0.4rem; padding: 0.6rem; }
img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; }
img.small { image-rendering: pixelated; }
.words { font-size: 0.9rem; max-height: 14rem; overflow: auto; }
.facts { color: var(--soft); font-size: 0.85rem; }
.wrong { color: var(--wrong); font-weight: 600; }
"""


def page_of(scored: ScoredSet, groups: Groups, title: str) -> str:
    """Return the samples as a page of HTML that needs no other file, and no script."""
    total, missing = len(scored.values), int(scored.values.isnan().sum())
    kept = total if scored.kept is None else len(scored.kept)
    facts = f"{total:,} samples, {kept:,} kept ({scored.kept_share:.1%})."
    if missing:
        facts += f" Without a score, and not shown: {missing:,}."
    wide = ' class="wide"' if all(sample.picture is None for group in groups for sample in group) else ""
    sections = [
        f"<h2>{order.format(len(group))}</h2>\n<ul{wide}>\n" + "\n".join(map(_card, group)) + "\n</ul>"
        for order, group in zip(ORDERS, groups, strict=True)
        if group
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>{facts} Rank 0 is the hardest of all.</p>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _card(sample: Sample) -> str:
    state = "kept" if sample.kept else "pruned"
    lines = [_input(sample)]
    if sample.label is not None:
        lines.append(f"<p>label <b>{html.escape(str(sample.label))}</b></p>")
    if sample.prediction is not None:
        marked = ' class="wrong"' if sample.wrong else ""
        lines.append(f"<p{marked}>{sample.sign} predicted <b>{html.escape(str(sample.prediction))}</b></p>")
    lines.append(f'<p class="facts">score {sample.score:.5g}, rank {sample.rank}<br>index {sample.index}, {state}</p>')
    return "<li>\n" + "\n".join(lines) + "\n</li>"


def _input(sample: Sample) -> str:
    if sample.picture is None:
        return f'<p class="words" dir="auto">{html.escape(sample.text)}</p>'
    small = ' class="small"' if sample.is_coarse else ""
    encoded = base64.b64encode(png_bytes(sample.picture)).decode()
    return f'<img{small} src="data:image/png;base64,{encoded}" alt="input of sample {sample.index}">'
