"""What ``drawn_once`` spares: only the rendering of figures of a kind that was rendered before."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_grad.utilities.reporting import log_figure
from tests.drawn_once import DRAWN, kind_of

pytestmark = pytest.mark.usefixtures("drawn_again")
LOOP = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=1))
TRAINER: Any = SimpleNamespace(is_global_zero=True, loggers=[], fit_loop=LOOP)


def figure(title: str = "Step 1", values: Any = (1.0, 2.0, 4.0), scale: str = "linear") -> Figure:
    made = Figure(figsize=(2, 2), layout="constrained")
    axes = made.subplots()
    axes.plot(values)
    axes.set_title(title)
    axes.set_yscale(scale)
    return made


def write(made: Figure, folder: Path) -> int:
    log_figure(TRAINER, "figure", made, folder / "figure.png")
    return (folder / "figure.png").stat().st_size


def test_the_second_of_a_kind_is_a_file_without_content(tmp_path: Path) -> None:
    first, second = write(figure(), tmp_path), write(figure("Step 12", (3.0, 5.0, 9.0)), tmp_path)
    assert 0 < second < first
    figure().savefig(tmp_path / "own.png")
    assert (tmp_path / "own.png").stat().st_size > second, "what a test saves itself is rendered"


OTHERS = {
    "title": figure("Other"),
    "not finite": figure(values=(1.0, math.nan, 4.0)),
    "never finite": figure(values=(math.inf, math.nan, math.nan)),
    "not positive": figure(values=(0.0, 2.0, 4.0)),
    "one point": figure(values=(1.0,)),
    "empty": figure(values=()),
    "scale": figure(scale="log"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_could_be_rendered_differently_is_another_kind(other: str) -> None:
    assert kind_of(OTHERS[other]) != kind_of(figure())
    assert kind_of(figure()) == kind_of(figure("Step 99"))


def test_a_fault_of_rendering_fails_after_sound_figures_and_fails_again(tmp_path: Path) -> None:
    write(figure(), tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="frac"):
            write(figure("$\\frac$"), tmp_path)


def test_a_fault_of_one_scale_alone_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(figure(), tmp_path)
    draw = Line2D.draw

    def fault(line: Any, renderer: Any) -> None:
        assert line.axes is None or line.axes.get_yscale() == "linear"
        draw(line, renderer)

    monkeypatch.setattr(Line2D, "draw", fault)
    with pytest.raises(AssertionError):
        write(figure(scale="log"), tmp_path)
    assert kind_of(figure(scale="log")) not in DRAWN
