"""The command line: what it refuses, what it lists, and one claim from the start to its figures."""

import json
import re
from pathlib import Path

import pytest

from studies.__main__ import build_parser, choose, main
from studies.claim import Run
from studies.claims import CLAIMS
from studies.claims.clipping import BadBatch, Result
from studies.claims.clipping_spikes import SHORTEST

PNG = b"\x89PNG\r\n\x1a\n"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--only cliping", "there is no claim 'cliping'. Did you mean clipping"),
        ("--only xyz", "There are sparsity, "),
        ("--seeds five", "--seeds must be a number such as 5, or seeds such as 0,3 or 5-9; got 'five'."),
        ("--seeds 0", "--seeds must be"),
        ("--seeds 9-5", "--seeds must be"),
        ("--seeds 0,1000", "seed 1000 chooses the rates, so it cannot be reported"),
        ("--budget -1", "--budget must be above 0 minutes; got -1."),
        ("--only clipping --set step=3", "clipping has no setting 'step'. Did you mean steps?"),
        ("--only clipping --set steps", "Write NAME=VALUE."),
        ("--only clipping --set steps=x", "steps must be an integer; got 'x'."),
        ("--only sparsity --set rates=x", "rates must be numbers with commas; got 'x'."),
        ("--only clipping --set arms=none,nrom", "clipping has no arm 'nrom'. There are none, norm"),
        ("--only clipping --set arms=spike", "clipping has no arm 'spike'"),
        ("--only clipping --set arms=none,none", "arms must differ; got none, none."),
        ("--only clipping --set steps=1", "steps must be at least 4; got 1."),
        ("--only clipping --set optimizer=lion", "optimizer must be sgd or adamw; got 'lion'."),
        ("--only sparsity --set rates=0.1,-1", "rates must be above 0; got 0.1, -1.0."),
        ("--only sparsity --set epochs=0", "epochs must be at least 1; got 0."),
        ("--only data-pruning --set equal_by=time", "equal_by must be epochs or steps; got 'time'."),
        ("--threads 0", "--threads must be at least 1; got 0."),
        ("--only clipping --data .", "clipping takes no --data"),
        ("--only sparsity --data missing", "--data must be a folder with CIFAR-10; missing does not exist."),
    ],
)
def test_bad_input_is_refused(options: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(options.split())
    assert error.value.code == 2
    assert words in capsys.readouterr().err


def test_without_a_gpu_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "torch finds no GPU here. Use --device cpu." in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(SystemExit):
        main(["--device", "cuda", "--only", "communication"])
    assert "communication runs on cpu only" in capsys.readouterr().err


def test_among_many_claims_those_that_cannot_run_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    names = [study.claim.name for study in choose(build_parser().parse_args(["--device", "cuda"]))]
    assert names == [name for name, claim in CLAIMS.items() if "cuda" in claim.devices]
    assert "skipped: communication runs on cpu only" in capsys.readouterr().out
    (tmp_path / "data").mkdir()
    options = ["--only", "cl*", "data-pruning", "--data", str(tmp_path / "data")]
    (study,) = choose(build_parser().parse_args(options))
    assert study.claim.name == "data-pruning"
    printed = capsys.readouterr().out
    assert "skipped: clipping takes no --data" in printed
    assert "skipped: cannot read" in printed


@pytest.mark.parametrize(
    ("content", "words"), [("too short", f"must have at least {SHORTEST} characters; got 9"), (None, "cannot read")]
)
def test_a_text_that_cannot_be_learned_is_refused(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "book.txt"
    text.write_bytes(b"\xff" if content is None else content.encode())
    with pytest.raises(SystemExit):
        main(["--only", "clipping-spikes", "--data", str(text)])
    assert words in capsys.readouterr().err


def test_settings_of_the_command_line() -> None:
    options = "--only clipping --set factor=nan steps=60 optimizer=adamw arms=none,spike --seeds 0,7-9 --wandb"
    (study,) = choose(build_parser().parse_args(options.split()))
    claim = study.claim
    assert (claim.factor != claim.factor, claim.steps, claim.optimizer, claim.arms) == (
        True,
        60,
        "adamw",
        ("none", "spike"),
    )
    output = Path("runs/studies/clipping_optimizer=adamw_factor=nan_steps=60")
    assert (study.seeds, claim.wandb, claim.output) == ([0, 7, 8, 9], "offline", output)
    (study,) = choose(build_parser().parse_args(["--only", "data-pruning", "--set", "rates=0.1", "width=2"]))
    assert (study.claim.rates, study.claim.width, list(study.seeds)) == ((0.1,), 2, [0, 1, 2, 3, 4])


def test_all_claims_are_listed_with_their_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name, claim in CLAIMS.items():
        assert f"{name}: " in printed
        assert claim.text in printed
    assert "clipping: 50 trainings, 30 s as declared, nothing is measured yet" in printed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Run a claim of two arms for a moment, with a choice of rates."""
    folder = tmp_path_factory.mktemp("study")
    options = (
        f"--only clipping --seeds 2 --set arms=none,norm steps=40 rates=0.02,0.05 --results {folder} --output {folder}"
    )
    assert main([*options.split(), "--figures", "--budget", "9"]) == 0
    return folder, options.split()


def test_a_claim_from_the_start_to_its_figures(
    run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, options = run
    lines = [json.loads(text) for text in (folder / "clipping.jsonl").read_text().splitlines()]
    assert [(line["arm"], line["seed"]) for line in lines] == [
        *[(arm, 1000) for _ in range(2) for arm in ("none", "norm")],
        *[(arm, seed) for seed in (0, 1) for arm in ("none", "norm")],
    ]
    output = folder / "clipping_steps=40"  # not that of the claim with its own settings, whose logs would be lost
    assert (output / "comparison.png").read_bytes().startswith(PNG)
    assert (output / "results.csv").is_file()
    monkeypatch.setattr("studies.claims.clipping.BadBatch.train", None)  # nothing may be trained again
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "clipping: complete, 4 results" in printed
    assert "clipping: undecided (2 of 5 seeds)" in printed
    assert main([*options, "--report"]) == 0


def test_a_study_ends_with_the_page_of_its_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"usual_norm": 1.0, "bad_norm": 9.0, "used_norm": 1.0, "accuracy_before": 0.9, "steps_lost": 0}

    def train(claim: BadBatch, run: Run) -> Result:
        accuracy = 0.9 + 0.001 * run.seed - 0.05 * (run.arm == "spike")
        return Result(run.arm, run.seed, run.rate, accuracy=accuracy, outcome="saved", **measured)

    monkeypatch.setattr(BadBatch, "train", train)
    results, output = tmp_path / "results", tmp_path / "output"
    assert main(["--only", "clipping-adamw", "--results", str(results), "--output", str(output)]) == 0
    page = output / "evidence.md"
    assert str(page) in capsys.readouterr().out
    text = page.read_text()
    assert "Of 1 claim" not in text, "the page has all claims"
    assert "1 holds in part" in text
    (image,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert (output / image).read_text().startswith("<svg")
    docs = {target.partition("#")[0] for target in re.findall(r"\]\(([^)]+\.md)[^)]*\)", text)}
    assert docs
    assert not [target for target in docs if not (output / target).exists()]


def test_figures_are_refused_without_logs(run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    _, options = run
    output = options.index("--output")
    elsewhere = [*options[: output + 1], str(run[0] / "elsewhere"), "--report", "--figures"]
    assert main(elsewhere) == 0
    printed = capsys.readouterr().out
    assert "Cannot draw figures without the logs of the trainings" in printed
    assert "NormClipping(1.0)" in printed
    assert not list((run[0] / "elsewhere").rglob("*.png"))


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(1)])  # Lightning turns the first into the second
def test_ctrl_c_reports_what_is_known(
    stop: BaseException,
    run: tuple[Path, list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise stop

    monkeypatch.setattr("studies.claims.clipping.BadBatch.train", interrupt)
    assert main([*run[1], "--seeds", "3"]) == 130
    printed = capsys.readouterr().out
    assert "Stopped. The same command continues." in printed
    assert "undecided (2 of 5 seeds)" in printed
