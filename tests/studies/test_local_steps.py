"""The study of local steps: bytes are those of the messages, and everything that is promised is written."""

from pathlib import Path

import pytest

from studies.claim import Run
from studies.claims import CLAIMS
from studies.claims.local_steps import BATCH, LocalSteps, build_data, build_module
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


def test_ranks_share_a_batch_of_characters() -> None:
    claim = CLAIMS["local-steps-characters-4"]
    data = build_data(claim.model, Run("dense", 0, 1e-3), BATCH // claim.ranks)
    assert data.batch_size == 16
    module = build_module(claim.model, Run("dense", 0, 1e-3), data)
    assert (module.lr, module.context) == (1e-3, data.context)
