"""Figures of a scored training set: the histogram of its scores, and its hardest and easiest samples."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_grad.callbacks.data_pruning._samples import OF_HARDNESS, Groups, Sample, named, shortened
from lightning_grad.callbacks.data_pruning._scored import ScoredSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The first two are from the colorblind-safe palette of Okabe and Ito; the red always comes with a sign.
_KEPT, _PRUNED, _WRONG = "#0072b2", "#e69f00", "#b3261e"
_MOST_BARS = 30  # classes; more are drawn as a sorted curve
_MOST_DRAWN = 40  # samples per group in the figure; the table shows all
_COARSE = 100  # pixels; pictures with a shorter longest side are drawn without smoothing
_COLUMNS = 8  # samples per row of the figure
_LONG_TAIL = 30.0  # the axis is logarithmic if the largest score exceeds this many times the median
_ABOVE: dict[str, Any] = {  # legend above the axes
    "frameon": False,
    "fontsize": "small",
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "borderaxespad": 0.2,
}


# The figure of the scores.


def draw_scores(scored: ScoredSet, title: str, class_names: Sequence[str] | None) -> Figure:
    """Draw the histogram of the scores, kept and pruned, above the kept share of each class."""
    from matplotlib.figure import Figure

    values, kept = scored.values.numpy(), _kept_mask(scored)
    labels = np.full(len(values), -1) if scored.labels is None else scored.labels.numpy()
    by_class = bool((labels >= 0).any()) and not kept.all()
    figure = Figure(figsize=(8, 6.6 if by_class else 4), layout="constrained")
    axes = figure.subplots(2 if by_class else 1, 1, squeeze=False, height_ratios=[1.2, 1] if by_class else [1])[:, 0]
    figure.suptitle(f"{title}, {int(kept.sum()):,} of {len(values):,} samples kept", parse_math=False)
    _draw_histogram(axes[0], values, kept)
    higher = "more influential" if scored.is_influence else "harder"
    axes[0].set_xlabel("\n".join([f"{scored.name} score, higher is {higher}", *_notes(scored)]), parse_math=False)
    if by_class:
        _draw_classes(axes[1], labels, kept, class_names)
    return figure


def _notes(scored: ScoredSet) -> Iterator[str]:
    never, missing = int(scored.values.isinf().sum()), int(scored.values.isnan().sum())
    if never:
        meaning = " (never learned)" if "forget" in scored.name else ""
        yield f"samples with an infinite score{meaning}, in a bin at the end: {never:,}"
    if missing:
        yield f"samples without a score, not drawn: {missing:,}"


def _kept_mask(scored: ScoredSet) -> NDArray[np.bool_]:
    if scored.kept is None:
        return np.ones(len(scored.values), dtype=bool)
    kept = np.zeros(len(scored.values), dtype=bool)
    kept[scored.kept.cpu().numpy()] = True
    return kept


def _draw_histogram(axis: Axes, values: NDArray[np.float64], kept: NDArray[np.bool_]) -> None:
    """Draw the scores as stacked bars of kept and pruned samples, with lines at the cuts."""
    finite = values[np.isfinite(values)]
    logarithmic = bool(finite.size) and finite.min() > 0 and finite.max() > _LONG_TAIL * np.median(finite)
    edges = _edges(np.log10(finite) if logarithmic else finite)
    ends = _end_bins(edges, values)
    if logarithmic:
        axis.set_xscale("log")
        edges, ends = 10.0**edges, {end: (10.0**left, 10.0**right) for end, (left, right) in ends.items()}
        edges[[0, -1]] = finite.min(), finite.max()  # exact, because 10**log10(x) is rounded
    lefts = np.concatenate([edges[:-1], [left for left, _ in ends.values()]])
    widths = np.concatenate([np.diff(edges), [right - left for left, right in ends.values()]])
    bottom, shown = np.zeros(len(lefts)), list[Any]()
    for name, color, chosen in (("kept", _KEPT, kept), ("pruned", _PRUNED, ~kept)):
        some = values[chosen]
        heights = np.concatenate([np.histogram(some, edges)[0], [(some == end).sum() for end in ends]])
        if chosen.any():
            label = f"{name}: {int(chosen.sum()):,}"
            shown.append(axis.bar(lefts, heights, widths, bottom, align="edge", color=color, label=label))
        bottom += heights
    for place, cut in enumerate(_cuts(values, kept)):
        style, label = ("--", ":")[place], f"cut at {cut:.4g}"
        shown.append(axis.axvline(cut, color="black", linewidth=1.2, linestyle=style, label=label))
    axis.set_ylabel("samples")
    axis.legend(handles=shown, ncols=4, **_ABOVE)
    _mark_ends(axis, ends, edges)


def _edges(finite: NDArray[np.float64]) -> NDArray[np.float64]:
    if not finite.size:
        return np.array([0.0, 1.0])
    low, high = float(finite.min()), float(finite.max())
    if low == high:
        pad = 0.1 * abs(low) or 0.1
        return np.linspace(low - pad, high + pad, 12)
    if high - low <= 60 and (finite == np.rint(finite)).all():  # integer counts, such as forgetting events
        return np.arange(low - 0.5, high + 1)
    return np.linspace(low, high, 1 + min(60, max(10, math.isqrt(finite.size))))


def _end_bins(edges: NDArray[np.float64], values: NDArray[np.float64]) -> dict[float, tuple[float, float]]:
    """Return the bins of infinite scores, separated from the other bins, if there are any such scores."""
    low, high, unit = edges[0], edges[-1], (edges[-1] - edges[0]) / 40
    bins = {-math.inf: (low - 4 * unit, low - 2 * unit), math.inf: (high + 2 * unit, high + 4 * unit)}
    return {end: place for end, place in bins.items() if (values == end).any()}


def _mark_ends(axis: Axes, ends: Mapping[float, tuple[float, float]], edges: NDArray[np.float64]) -> None:
    if not ends:
        return
    ticks = [tick for tick in axis.get_xticks() if edges[0] <= tick <= edges[-1]]
    places = [left + (right - left) / 2 for left, right in ends.values()]
    axis.minorticks_off()
    axis.set_xticks([*ticks, *places], labels=[f"{value:g}" for value in (*ticks, *ends)])


def _cuts(values: NDArray[np.float64], kept: NDArray[np.bool_]) -> list[float]:
    """Return the lowest and the highest kept score, each only if samples beyond it are pruned.

    Empty if a pruned score lies between kept ones: then no cut describes the choice.
    """
    inside, outside = values[kept & ~np.isnan(values)], values[~kept & ~np.isnan(values)]
    if not inside.size or not outside.size:
        return []
    low, high = inside.min(), inside.max()
    below, above = outside <= low, outside >= high
    if not (below | above).all() or (below & above).any():
        return []
    return [float(cut) for cut, beyond in ((low, below), (high, above)) if beyond.any() and np.isfinite(cut)]


def _draw_classes(
    axis: Axes, labels: NDArray[np.int64], kept: NDArray[np.bool_], class_names: Sequence[str] | None
) -> None:
    """Draw the kept share of each class, as bars or, for many classes, as a sorted curve."""
    classes, members = np.unique(labels[labels >= 0], return_inverse=True)
    shares = np.bincount(members, kept[labels >= 0], len(classes)) / np.bincount(members, minlength=len(classes))
    names = [shortened(str(named(int(number), class_names)), 18) for number in classes]
    if len(classes) > _MOST_BARS:
        order = np.argsort(shares, kind="stable")
        axis.stairs(shares[order], fill=True, color=_KEPT)
        ends = [f"{names[place]} ({shares[place]:.0%} kept)" for place in (order[0], order[-1])]
        axis.set_xlabel(f"{len(classes)} classes, sorted: from {ends[0]} to {ends[1]}", parse_math=False)
    else:
        axis.bar(range(len(classes)), shares, color=_KEPT, width=0.8)
        wide = max(map(len, names)) * len(names) > 80
        turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if wide else {}
        axis.set_xticks(range(len(classes)), names, fontsize="small", parse_math=False, **turned)
        axis.set_xlabel("class")
    share = kept.mean()
    axis.axhline(share, color="black", linewidth=1.2, linestyle="--", label=f"all classes: {share:.1%} kept")
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("kept share of the class")
    axis.legend(**_ABOVE)


# The figure of the samples.


def draw_samples(groups: Groups, title: str, headings: Sequence[str] = OF_HARDNESS) -> Figure:
    """Draw the samples with the highest scores above those with the lowest, each with its label, prediction and score."""
    from matplotlib.figure import Figure

    drawn = groups[0][:_MOST_DRAWN], groups[1][-_MOST_DRAWN:]
    side, caption, heading, top, margin = 1.25, 0.62, 0.42, 0.45, 0.12  # inches
    tall = side * max(_proportion(sample) for group in drawn for sample in group)
    rows = [math.ceil(len(group) / _COLUMNS) for group in drawn]
    width = margin + _COLUMNS * (side + margin)
    height = top + sum(heading + count * (tall + caption) for count in rows if count)
    figure = Figure(figsize=(width, height))
    figure.text(margin / width, 1 - 0.5 * top / height, title, size=13, va="center", parse_math=False)
    legend = "bold: label,  \N{CHECK MARK} or \N{BALLOT X}: prediction,  grey: score and #index"
    figure.text(1 - margin / width, 1 - 0.5 * top / height, legend, size=9, va="center", ha="right", color="0.35")
    above = top
    for order, group, count in zip(headings, drawn, rows, strict=True):
        if not group:
            continue
        text = order.format(len(group))
        figure.text(margin / width, 1 - (above + 0.5 * heading) / height, text, size=11, va="center")
        for place, sample in enumerate(group):
            row, column = divmod(place, _COLUMNS)
            left = margin + column * (side + margin)
            bottom = height - above - heading - row * (tall + caption) - tall
            axis = figure.add_axes((left / width, bottom / height, side / width, tall / height), anchor="SW")
            _draw_sample(axis, sample)
        above += heading + count * (tall + caption)
    return figure


def _proportion(sample: Sample) -> float:
    return 1.0 if sample.picture is None else min(1.0, sample.picture.shape[0] / sample.picture.shape[1])


def _draw_sample(axis: Axes, sample: Sample) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    if sample.picture is None:
        words = "\n".join(textwrap.wrap(sample.text, 18)[:6])
        axis.text(0.5, 0.5, words, size=7, ha="center", va="center", parse_math=False)
    else:
        smooth = "nearest" if max(sample.picture.shape) < _COARSE else "antialiased"
        axis.imshow(sample.picture, "gray", vmin=0, vmax=255, interpolation=smooth)
    lines: list[tuple[str, dict[str, Any]]] = [(f"{sample.score:.3g} #{sample.index}", {"color": "0.35"})]
    if sample.prediction is not None:
        text = shortened(f"{sample.sign} {sample.prediction}", 19)
        lines.insert(0, (text, {"color": _WRONG if sample.wrong else "black"}))
    if sample.label is not None:
        lines.insert(0, (shortened(str(sample.label), 15), {"weight": "bold"}))
    for place, (text, style) in enumerate(lines):
        style |= {"size": 8, "va": "top", "parse_math": False}
        axis.annotate(text, (0, 0), (0, -2 - 11 * place), "axes fraction", "offset points", **style)
