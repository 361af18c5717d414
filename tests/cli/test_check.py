"""``lightning-grad check``: verdicts on awkward projects, and what it says and leaves behind."""

import functools
import json
import logging
import os
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_grad import callbacks, strategies
from lightning_grad.cli import main
from lightning_grad.cli.check import command, ranks, sources, trial, watch
from lightning_grad.cli.check.rounds import Rounds
from lightning_grad.data.random_streams import random_states
from tests.cli import awkward

HERE = "tests.cli.awkward"

Check = Callable[..., dict[str, Any]]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One round, which gives a verdict but no ratio; in an empty folder."""
    monkeypatch.setattr(command, "Rounds", functools.partial(Rounds, count=1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def check(quick: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Run the command, and return the entry of each technique."""

    def run(target: str, *only: str, status: int = 0) -> dict[str, Any]:
        assert run_command(target, "--json", "--only", *only) == status
        return {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["techniques"]}

    return run


def run_command(target: str, *arguments: str) -> Any:
    try:
        main(["check", target, "--batches", "2", *arguments])
    except SystemExit as stop:
        return stop.code
    return 0


# Verdicts.

AWKWARD = {
    "manual": {"NormClipping": "4 parameters", "InfoBatch": "does not work with manual optimization"},
    "gan": {"MomentumReset": "2 optimizers", "AdversarialEvaluation": "GAN has none", "NMSparsity": "2 parameters"},
    "mappings": {"AdversarialEvaluation": "1 inputs", "DataPruning": "12 samples"},
    "pretrained_style": {"LossReweighting": "1 losses", "NMSparsity": "1 parameters"},
    "stream": {"SkipNonFinite": "4 parameters", "RepeatedRandomSubset": "the samples of the IterableDataset Stream"},
    "hand_written_loss": {"InfoBatch": "12 samples", "DataPruning": "Hand-written, scripted and fused losses"},
    "no_validation": {"ZClip": "4 parameters", "AccuracyGradientLR": "this fit has none"},
    "lstm": {"GradientCentralization": "3 parameters", "NMSparsity": "NMSparsity found no weight to make sparse"},
    "tied": {"UniformLearning": "such targets", "NMSparsity": "1 parameters"},
}


@pytest.mark.parametrize("project", AWKWARD)
def test_awkward_projects_get_a_verdict(project: str, check: Check) -> None:
    found = check(f"{HERE}:{project}", *AWKWARD[project])
    assert {*found} == {*AWKWARD[project]}
    for name, expected in AWKWARD[project].items():
        entry = found[name]
        if entry["status"] == "runs":
            assert f"{len(entry['acts_on']['names'])} {entry['acts_on']['kind']}" == expected
        else:
            assert entry["status"] == "refused"
            (words,) = entry["words"]
            assert name in words
            assert expected in words
            assert entry["acts_on"] is None


def test_a_pass_is_told_from_steps_if_a_pruned_half_epoch_would_have_no_batch(check: Check) -> None:
    found = check(f"{HERE}:whole_batches", "DataPruning")
    assert found["DataPruning"]["between_epochs"] == "1 x training data"


def test_a_network_of_hugging_face(check: Check) -> None:
    pytest.importorskip("transformers")
    found = check(f"{HERE}:hugging_face", "LossReweighting", "NMSparsity")
    assert [entry["status"] for entry in found.values()] == ["runs", "runs"]


def test_a_datamodule_is_set_up_once_and_its_module_may_log_and_save(check: Check, quick: Path) -> None:
    awkward.Prepared.setups = 0
    found = check(f"{HERE}:datamodule", "DataPruning", "AdversarialEvaluation")
    assert awkward.Prepared.setups == 1
    assert found["DataPruning"]["between_epochs"] == "1 x training data"
    assert found["AdversarialEvaluation"]["between_epochs"] == "3 x validation"  # the attack has two steps
    assert [*quick.iterdir()] == []  # no checkpoint of the module


CONFIG = """
seed_everything: 3
ckpt_path: null
model: {class_path: tests.cli.awkward.Asking}
data: {class_path: tests.cli.awkward.Prepared, init_args: {size: 4}}
trainer:
  max_epochs: 100
  gradient_clip_val: 0.5
  accelerator: gpu
  devices: 8
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}}
  callbacks:
    - {class_path: tests.cli.awkward.Counting, init_args: {step: 2}}
    - {class_path: lightning_grad.callbacks.GradientMonitor}
    - {class_path: lightning.pytorch.callbacks.ModelCheckpoint}
    - {class_path: lightning.pytorch.callbacks.LearningRateMonitor}
"""


def test_callbacks_and_arguments_of_a_config_stay(check: Check, quick: Path) -> None:
    (quick / "run.yaml").write_text(CONFIG)
    awkward.Counting.epochs = 0
    found = check("run.yaml", "ZClip", "SkipNonFinite", "GradientMonitor")
    assert {name: entry["status"] for name, entry in found.items()} == {
        "ZClip": "refused",
        "SkipNonFinite": "runs",  # it comes before the monitor of the config, as it must
        "GradientMonitor": "in use",
    }
    assert "Trainer(gradient_clip_val=0.5)" in found["ZClip"]["words"][0]
    assert awkward.Counting.epochs == 2 * 3 * 3  # twice three epochs of two bare runs and of SkipNonFinite
    assert [path.name for path in quick.iterdir()] == ["run.yaml"]


def test_a_module_of_the_other_namespace_gets_its_own_trainer(check: Check) -> None:
    found = check(f"{HERE}:other_namespace", "NormClipping", "DataPruning")
    assert [entry["status"] for entry in found.values()] == ["runs", "runs"]


def test_the_strategy_of_a_config_may_refuse(check: Check, quick: Path) -> None:
    (quick / "run.yaml").write_text(CONFIG.replace("devices: 8", "strategy: fsdp"))
    found = check("run.yaml", "NMSparsity", "RepeatedRandomSubset")
    assert found["RepeatedRandomSubset"]["status"] == "runs"
    assert found["NMSparsity"]["status"] == "refused"
    assert found["NMSparsity"]["words"] == [
        "NMSparsity needs whole weights, and FSDP1 (FSDPStrategy) shards them. Train with strategy='ddp' or on one device."
    ]


def test_accumulated_batches_are_timed_as_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(watch, "_now", lambda _: next(clock))
    source = sources.FunctionSource(f"{HERE}:plain")
    monkeypatch.setattr(source, "make", lambda: make(source))
    bare = trial.try_out(sources.ShortProject(source), None, 2)
    assert bare.status == "runs"
    assert bare.batches == 3 * 4  # an epoch has two optimizer steps
    assert bare.seconds == [2, 2]  # of the first batches of the second and third epoch


def make(source: Any) -> Any:
    built = sources.FunctionSource.make(source)
    return built._replace(arguments={"accumulate_grad_batches": 2})


# What cannot be tried.


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("none.yaml", "none.yaml does not load: .*File does not exist"),
        ("wrong.yaml", "wrong.yaml does not load: .*(Option 'siz' is not accepted|Key 'siz' is not expected)"),
        ("nowhere:make", r"there is no module 'nowhere' \(searched from "),
        (f"{HERE}:nothing", f"module '{HERE}' has no function 'nothing'"),
        ("project", "'project' names no project. Give the YAML file of a LightningCLI, or package.module:function"),
        (
            f"{HERE}:not_a_module",
            rf"error: {HERE}:not_a_module returned \(Linear, DataLoader\)\. Return a LightningModule",
        ),
        (f"{HERE}:unbuildable", "does not train without any technique:.*in __init__.*ZeroDivisionError: no layers"),
        ("raises.yaml", "does not train without any technique:.*(in __init__.*ZeroDivisionError: |- )no layers"),
        (f"{HERE}:Tiny", "MisconfigurationException: `train_dataloader` must be implemented"),
        (f"{HERE}:loaders_of", rf"error: {HERE}:loaders_of needs path\. Name a function that needs no arguments\."),
        ("tests/cli/awkward.py:plain", rf"Write a module as in an import: {HERE}:plain\."),
        (":plain", "':plain' names no project"),
        (f"{HERE}:leaving", "does not train without any technique:.*in on_fit_start.*SystemExit: 3"),
        (f"{HERE}:broken", "does not train without any technique:.*in training_step.*KeyError: 'the label is missing'"),
    ],
)
def test_what_cannot_be_tried_is_said_first(
    target: str, words: str, quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (quick / "wrong.yaml").write_text(CONFIG.replace("size: 4", "siz: 4"))
    (quick / "raises.yaml").write_text(CONFIG.replace("awkward.Asking", "awkward.Unbuildable"))
    awkward.Broken.built = 0
    assert run_command(target) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.match("(.*: your own code runs.*\n)?error: ", printed.err)
    assert re.search(words, printed.err, re.DOTALL), printed.err
    assert not re.search("lightning/pytorch|lightning_grad/|importlib|jsonargparse/", printed.err), (
        "begins in the user's code"
    )
    assert awkward.Broken.built <= 1, "nothing else is tried"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batches", "1"], "must be an integer >= 2; got 1"),
        (["--json", "--markdown"], "not allowed with"),
        (["--only", "ZClop"], "there is no technique or family 'ZClop'. Did you mean 'ZClip'?"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], words: str, quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = run_command(f"{HERE}:plain", *arguments)
    assert words in f"{stop} {capsys.readouterr().err}"


def test_a_family_can_be_chosen() -> None:
    chosen = command.chosen_techniques(["sparsity", "ZClip"], strategies=False)
    assert chosen == [callbacks.ZClip, callbacks.NMSparsity]
    assert strategies.DGCStrategy not in command.chosen_techniques(None, strategies=False)
    assert strategies.DGCStrategy in command.chosen_techniques(None, strategies=True)
    assert strategies.DGCStrategy in command.chosen_techniques(["communication"], strategies=False)


# Failures and interruptions.


def test_a_technique_that_fails_is_no_refusal(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def condition(self: Any, step: Any) -> Any:
        return torch.ones(2) @ torch.ones(3)

    def poison(self: Any, step: Any) -> Any:
        for gradient in step.gradients:
            gradient.fill_(float("nan"))
        warnings.warn("ValueClipping clips nothing.", stacklevel=2)
        return {}

    monkeypatch.setattr(callbacks.ZClip, "condition", condition)
    monkeypatch.setattr(callbacks.ValueClipping, "condition", poison)
    found = check(f"{HERE}:plain", "ZClip", "ValueClipping", "NormClipping", status=1)
    assert [entry["status"] for entry in found.values()] == ["runs", "FAILED", "FAILED"]
    assert "in condition" in found["ZClip"]["words"][0]
    assert "RuntimeError: " in found["ZClip"]["words"][0]
    assert found["ValueClipping"]["words"] == ["Its weights became non-finite; without it they stay finite."]


def test_an_interrupt_prints_what_is_known(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    awkward.Interrupted.fits = (
        0  # its own fit, a run without a technique, the first technique; the second is interrupted
    )
    handler = signal.getsignal(signal.SIGINT)
    assert run_command(f"{HERE}:interrupted", "--only", "NormClipping", "ValueClipping", "ZClip") == 130
    printed = capsys.readouterr()
    lines = {line.split()[0]: line for line in printed.out.splitlines()}
    assert lines["NormClipping"].split()[1:] == ["runs", "-", "-", "4", "parameters"]
    assert lines["ValueClipping"].split()[1:3] == ["not", "tried"]
    assert lines["ZClip"].split()[1:3] == ["not", "tried"]
    assert "Interrupted" in printed.err
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_before_the_first_technique_is_said(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    awkward.Interrupted.fits = 3
    assert run_command(f"{HERE}:interrupted", "--only", "ZClip") == 130
    assert "Interrupted before a technique was tried." in capsys.readouterr().err


def test_sigterm_is_an_interrupt_too(quick: Path) -> None:
    assert run_command(f"{HERE}:terminated", "--only", "ZClip") == 130


def test_a_module_may_change_the_folder_use_the_folder_of_its_logs_and_stop_early(check: Check, quick: Path) -> None:
    found = check(f"{HERE}:restless", "ZClip", "AdversarialEvaluation")
    assert [entry["status"] for entry in found.values()] == ["runs", "runs"]
    assert found["AdversarialEvaluation"]["between_epochs"] == "3 x validation"
    assert Path.cwd() == quick
    assert [*quick.iterdir()] == []


def test_it_changes_nothing(check: Check, quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    torch.manual_seed(123)
    before = str(random_states())
    check(f"{HERE}:plain", "ZClip", "DataPruning")
    assert str(random_states()) == before
    assert "PL_GLOBAL_SEED" not in os.environ
    assert logging.root.manager.disable == logging.NOTSET
    assert [*quick.iterdir()] == []


# The table.


def test_text_and_markdown_have_the_words_of_the_technique(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusal = (
        "RepeatedRandomSubset selects samples by index, but the samples of the IterableDataset Stream have none. Use a "
        "data set with __len__ and __getitem__."
    )
    only = ("--only", "RepeatedRandomSubset", "NormClipping")
    assert run_command(f"{HERE}:stream", *only) == 0
    printed = capsys.readouterr()
    assert "your own code runs, with its hooks" in printed.err.splitlines()[0]
    table, words = printed.out.split("\n\n")
    assert table.splitlines()[0].split() == ["technique", "result", "step", "time", "between", "epochs", "acts", "on"]
    assert " ".join(words.split()) == f"RepeatedRandomSubset refused {refusal}"
    assert run_command(f"{HERE}:stream", *only, "--markdown") == 0
    markdown = capsys.readouterr().out
    header, ruler, *_ = markdown.splitlines()
    assert header == "| technique | result | step time | between epochs | acts on |"
    assert ruler == "| --- | --- | --- | --- | --- |"
    assert "| `NormClipping` | runs | - | - | 4 parameters |" in markdown
    assert f"- RepeatedRandomSubset refused:\n\n  > {refusal}" in markdown


def test_five_rounds_give_a_step_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    clock = [0.0]

    def slower(method: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*arguments: Any) -> Any:
            clock[0] += seconds
            return method(*arguments)

        return run

    monkeypatch.setattr(watch, "_now", lambda _: clock[0])
    monkeypatch.setattr(awkward.Tiny, "training_step", slower(awkward.Tiny.training_step, 1.0), raising=False)
    monkeypatch.setattr(callbacks.NormClipping, "condition", slower(callbacks.NormClipping.condition, 2.0))
    assert run_command(f"{HERE}:plain", "--json", "--only", "NormClipping", "ValueClipping") == 0
    clips, values = json.loads(capsys.readouterr().out)["techniques"]
    assert clips["step_time"] == {"shown": "3.0", "ratio": 3.0, "rounds": [[3.0, 1.0]] * 5}
    assert values["step_time"] == {"shown": "about 1", "ratio": 1.0, "rounds": [[1.0, 1.0]] * 5}


# Strategies.


def test_strategies_are_tried_on_two_ranks_against_ddp(check: Check) -> None:
    found = check(f"{HERE}:plain", "DGCStrategy")
    assert found["DGCStrategy"]["status"] == "runs"
    assert found["DGCStrategy"]["acts_on"]["names"] == ["net.1.weight"]
    assert len(found["DGCStrategy"]["step_time"]["rounds"]) == 5


def test_ddp_that_fails_itself_says_nothing_about_a_strategy(check: Check) -> None:
    found = check(f"{HERE}:unused", "DGCStrategy")
    assert found["DGCStrategy"]["status"] == "not tried"
    assert found["DGCStrategy"]["words"][0].startswith("DDP itself fails on 2 CPU processes:\n")
    assert "parameters that were not used in producing the loss" in found["DGCStrategy"]["words"][0]


def test_strategies_are_not_tried_once_cuda_is_initialized(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "on_ranks", None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", list)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda _: None)
    found = check(f"{HERE}:plain", "DGCStrategy")
    assert found["DGCStrategy"]["status"] == "not tried"
    assert "CUDA is initialized" in found["DGCStrategy"]["words"][0]


@pytest.mark.parametrize(("variable", "used"), [(None, 1), ("2", 2)])
def test_it_uses_one_thread_unless_a_number_is_set(
    variable: str | None, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with trial.undisturbed():
            assert torch.get_num_threads() == used
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
