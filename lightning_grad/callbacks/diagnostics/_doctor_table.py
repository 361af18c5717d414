"""The table of ``TrainingDoctor``: rows, text and figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_grad.callbacks.diagnostics._doctor_watch import HOOKS, PARTS, STEP, Watch
from lightning_grad.callbacks.diagnostics._owner_stack import REST
from lightning_grad.core.record import style_axis
from lightning_grad.utilities.reporting import format_table, listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_TINY = 0.001  # a callback with a smaller share has no line of its own in the text
_LITTLE = 0.001  # seconds
_SYNC_NOTE = "Host syncs are calls that would wait for a GPU."
_NO_SYNCS_NOTE = (
    "Host syncs and memory were not counted: host_syncs is False, or another profiler of torch was running."
)
_GPU_NOTE = "Host time is the time of Python. What the GPU still computes counts where Python waits for it."
_SYNCING_PARTS = (STEP, HOOKS, REST)  # others read tensors that are on the host anyway


def rows_of(watch: Watch) -> list[dict[str, Any]]:
    """Return one row for each callback, the most expensive first, then one for each part of the step."""
    spent, between, recorder = watch.clock.in_batches, watch.clock.between, watch.recorder
    names = [*sorted(watch.labels, key=lambda label: -spent[label]), *PARTS, REST]
    rows: list[dict[str, Any]] = []
    for name in names:
        is_callback = name in watch.labels
        counts_syncs = recorder.batches > 0 and (is_callback or name in _SYNCING_PARTS)
        row = {
            "name": name,
            "is_callback": is_callback,
            "share": spent[name] / max(spent.total(), 1),
            "milliseconds": spent[name] / 1e6 / max(watch.timed, 1),
            "seconds_between_batches": between[name] / 1e9,
            "host_syncs": recorder.syncs[name] / recorder.batches if counts_syncs else None,
            "megabytes": recorder.memory[name] / 1e6 if is_callback and recorder.batches else None,
        }
        rows.append(row)
    return rows


def text_of(rows: Sequence[Row], batches: int, device: str) -> str:
    """Return the table as text, with a line on what it shows."""
    tiny = [row["name"] for row in rows if _is_tiny(row)]
    shown = [row for row in rows if row["name"] not in tiny and (row["is_callback"] or row["share"])]
    header = ["callback or part of the step", "share", "ms", "host syncs", "memory MB"]
    if any(row["is_callback"] and row["seconds_between_batches"] >= _LITTLE for row in rows):
        header.append("s between batches")
    total = ["all", "100.0 %", f"{sum(row['milliseconds'] for row in rows):.2f}"]
    lines = [*(list(_cells(row))[: len(header)] for row in shown), [*total, *[""] * (len(header) - len(total))]]
    notes = [f"Below {100 * _TINY:.1f} % each: {listed(tiny, most=8)}."] if tiny else []
    title = f"host time of a batch, mean of {batches}"
    if all(row["host_syncs"] is None for row in rows):
        notes.append(_NO_SYNCS_NOTE)
    elif device == "cpu":
        notes.append(_SYNC_NOTE)
    if device != "cpu":
        notes.append(_GPU_NOTE)
    return "\n".join([title, format_table(lines, header), *notes])


def _cells(row: Row) -> Iterator[str]:
    yield row["name"]
    yield f"{100 * row['share']:.1f} %"
    yield f"{row['milliseconds']:.2f}"
    yield "-" if row["host_syncs"] is None else f"{row['host_syncs']:g}"
    yield "-" if row["megabytes"] is None else f"{row['megabytes']:.1f}"
    yield f"{row['seconds_between_batches']:.2f}"


def _is_tiny(row: Row) -> bool:
    costs_more = row["host_syncs"] or (row["megabytes"] or 0.0) >= 0.05 or row["seconds_between_batches"] >= _LITTLE
    return row["is_callback"] and row["share"] < _TINY and not costs_more


def draw(rows: Sequence[Row], title: str) -> Figure:
    """Draw the milliseconds of callbacks and of the parts of the step as bars. Needs matplotlib."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["share"] > 0][::-1]
    figure = Figure(figsize=(8.0, 1.2 + 0.3 * len(shown)), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axis = figure.subplots()
    colors = ["#0072b2" if row["is_callback"] else "#9a9a9a" for row in shown]
    bars = axis.barh(range(len(shown)), [row["milliseconds"] for row in shown], color=colors)
    axis.bar_label(bars, [f"{100 * row['share']:.1f} %" for row in shown], padding=3, fontsize=8)
    axis.set_yticks(range(len(shown)), [row["name"] for row in shown], parse_math=False)
    axis.set_xlabel("host time of a batch in milliseconds (blue: callbacks)")
    axis.margins(x=0.12)
    style_axis(axis)
    axis.grid(visible=False, axis="y")
    return figure
