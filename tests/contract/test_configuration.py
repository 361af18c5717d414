"""A technique can be written in YAML for LightningCLI, in a Hydra config, and read back from the run's config."""

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf

from lightning_grad.testing import fit
from lightning_grad.testing.checks.g8_clear_words import importable_path
from tests.contract.settings import CANONICAL, TECHNIQUES


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_a_config_names_the_class_by_its_public_path(technique):
    assert importable_path(technique.kind) == technique.class_path


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
