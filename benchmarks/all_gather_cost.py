"""The number of ranks from which sparse gradients stop paying. Bytes that a rank sends in a step, computed, not measured.

Pairs of index and value travel by an all-gather, in which the message of each rank reaches every other rank, so the bytes
that a rank sends grow with the number of ranks. Dense gradients and PowerSGD's factors travel by an all-reduce, whose bytes
are bounded. Both are assumed to be rings. The counts include biases and the flag in the dense message.

::

    python benchmarks/all_gather_cost.py
    python benchmarks/all_gather_cost.py --ratio 0.01 --rank 2 --widths 512 512 512
    python benchmarks/all_gather_cost.py --out docs/images/communication_ranks.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from benchmarks.rows import markdown_table
from benchmarks.slow_link import WIDTHS
from lightning_grad.functional import all_gather_bytes, all_reduce_bytes
from lightning_grad.functional.communication.powersgd import low_rank_numel
from lightning_grad.functional.communication.sparse_messages import pairs_bytes
from lightning_grad.functional.communication.wire import kept_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TABLE = (2, 4, 6, 8, 16, 64, 256, 1024)
CURVE = [round(2 ** (step / 8)) for step in range(8, 90)]
MOST = 100_000  # ranks; a scheme that is not overtaken by then counts as never overtaken
FLAG = 1  # entry of the dense message: whether all gradients are finite


@dataclass(frozen=True)
class Scheme:
    """A way to send gradients.

    Args:
        name: Name in the table and in the figure.
        sent: Function from the number of ranks to the bytes that a rank sends in a step.
        color: Color in the figure.
        dash: Line style in the figure.
        label_at: Number of ranks at which the figure labels the line.
    """

    name: str
    sent: Callable[[int], float]
    color: str
    dash: str
    label_at: int


def schemes(shapes: Sequence[tuple[int, ...]], ratio: float, rank: int) -> list[Scheme]:
    """Return the schemes to compare, for the parameters of a network."""
    total = sum(prod(shape) for shape in shapes)
    share, sparse = f"DGC {100 * ratio:g} %", partial(sparse_bytes, shapes, ratio)
    return [
        Scheme("dense", lambda ranks: all_reduce_bytes(total, ranks), "#555555", "-", 3),
        Scheme("fp16", lambda ranks: all_reduce_bytes(total, ranks, 2), "#999999", "-", 3),
        Scheme(f"PowerSGD rank {rank}", partial(low_rank_bytes, shapes, rank), "#d55e00", "-", 90),
        Scheme(share, lambda ranks: sparse(torch.float32, ranks), "#0072b2", "-", 40),
        Scheme(f"{share}, fp16 values", lambda ranks: sparse(torch.float16, ranks), "#56b4e9", "--", 50),
    ]


def sparse_bytes(shapes: Sequence[tuple[int, ...]], ratio: float, kind: torch.dtype, ranks: int) -> float:
    """Return the bytes that a rank sends with DGC after the warm-up: pairs of all matrices, and dense vectors."""
    pairs = [kept_count(prod(shape), ratio) for shape in shapes if len(shape) > 1]
    return all_gather_bytes(pairs_bytes(pairs, kind), ranks) + all_reduce_bytes(vector_numel(shapes), ranks)


def low_rank_bytes(shapes: Sequence[tuple[int, ...]], rank: int, ranks: int) -> float:
    """Return the bytes that a rank sends with PowerSGD: both factors of all matrices, and dense vectors."""
    factors = sum(low_rank_numel(shape, rank) for shape in shapes if len(shape) > 1)
    return all_reduce_bytes(factors + vector_numel(shapes), ranks)


def vector_numel(shapes: Sequence[tuple[int, ...]]) -> int:
    """Return the number of entries of the dense message."""
    return sum(shape[0] for shape in shapes if len(shape) == 1) + FLAG


def perceptron(widths: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the shapes of the weights and biases of linear layers."""
    return [shape for inputs, outputs in pairwise(widths) for shape in ((outputs, inputs), (outputs,))]


def overtaken(scheme: Scheme, by: Scheme) -> int | None:
    """Return the smallest number of ranks at which a scheme sends more than another one."""
    return next((ranks for ranks in count(2) if ranks > MOST or scheme.sent(ranks) > by.sent(ranks)), None)


# Output.


def print_tables(compared: Sequence[Scheme]) -> None:
    """Print megabytes a step by number of ranks, and the ranks from which sparse schemes send more than the others."""
    rows = [[str(ranks), *(f"{scheme.sent(ranks) / 1e6:.3g}" for scheme in compared)] for ranks in TABLE]
    print(f"MB that a rank sends in a step\n\n{markdown_table(['ranks', *(s.name for s in compared)], rows)}\n")
    others, sparse = compared[:3], compared[3:]
    crossings = [[scheme.name, *(_ranks(overtaken(scheme, other)) for other in others)] for scheme in sparse]
    print("Number of ranks from which it sends more\n")
    print(markdown_table(["", *(f"than {other.name}" for other in others)], crossings))


def _ranks(number: int | None) -> str:
    return "never" if number is None or number > MOST else f"{number:,}"


def draw(compared: Sequence[Scheme], title: str) -> Figure:
    """Draw bytes against ranks, and where the sparse schemes cross the others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = figure.subplots()
    for scheme in compared:
        _draw_scheme(axes, scheme)
    for other in compared[:3]:
        _mark(axes, compared[3], other)
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="bytes a rank sends in a step", title=title)
    ticks = [2**power for power in range(1, 12)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    sizes = [10**power for power in range(5, 9)]
    axes.set_yticks(sizes, ["100 kB", "1 MB", "10 MB", "100 MB"])
    axes.set(xlim=(1.85, 2300), ylim=(4e4, 3e8))
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_scheme(axes: Axes, scheme: Scheme) -> None:
    axes.plot(CURVE, [scheme.sent(ranks) for ranks in CURVE], color=scheme.color, linestyle=scheme.dash, linewidth=2)
    above = not scheme.name.endswith("values")
    axes.annotate(
        scheme.name,
        (scheme.label_at, scheme.sent(scheme.label_at)),
        xytext=(-6, 7) if above else (10, -10),
        textcoords="offset points",
        ha="right" if above and scheme.name.startswith("DGC") else "left",
        va="bottom" if above else "top",
        color=scheme.color,
        fontweight="bold",
    )


def _mark(axes: Axes, scheme: Scheme, other: Scheme) -> None:
    ranks = overtaken(scheme, other)
    if ranks is None or not CURVE[0] < ranks < CURVE[-1]:
        return
    axes.plot(ranks, other.sent(ranks), "o", color=scheme.color, markersize=7)
    axes.annotate(
        f"{ranks:,} ranks",
        (ranks, other.sent(ranks)),
        xytext=(-5, 7),
        textcoords="offset points",
        ha="right",
        color=scheme.color,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and draw the figure if ``--out`` is set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ratio", type=float, default=0.001, help="share of the entries that DGC sends (default 0.001)"
    )
    parser.add_argument("--rank", type=int, default=4, help="rank of PowerSGD (default 4)")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=list(WIDTHS), help="widths of the perceptron, inputs first"
    )
    parser.add_argument("--out", type=Path, help="PNG file for the figure")
    options = parser.parse_args(arguments)
    shapes = perceptron(options.widths)
    compared = schemes(shapes, options.ratio, options.rank)
    print_tables(compared)
    if options.out is not None:
        entries = sum(prod(shape) for shape in shapes)
        draw(compared, f"A perceptron of {entries / 1e6:.1f} M parameters").savefig(options.out, dpi=140)


if __name__ == "__main__":
    main()
