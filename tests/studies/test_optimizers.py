"""The study of optimizers: every arm trains with its own optimizer, and everything promised is written."""

from dataclasses import replace
from pathlib import Path

import pytest

from studies.claims import CLAIMS, optimizers
from studies.claims.optimizers import FREE, SWAPS, Optimizers, Result
from studies.figures.optimizers import print_table
from studies.report import write
from studies.runner import train_all

pytest.importorskip("pytorch_optimizer")
ARMS = [arm for arm in SWAPS if arm != FREE]

# What Lightning and torch say about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


@pytest.fixture(autouse=True)
def _validates_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "EVALUATIONS", 1)


def test_digits_train_with_each_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = Optimizers(arms=ARMS, steps=4, seeds=1, output=tmp_path)
    results = train_all(claim, 1)
    shares = {result.arm: round(result.state_share, 1) for result in results}
    assert shares == {"adamw": 2.0, "lion": 1.0, "adabelief": 2.0, "adafactor": pytest.approx(0.1, abs=0.1)}
    assert len({result.validation_loss for result in results}) == len(ARMS)
    write(claim, results)
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    print_table(claim, results)
    printed = capsys.readouterr().out
    assert "state: memory of the optimizer's state" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_characters_train_without_a_schedule(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    (claim,) = (each for each in CLAIMS.values() if each.name == "optimizers-characters")
    (result,) = train_all(replace(claim, arms=[FREE], steps=2, seeds=1, output=tmp_path), 1)
    assert isinstance(result, Result)
    assert result.test_accuracy == result.validation_accuracy
    assert 1.9 < result.state_share < 2.1
