"""A strategy can be written in YAML for LightningCLI, in a Hydra config, and read back from the run's config."""

import json
import sys
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf

from lightning_grad.testing import assert_identical, on_ranks
from tests.contract.strategy_settings import CANONICAL, SCHEMES, Scheme
from tests.strategies.fits import finish, train_on_ranks


def _from_command_line(trainer: dict[str, Any], folder: Any, monkeypatch: pytest.MonkeyPatch, *extra: str) -> Any:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"accelerator": "cpu", "devices": 2, "logger": False, **trainer}}))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path), *extra])
    cli = LightningCLI(BoringModel, run=False, seed_everything_default=0, save_config_callback=None)
    return cli.trainer.strategy


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's use of jsonargparse
def test_yaml_through_the_command_line(scheme, tmp_path, monkeypatch):
    strategy = {"class_path": scheme.class_path, "init_args": {**scheme.arguments, "start_method": "fork"}}
    built = _from_command_line({"strategy": strategy}, tmp_path, monkeypatch)
    assert type(built).__name__ == scheme.name
    assert built.settings == scheme.build(start_method="fork").settings
    assert built.num_processes == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("DGCStrategy", ("ratio", 0.25)), ("PowerSGDStrategy", ("rank", 7)), ("DiLoCoStrategy", ("outer_lr", 0.5))],
)
def test_arguments_on_the_command_line(name, arguments, tmp_path, monkeypatch):
    key, value = arguments
    extra = (f"--trainer.strategy=lightning_grad.strategies.{name}", f"--trainer.strategy.init_args.{key}={value}")
    assert getattr(_from_command_line({}, tmp_path, monkeypatch, *extra), key) == value


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("suffix", ["", "_fork", "_spawn"])
@pytest.mark.parametrize(
    ("short", "name"),
    [
        ("ddp_dgc", "DGCStrategy"),
        ("ddp_powersgd", "PowerSGDStrategy"),
        ("ddp_local_sgd", "LocalSGDStrategy"),
        ("ddp_diloco", "DiLoCoStrategy"),
    ],
)
def test_short_names_in_yaml(short, name, suffix, tmp_path, monkeypatch):
    built = _from_command_line({"strategy": short + suffix}, tmp_path, monkeypatch)
    assert type(built).__name__ == name
    assert built._start_method == (suffix.strip("_") or "popen")


def _fit_from_hydra(scheme: Scheme) -> None:
    config = OmegaConf.create({"arguments": dict(scheme.arguments)}).arguments
    built = type(scheme.build())(**{key: config[key] for key in config})
    assert built.settings == scheme.build().settings
    json.dumps(built.settings)  # plain types through and through: a ListConfig would raise
    expected = finish(scheme.build(), module=scheme.module(), max_epochs=1)
    assert_identical(expected, finish(built, module=scheme.module(), max_epochs=1))


@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_hydra_containers(scheme):
    on_ranks(1, _fit_from_hydra, scheme)


def _fit_with_logger(scheme: Scheme, folder: Any) -> None:
    train_on_ranks(scheme.build(), (), scheme.module(), logger=CSVLogger(folder), max_epochs=1)


@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_settings_reach_the_runs_hyperparameters(scheme, tmp_path):
    on_ranks(2, _fit_with_logger, scheme, tmp_path)
    folder = tmp_path / "lightning_logs" / "version_0"
    written = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert written[scheme.name] == scheme.build().settings
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    own = ("move_norm", "agreement") if scheme.is_local else ("residual_norm", "compress_ms")
    assert {f"comm/{name}" for name in ("bytes_sent", "ratio", *own)} <= set(header)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_settings_are_the_constructors_arguments(scheme):
    settings = scheme.build().settings
    assert type(scheme.build())(**settings).settings == settings
    for key, value in scheme.arguments.items():
        if key != "warmup":  # which may be given by name
            assert settings[key] == value
