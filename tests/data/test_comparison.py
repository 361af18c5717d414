"""Rank correlation against scipy, overlap against sets, and the command line."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_grad.data import SampleScores, compare_scores, fingerprint, load_scores, save_scores
from lightning_grad.data.__main__ import main

NAN, INF = float("nan"), float("inf")


def pair(n: int, seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(n, generator=generator, dtype=torch.float64)
    return first, first + noise * torch.randn(n, generator=generator, dtype=torch.float64)


# Rank correlation.


@pytest.mark.parametrize("levels", [None, 2, 5, 30])
@pytest.mark.parametrize("n", [3, 10, 500])
def test_spearman_is_that_of_scipy(n: int, levels: int | None) -> None:
    stats = pytest.importorskip("scipy.stats")
    for seed in range(10):
        first, second = pair(n, seed)
        if levels:  # scores with ties
            first, second = (first * levels / 4).round(), (second * levels / 4).round()
        if first.unique().numel() == 1 or second.unique().numel() == 1:
            continue  # scipy warns; that case is below
        expected = stats.spearmanr(first.numpy(), second.numpy()).statistic
        assert compare_scores(first, second).spearman == pytest.approx(expected, abs=1e-11)


def test_spearman_by_hand() -> None:
    assert compare_scores(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 1e9])).spearman == 1.0
    assert compare_scores(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, -INF])).spearman == -1.0
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    assert compare_scores(torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.arange(4.0)).spearman == pytest.approx(
        4.5 / (4.5 * 5) ** 0.5
    )


def test_a_score_that_is_the_same_for_all_has_no_correlation() -> None:
    found = compare_scores(torch.ones(1000), torch.ones(1000), shares=(0.3,))
    assert found.spearman != found.spearman  # nan
    assert found.overlap[0.3] == pytest.approx(0.3, abs=0.1), "ties are no agreement"


# Overlap.


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_overlap_is_that_of_sets(share: float) -> None:
    for seed in range(5):
        first, second = pair(200, seed)
        count = round(share * 200)
        sets = [set(sorted(range(200), key=lambda i, s=s: -s[i].item())[:count]) for s in (first, second)]
        assert compare_scores(first, second, (share,)).overlap == {share: len(sets[0] & sets[1]) / count}


def test_scores_that_have_nothing_in_common_come_to_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    found = compare_scores(torch.rand(5000, generator=generator), torch.rand(5000, generator=generator))
    assert found.spearman == pytest.approx(0.0, abs=0.05)
    assert list(found.overlap.values()) == pytest.approx([0.1, 0.2, 0.5], abs=0.04)


# Which samples are compared.


def test_samples_that_either_could_not_score_are_left_out() -> None:
    first = torch.tensor([1.0, 2.0, NAN, 4.0, 5.0])
    second = torch.tensor([2.0, 1.0, 9.0, NAN, 3.0])
    found = compare_scores(first, second, (0.5,))
    assert found == compare_scores(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2.0, 1.0, 3.0]), (0.5,))
    assert found.n == 3


def test_scores_with_indices_are_compared_item_by_item() -> None:
    first = SampleScores(torch.tensor([1.0, 2.0, 3.0, 4.0]), "a", index=torch.tensor([7, 5, 3, 1]))
    second = SampleScores(torch.arange(8.0), "b")
    found = compare_scores(first, second, (0.25,))
    assert (found.n, found.spearman, found.overlap) == (4, -1.0, {0.25: 0.0})


@pytest.mark.parametrize(
    ("a", "b", "shares", "message"),
    [
        (torch.zeros(3), torch.zeros(4), (0.5,), "got 3 and 4"),
        (torch.zeros(3), torch.full((3,), NAN), (0.5,), "at least two samples with both scores; got 0"),
        (torch.zeros(3), torch.zeros(3), (0.0,), "above 0 and at most 1; got 0.0"),
        (torch.zeros(3), torch.zeros(3), (1.5,), "got 1.5"),
    ],
)
def test_what_cannot_be_compared_raises(a: Tensor, b: Tensor, shares: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_scores(a, b, shares)


# The command line.


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


def test_scores_of_far_indices_are_compared_without_a_table_of_them_all(files: dict[str, SampleScores]) -> None:
    far = torch.tensor([5, 2**60, 3, 7])
    a = SampleScores(torch.tensor([1.0, 2.0, 3.0, 4.0]), "el2n", index=far)
    b = SampleScores(torch.tensor([9.0, 1.0, 2.0, NAN, 3.0]), "el2n", index=torch.tensor([8, 3, 5, 7, 2**60]))
    assert compare_scores(a, b, (0.5,)).n == 3
    assert compare_scores(a, b, (0.5,)).spearman == -0.5


@pytest.mark.parametrize("arguments", [[], ["compare", "a.npz"], ["compare", "a.npz", "b.npz", "--at", "2"]])
def test_wrong_usage_says_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m lightning_grad.data" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import")  # which is imported above
def test_the_module_runs(files: dict[str, SampleScores], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning_grad.data", "compare", "a.npz", "none.npz"])
    with pytest.raises(SystemExit, match=r"^error: there is no file none\.npz$"):
        runpy.run_module("lightning_grad.data", run_name="__main__")
