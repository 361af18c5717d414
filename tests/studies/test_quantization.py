"""The studies of quantized weights: every arm trains, lies on its grid, and everything promised is written."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studies.claims import CLAIMS
from studies.claims.quantization import ExportedResult
from studies.figures.quantization import print_table
from studies.report import write
from studies.runner import train_all

# What Lightning and torch say about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


def short(name: str, output: Path, **changes: Any) -> Any:
    (claim,) = (each for each in CLAIMS.values() if each.name == name)
    return replace(claim, rates=(), seeds=1, epochs=1, output=output, **changes)


def test_every_quantizer_trains_on_its_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ("dense", "ste", "quest", "quest plain", "statsq")
    claim = short("quantization-w2", tmp_path, arms=arms, limit_batches=2)
    results = train_all(claim, 1)
    levels = {result.arm: result.levels for result in results}
    assert (levels["ste"], levels["quest plain"], levels["statsq"]) == (3, 4, 4)
    assert math.isnan(levels["dense"])
    write(claim, results)
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    print_table(claim, results)
    printed = capsys.readouterr().out
    assert "levels: largest number" in printed
    assert max(map(len, printed.splitlines())) <= 88


def test_inputs_are_rounded_in_the_test_too(tmp_path: Path) -> None:
    claim = short("quantization-w4a4", tmp_path, arms=("ste",), limit_batches=4)
    tested = [train_all(replace(claim, activation_bits=bits), 1)[0].test_accuracy for bits in (1, None)]
    assert tested[0] != tested[1]


def test_rounding_is_compared_with_the_same_outliers(tmp_path: Path) -> None:
    claim = short("rounding-2", tmp_path, arms=("nearest", "learned"), limit_batches=2)
    assert claim.comparisons() == [("learned", "nearest")]
    whole = CLAIMS["rounding-3"]
    assert whole.comparisons() == [("learned", "nearest"), ("learned outliers", "nearest outliers")]
    (nearest,) = train_all(replace(claim, arms=("nearest",)), 1)
    assert nearest.levels == 3


def test_smaller_networks_are_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = short("smaller-files", tmp_path, arms=("dense", "sparse 8 bits"))
    dense, small = train_all(claim, 1)
    assert isinstance(small, ExportedResult)
    assert 0.4 < small.zeros < 0.5, "the first and the last layer are not sparse"
    assert dense.zeros == 0.0
    write(claim, [dense, small])
    print_table(claim, [dense, small])
    assert "zipped" in capsys.readouterr().out
    pytest.importorskip("onnxscript")
    assert small.file_accuracy == small.test_accuracy
    assert small.size < 0.35 * small.float_size
    assert small.zipped < 0.8 * small.size
    assert small.difference < 1e-5
