"""The study of local steps: bytes are those of the messages, and everything that is promised is written."""

from dataclasses import replace
from pathlib import Path

import pytest

from studies.claims import CLAIMS
from studies.claims.local_steps import LocalSteps
from studies.common import read_table
from studies.figures.local_steps import print_table
from studies.report import write
from studies.runner import train_all

# What Lightning and torch say about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning"),
]

ENTRIES = 64 * 256 + 256 * 256 + 256 * 10 + 522


def test_digits_are_learned_and_bytes_are_those_of_the_messages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms, rates = ["dense", "diloco-10"], (0.05,)
    claim = LocalSteps(arms=arms, steps=24, rates=rates, seeds=1, output=tmp_path, start_method="fork")
    dense, rare = results = train_all(claim, 1)
    assert dense.megabytes == pytest.approx(24 * 4 * ENTRIES / 1e6)
    assert rare.megabytes == pytest.approx(3 * 4 * (ENTRIES + 2) / 1e6)  # after 10, 20 and 24 steps
    assert (dense.ratio, rare.ratio) == (1, pytest.approx(8, rel=1e-4))
    for result in results:
        assert 0.4 < result.test_accuracy <= 1
        assert result.test_accuracy != result.validation_accuracy
        assert 0 < result.seconds < 60
        curve = read_table(claim.folder(result) / "evaluations.csv")
        assert list(curve["step"]) == list(range(2, 25, 2))
        assert curve["val_loss"][-1] == pytest.approx(result.validation_loss, rel=1e-2)  # ranks pad
    write(claim, results)
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    print_table(claim, results)
    printed = capsys.readouterr().out
    assert "diloco: DiLoCo: the same with an outer momentum" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_characters_are_learned_on_several_ranks(tmp_path: Path) -> None:
    claim = replace(
        CLAIMS["local-steps-characters-2"],
        arms=["diloco-30-int8"],
        rates=(1e-3,),
        steps=2,
        seeds=1,
        output=tmp_path,
        start_method="fork",
    )
    (result,) = train_all(claim, 1)
    assert result.test_accuracy == result.validation_accuracy
    assert result.ratio > 6  # nearly a quarter of the bytes, in one exchange after two steps
