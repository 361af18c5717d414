"""The short examples: what they promise is written and printed, and their YAML trains."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import adversarial
import batch_size
import communication
import diagnostics
import fine_tuning
import local_steps
import optimizers
import plain_project
import probes
import pytest
import quantization
import schedules
import sharpness
import spikes
import unlearning

from lightning_grad.callbacks import (
    SAM,
    AccuracyGradientLR,
    DataPruning,
    GhostBatchNorm,
    GradCAMLogger,
    GradientMonitor,
    LoRA,
    NMSparsity,
    OptimizerSwap,
    QuantizationAwareTraining,
    SaliencyUnlearning,
    SkipNonFinite,
    SpikeRewind,
    ZClip,
)
from lightning_grad.functional import is_nm
from lightning_grad.strategies import DGCStrategy, DiLoCoStrategy

EXAMPLES = Path(plain_project.__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"

# What Lightning and torch say about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning"),
]


def check_files(folder: Path, *names: str) -> None:
    for name in ("metrics.csv", *names):
        assert (folder / name).stat().st_size > 0
        assert not name.endswith(".png") or (folder / name).read_bytes().startswith(PNG)


def test_adapters_are_written_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fine_tuning.main(["--epochs", "1", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "the same predictions after loading" in printed
    assert (tmp_path / "adapters.pt").stat().st_size < 0.5 * (tmp_path / "lora" / "last.ckpt").stat().st_size


def test_samples_are_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unlearning.main(["--epochs", "2", "--output", str(tmp_path)])
    assert "forgotten samples: right on" in capsys.readouterr().out
    check_files(tmp_path / "unlearned")


def test_schedule_is_cut_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedules.main(["--epochs", "4", "--threshold", "0.9", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "1 cuts: the learning rate ended at 0.5 times its first value" in printed
    check_files(tmp_path, "accuracy_gradient_lr.csv", "accuracy_gradient_lr.png")
    assert str(tmp_path) in printed


def test_a_threshold_of_ones_own_cuts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedules.main(["--epochs", "4", "--threshold", "-1", "--output", str(tmp_path)])
    assert "0 cuts: the learning rate ended at 1 times its first value" in capsys.readouterr().out


def test_another_optimizer_moves_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pytorch_optimizer")
    optimizers.main(["--epochs", "1", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    lines = [[part for part in line.split("  ") if part] for line in printed.splitlines() if line[:2] == "0:"]
    assert [line[0] for line in lines] == [*["0: AdamW"] * 8, "0: Lion", "0: Frugal", *["0: AdamW"] * 2]
    usual, swapped = lines[0], lines[8]  # between them, one for each layer, and Lookahead's
    assert float(usual[-1].split()[0]) == pytest.approx(2 * float(swapped[-1].split()[0]), rel=0.02)
    assert str(tmp_path) in printed


def test_quantized_weights_lie_on_grids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantization.main(["--epochs", "1", "--bits", "2", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "net.encoder.layers.1.linear1.weight             128x64  2     3  " in printed
    assert "net.head" not in printed
    check_files(tmp_path)


def test_weights_are_rounded_after_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantization.main(["--epochs", "1", "--bits", "3", "--after", "--output", str(tmp_path)])
    assert "net.encoder.layers.1.linear1.weight             128x64  3     7  " in capsys.readouterr().out


def test_sharpness_is_measured_after_both_trainings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sharpness.main(["--epochs", "2", "--rho", "0.2", "--output", str(tmp_path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "the loss rises by" in line]
    plain, sharp = (float(line.rpartition(" ")[2]) for line in lines)
    assert 0 < sharp < plain
    check_files(tmp_path / "sam")
    assert "sam/sharpness" in (tmp_path / "sam/metrics.csv").read_text()
    assert "sam/sharpness" not in (tmp_path / "plain/metrics.csv").read_text()


def test_large_batches_get_their_rates_and_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch_size.main(["--epochs", "1", "--output", str(tmp_path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("% right")]
    assert [line.partition(":")[0] for line in lines] == ["plain", "scaled", "grown"]
    check_files(tmp_path / "scaled")
    assert "batch_size/lr_factor" in (tmp_path / "scaled/metrics.csv").read_text()
    assert "batch_size/wanted" in (tmp_path / "grown/metrics.csv").read_text()


@pytest.mark.filterwarnings("ignore:SpikeRewind goes back")
@pytest.mark.filterwarnings("ignore:SkipNonFinite")
def test_going_back_saves_the_statistics_of_batch_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spikes.main(["--epochs", "1", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "skip: loss nan, " in printed
    assert "rewind: loss 2." in printed
    assert "1 rewinds. In all bad batches: sample " in printed
    assert "700" in printed
    check_files(tmp_path / "rewind", "spike_rewind.csv", "spike_rewind.png")


def test_diagnosis_names_the_bad_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(match="not finite|non-finite"):
        diagnostics.main(["--epochs", "1", "--output", str(tmp_path)])
    check_files(tmp_path, "gradient_monitor.csv", "gradient_monitor.png", "gradient_monitor_first_bad_step.json")
    assert "Step 7, batch 7: first non-finite gradient, in net.position." in capsys.readouterr().out


def test_diagnosis_of_a_run_that_is_well_names_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diagnostics.main(["--lr", "0.003", "--epochs", "1", "--output", str(tmp_path)])
    assert not (tmp_path / "gradient_monitor_first_bad_step.json").exists()
    assert "All gradients were finite." in capsys.readouterr().out


def test_probes_look_at_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probes.main(["--epochs", "1", "--output", str(tmp_path)])
    assert "of 8 images are answered right." in capsys.readouterr().out
    check_files(tmp_path, "grad_cam_logger.png", "grad_cam_logger/step_00000021_maps.png")
    check_files(tmp_path, "hessian_spectrum.png", "gradient_diversity.png", "input_gradient_logger.png")


def test_attacked_network_holds_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adversarial.main(["--epochs", "4", "--output", str(tmp_path)])
    usual, attacked = (
        float(line.rpartition(" ")[2].rstrip("%")) for line in capsys.readouterr().out.splitlines() if "right" in line
    )
    assert usual + 5 < attacked
    check_files(tmp_path / "attacked", "accuracy_gradient_lr.png")
    assert not (tmp_path / "usual" / "accuracy_gradient_lr.png").exists()


def test_two_processes_send_less(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forked(ratio: float, start_method: str) -> DGCStrategy:
        assert start_method == "spawn"  # which works everywhere, and takes seconds
        return DGCStrategy(ratio, start_method="fork")

    monkeypatch.setattr(communication, "DGCStrategy", forked)
    communication.main(["--epochs", "1", "--output", str(tmp_path)])
    assert "kB a step; the full gradients are 340.0 kB." in capsys.readouterr().out
    check_files(tmp_path, "dgc_strategy.csv", "dgc_strategy.png", "dgc_strategy_layers.csv")


def test_two_processes_train_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forked(every: int, start_method: str) -> DiLoCoStrategy:
        assert start_method == "spawn"
        return DiLoCoStrategy(every, start_method="fork")

    monkeypatch.setattr(local_steps, "DiLoCoStrategy", forked)
    local_steps.main(["--every", "4", "--steps", "8", "--output", str(tmp_path)])
    assert "Each process sent 4.0 times less than the gradients of all steps." in capsys.readouterr().out
    check_files(tmp_path, "di_lo_co_strategy.csv", "di_lo_co_strategy.png", "metrics.csv")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's use of jsonargparse
@pytest.mark.parametrize(
    ("family", "kind", "figure"),
    [
        ("schedules", AccuracyGradientLR, "accuracy_gradient_lr.png"),
        ("diagnostics", GradientMonitor, "gradient_monitor.png"),
        ("optimizers", OptimizerSwap, None),
        ("quantization", QuantizationAwareTraining, None),
        ("probes", GradCAMLogger, "grad_cam_logger.png"),
        ("sharpness", SAM, None),
        ("batch_size", GhostBatchNorm, None),
        ("fine_tuning", LoRA, None),
        ("unlearning", SaliencyUnlearning, None),
        ("spikes", SpikeRewind, "gradient_monitor.png"),
    ],
)
def test_yaml_runs_on_the_command_line(
    family: str, kind: type, figure: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jsonargparse")
    from train import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    short = ["--trainer.max_epochs=1", "--trainer.log_every_n_steps=2"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    cli = main(["fit", "--config", str(EXAMPLES / f"{family}.yaml"), *short, *quiet])
    assert [type(callback) for callback in cli.trainer.callbacks if isinstance(callback, kind)] == [kind]
    check_files(tmp_path / f"runs/{family}_yaml/version_0", *([figure] if figure else []))


@pytest.mark.parametrize("path", sorted([*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.yaml")]), ids=lambda path: path.name)
def test_drop_in_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


# Sparsity, clipping, data pruning: the script once, and the YAML once.


@pytest.mark.parametrize(
    ("family", "options", "printed", "files"),
    [
        ("sparsity", "--epochs 1", "linear1.weight             128x64   1:8      87.5 %  yes", ["nm_sparsity.png"]),
        ("clipping", "--steps 40", "ZClip clipped", ["gradient_monitor.png"]),
        ("data_pruning", "--epochs 4", "Validation accuracy", ["scores_epoch3.npz", "data_pruning_epoch3_samples.png"]),
    ],
)
def test_script_trains_and_writes_what_it_says(
    family: str, options: str, printed: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_module(family).main([*options.split(), "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert printed in shown
    assert str(tmp_path) in shown
    check_files(tmp_path, *files)


def run_yaml(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str) -> Any:
    """Train as the family's YAML says, with options of the command line, and return the command line's object."""
    pytest.importorskip("jsonargparse")
    from train import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    return main(["fit", "--config", str(EXAMPLES / f"{family}.yaml"), *options, *quiet])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's use of jsonargparse
def test_sparsity_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.log_every_n_steps=1"]
    cli = run_yaml("sparsity", monkeypatch, tmp_path, *short)
    [callback] = [callback for callback in cli.trainer.callbacks if isinstance(callback, NMSparsity)]
    assert (callback.pattern, callback.recipe) == ("1:8", "mdgf-exponential")
    assert is_nm(cli.model.net.encoder.layers[0].linear1.weight.detach(), 1, 8)
    check_files(tmp_path / "runs/nm_sparsity_yaml/version_0", "nm_sparsity.csv", "nm_sparsity.png")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's use of jsonargparse
def test_local_steps_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["--trainer.max_steps=4", "--trainer.max_epochs=-1", "--trainer.strategy.start_method=fork"]
    cli = run_yaml("local_steps", monkeypatch, tmp_path, *short, "--trainer.limit_val_batches=0")
    assert cli.trainer.strategy.sync_every_n_steps == 10
    assert cli.trainer.callback_metrics["comm/ratio"] > 1
    check_files(tmp_path / "runs/local_steps_yaml/version_0", "di_lo_co_strategy.png")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's use of jsonargparse
def test_clipping_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["--trainer.max_steps=6", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=2"]
    cli = run_yaml("clipping", monkeypatch, tmp_path, *short)
    kinds = (SkipNonFinite, ZClip, GradientMonitor)
    assert [type(callback) for callback in cli.trainer.callbacks if isinstance(callback, kinds)] == list(kinds)
    check_files(tmp_path / "runs/clipping_yaml/version_0", "gradient_monitor.png")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's use of jsonargparse
def test_data_pruning_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = run_yaml("data_pruning", monkeypatch, tmp_path, "--trainer.max_epochs=4", "--model.init_args.width=2")
    (callback,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, DataPruning)]
    assert (callback.prune, callback.offset, callback.epoch) == (0.5, 0.1, 3)
    assert cli.trainer.global_step == 3 * 22 + 11
    written = [f"data_pruning_epoch3_{name}" for name in ("scores.png", "samples.png", "samples.csv")]
    check_files(tmp_path / "runs/data_pruning_yaml/version_0", *written)
