"""``lightning-grad scores``: the command line of score files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_grad.cli import main as run
from lightning_grad.data import SampleScores, compare_scores, fingerprint, load_scores, save_scores

NAN = float("nan")


def main(arguments: list[str]) -> None:
    run(["scores", *arguments])


def pair(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(n, generator=generator, dtype=torch.float64)
    return first, first + torch.randn(n, generator=generator, dtype=torch.float64)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, SampleScores]:
    """Write three score files into the working directory, the third of another data set."""
    monkeypatch.chdir(tmp_path)
    data = [(torch.full((2,), float(i)), i % 3) for i in range(50)]
    first, second = pair(50, 0)
    first[3] = NAN
    known, other = fingerprint(data), fingerprint([(x + 1, y) for x, y in data])
    made = {
        "a.npz": SampleScores(first, "el2n", 10, 0, known, torch.tensor([y for _, y in data])),
        "b.npz": SampleScores(second, "el2n", 10, 1, known),
        "c.npz": SampleScores(second, "grand", None, None, other),
    }
    for name, scores in made.items():
        save_scores(scores, name)
    return made


def test_compare_prints_a_table(files: dict[str, SampleScores], capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", "a.npz", "b.npz", "--at", "0.1", "0.5"])
    found = compare_scores(files["a.npz"], files["b.npz"], (0.1, 0.5))
    lines = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    assert {key: value.strip() for key, value in lines} == {
        "a": "el2n (epoch 10, seed 0)",
        "b": "el2n (epoch 10, seed 1)",
        "samples": "49",
        "Spearman": f"{found.spearman:.3f}",
        "overlap of the hardest 0.1": f"{found.overlap[0.1]:.3f}  (chance: 0.100)",
        "overlap of the hardest 0.5": f"{found.overlap[0.5]:.3f}  (chance: 0.500)",
    }


def test_shares_have_a_default(files: dict[str, SampleScores], capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", "a.npz", "b.npz"])
    assert capsys.readouterr().out.count("chance") == 3


def test_two_data_sets_are_compared_by_force_only(
    files: dict[str, SampleScores], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^error: .* two data sets, which differ in the items .* --force"):
        main(["compare", "a.npz", "c.npz"])
    main(["compare", "a.npz", "c.npz", "--force"])
    assert "grand\n" in capsys.readouterr().out


def test_average_and_show(files: dict[str, SampleScores], capsys: pytest.CaptureFixture[str]) -> None:
    main(["average", "a.npz", "b.npz", "--output", "mean"])
    mean = load_scores("mean.npz")
    both = torch.stack([files["a.npz"].values, files["b.npz"].values])
    assert torch.equal(mean.values, both.nanmean(0))
    assert "mean.npz" in capsys.readouterr().out
    main(["show", "a.npz"])
    shown = capsys.readouterr().out
    for part in ("el2n (epoch 10, seed 0)", "samples", "50", "unscored", "classes", "list, 50 items"):
        assert part in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "a.npz", "none.npz"], "error: there is no file none.npz"),
        (["show", "text.npz"], "error: text.npz is damaged, or not a score file"),
        (["average", "a.npz", "c.npz", "--output", "m"], "error: Scores must be of one kind"),
        (["show", "torn.npz"], "error: torn.npz is damaged, or not a score file"),
        (["show", "folder.npz"], "error: folder.npz cannot be read: Is a directory."),
        (["compare", "a.npz", "a.npz/b"], "error: a.npz/b cannot be read: Not a directory."),
        (["show", "nul.csv"], "error: nul.csv"),
        (["average", "a.npz", "torn.npz", "--output", "m"], "error: torn.npz is damaged, or not a score file"),
        (["average", "a.npz", "--output", "."], "error: Scores cannot be written to '.', because it is a folder."),
        (["average", "a.npz", "--output", "a.npz/m"], "error: "),
        (["show", "a\0b.npz"], "error: "),
        (["show", "n" * 5000], "error: "),
    ],
)
def test_faults_are_said_in_one_line(arguments: list[str], message: str, files: dict[str, SampleScores]) -> None:
    Path("text.npz").write_text("hello")
    Path("torn.npz").write_bytes(Path("a.npz").read_bytes()[:700])
    Path("folder.npz").mkdir()
    Path("nul.csv").write_text("score\n\0\n")
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [[], ["compare", "a.npz"], ["compare", "a.npz", "b.npz", "--at", "2"]])
def test_wrong_usage_says_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: lightning-grad scores" in capsys.readouterr().err
