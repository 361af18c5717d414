"""A technique can be written in YAML for LightningCLI, in a Hydra config, and read back from the run's config."""

import sys

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf

from lightning_grad.testing import fit
from tests.contract.settings import CANONICAL, TECHNIQUES


@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's use of jsonargparse
def test_yaml_through_the_command_line(technique, tmp_path, monkeypatch):
    callback = {"class_path": technique.class_path, "init_args": dict(technique.arguments)}
    config = {"trainer": {"accelerator": "cpu", "logger": False, "callbacks": [callback]}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path)])
    cli = LightningCLI(BoringModel, run=False, seed_everything_default=0, save_config_callback=None)
    (built,) = [callback for callback in cli.trainer.callbacks if hasattr(callback, "settings")]
    assert built.settings == technique.build().settings


@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_hydra_containers(technique):
    config = OmegaConf.create({"arguments": dict(technique.arguments)}).arguments
    built = type(technique.build())(**{key: config[key] for key in config})
    assert built.settings == technique.build().settings
    fit([built], max_epochs=4, limit_train_batches=2, limit_val_batches=1)


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_settings_reach_the_runs_hyperparameters(technique, tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.draw", lambda *_: None)
    logger = CSVLogger(tmp_path)
    fit([technique.build()], logger=logger, max_epochs=2, limit_train_batches=2, limit_val_batches=1)
    written = yaml.safe_load((tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text())
    assert written[technique.name] == technique.build().settings


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_name_is_in_the_state_key_and_no_tuned_value_is(technique):
    callback = technique.build(name="mine")
    assert callback.state_key == f"{technique.name}[mine]"
    assert technique.build().state_key == technique.name
