"""Tables and figures of quantized weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.claim import Claim
from studies.claims.quantization import ExportedResult, Quantization, Result, SmallerFiles
from studies.common import mean_and_spread, print_rows, tidy

COLOURS = ("0.4", "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7")

# Tables.


def print_table(claim: Claim[Any], results: Sequence[Any]) -> None:
    """Print a row for each arm, over its seeds, and what the columns mean."""
    if isinstance(claim, SmallerFiles):
        print_files(claim, results)
        return
    rows = [(arm, *summarise(own_of(arm, results))) for arm in claim.arms]
    print_rows(("weights", "rate", "test accuracy", "levels"), rows)
    print("\nlevels: largest number of different values in an output channel of a quantized")
    print("    weight; weights in a Hadamard basis or with outliers may lie on no grid")
    if any("outliers" in arm for arm in claim.arms):
        print("outliers: 1 % of the weights of each layer keep their values")
    print_seeds(claim)


def print_seeds(claim: Claim[Any]) -> None:
    """Print what the numbers are."""
    if claim.seeds > 1:
        print(f"test accuracy: mean ± standard deviation of {claim.seeds} seeds;")
        print("    one of 200 images is 0.5 %, so small differences are chance")


def own_of(arm: str, results: Sequence[Any]) -> list[Any]:
    """Return the results of one arm."""
    return [result for result in results if result.arm == arm]


def summarise(own: Sequence[Result]) -> tuple[str, ...]:
    """Return the rate, accuracy and levels of one arm."""
    rate = "-" if own[0].rate is None else f"{own[0].rate:g}"
    levels = max(result.levels for result in own)
    accuracy = mean_and_spread([100 * result.test_accuracy for result in own])
    return rate, f"{accuracy} %", "-" if math.isnan(levels) else f"{levels:.0f}"


def print_files(claim: SmallerFiles, results: Sequence[ExportedResult]) -> None:
    """Print the accuracy and the size of each network and of its file."""
    header = ("network", "test accuracy", "in onnxruntime", "size", "zipped", "zeros")
    print_rows(header, [(arm, *summarise_file(arm, results)) for arm in claim.arms])
    print("\nsize: of the ONNX file")
    print("zeros: in the weights with two or more dimensions; sparse: 2:4, except in the first")
    print("    and the last layer")
    differences = [result.difference for result in results if not math.isnan(result.difference)]
    if differences:
        print(f"outputs of the files and of the modules differ by at most {max(differences):.0e}")
    else:
        print("no files: onnx is not installed; pip install 'lightning-grad[quantization]'")
    print_seeds(claim)


def summarise_file(arm: str, results: Sequence[ExportedResult]) -> tuple[str, ...]:
    """Return the row of one network."""
    own = own_of(arm, results)
    accuracy = mean_and_spread([100 * result.test_accuracy for result in own])
    of_files = [100 * result.file_accuracy for result in own if not math.isnan(result.file_accuracy)]
    file = f"{mean_and_spread(of_files)} %" if of_files else "-"
    sizes = map(kilobytes, sizes_of(arm, results))
    return f"{accuracy} %", file, *sizes, f"{100 * statistics.mean(result.zeros for result in own):.0f} %"


def sizes_of(arm: str, results: Sequence[ExportedResult]) -> tuple[float, float]:
    """Return the mean size of the files of an arm, and when they are compressed.

    The file of the dense network is that of the others with float weights.
    """
    if arm == "dense":
        known = [result.float_size for result in results if not math.isnan(result.float_size)]
        return (statistics.mean(known) if known else math.nan), math.nan
    own = own_of(arm, results)
    return statistics.mean(result.size for result in own), statistics.mean(result.zipped for result in own)


def kilobytes(size: float) -> str:
    """Format a size.

    Example:
        >>> kilobytes(123_456.0), kilobytes(float("nan"))
        ('123 kB', '-')
    """
    return "-" if math.isnan(size) else f"{size / 1000:.0f} kB"


# Figures.


def draw(claim: Claim[Any], results: Sequence[Any]) -> dict[str, Figure]:
    """Return the figures by name."""
    return {"comparison": draw_comparison(claim, results)}


def draw_comparison(claim: Claim[Any], results: Sequence[Any]) -> Figure:
    """Draw the test accuracy of each seed and, for exported files, their sizes."""
    panels = 2 if isinstance(claim, SmallerFiles) else 1
    figure = Figure(figsize=(4.5 * panels + 1, 0.5 * len(claim.arms) + 1.4), layout="constrained")
    axes: Any = figure.subplots(1, panels, squeeze=False)[0]
    figure.suptitle(title_of(claim), fontsize=11)
    draw_accuracies(axes[0], claim, results)
    if isinstance(claim, SmallerFiles):
        draw_sizes(axes[1], claim, results)
    return figure


def title_of(claim: Claim[Any]) -> str:
    """Return the title of a figure."""
    seeds = f"{claim.seeds} seeds" if claim.seeds > 1 else "one seed"
    if isinstance(claim, Quantization):
        bits = "1 bit" if claim.bits == 1 else f"{claim.bits} bits"
        inputs = f", inputs of {claim.activation_bits}" if claim.activation_bits else ""
        return f"Weights of {bits}{inputs}: a vision transformer on digits, {seeds}"
    return f"Exported networks: a vision transformer on digits, {seeds}"


def draw_accuracies(axis: Axes, claim: Claim[Any], results: Sequence[Any]) -> None:
    """Draw the test accuracy of each seed, a row for each arm, and the mean as a line."""
    for place, arm in enumerate(claim.arms):
        values = [100 * result.test_accuracy for result in own_of(arm, results)]
        axis.plot(values, [place] * len(values), "o", color=COLOURS[place], markersize=5, alpha=0.7)
        axis.plot([statistics.mean(values)], [place], "|", color=COLOURS[place], markersize=18, markeredgewidth=2)
    low, high = axis.get_xlim()
    axis.set_xlim(low - 0.5, high + 0.5)  # one image is half a point
    name_rows(axis, claim.arms)
    axis.set_title("Test accuracy of each seed, and their mean", fontsize=10, loc="left")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")


def draw_sizes(axis: Axes, claim: SmallerFiles, results: Sequence[ExportedResult]) -> None:
    """Draw the size of each file, and its size when it is compressed."""
    for place, arm in enumerate(claim.arms):
        size, zipped = sizes_of(arm, results)
        axis.barh(place, size / 1000, 0.6, color=COLOURS[place], alpha=0.35)
        axis.barh(place, zipped / 1000, 0.3, color=COLOURS[place])
    name_rows(axis, claim.arms)
    axis.set_title("Size in kB (thin: compressed)", fontsize=10, loc="left")


def name_rows(axis: Axes, names: Sequence[str]) -> None:
    """Label the rows of a panel, from the top down."""
    axis.set_yticks(range(len(names)), list(names))
    axis.set_ylim(len(names) - 0.5, -0.5)
    tidy(axis)
