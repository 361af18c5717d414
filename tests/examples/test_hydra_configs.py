"""The snippets for lightning-hydra-template compose, become callbacks and strategies with plain settings, and train."""

import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain_project
import pytest
from lightning.pytorch import Trainer, seed_everything
from plain_project import Digits, ResidualConvNet, VisionTransformer

from lightning_grad import callbacks, strategies
from lightning_grad.core import GradientConditioner, OptimizerCallback

hydra = pytest.importorskip("hydra")
OmegaConf = pytest.importorskip("omegaconf").OmegaConf

# What Lightning and torch say about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning"),
]

CONFIGS = Path(plain_project.__file__).parents[1] / "configs"
EXPECTED = {
    "nm_sparsity": {"pattern": "1:8", "recipe": "mdgf-exponential"},
    "nm_sparsity_per_layer": {
        "pattern": {"*.self_attn.*": "2:4", "*.linear?": "1:8"},
        "recipe": "sdgf-stepwise",
        "finetune_fraction": 0.3,
        "exclude": ["*.layers.0.*"],
    },
    "optimizer_swap_matrices": {"optimizer": "dct-adamw", "options": {"rank": 16}, "exclude": None},
    "nm_sparsity_schedule": {"pattern": "1:4", "recipe": [(0.1, "3:4"), (0.3, "2:4"), (0.5, "1:4")]},
}

WORDS = {getattr(callbacks, name).__module__.rpartition(".")[2]: name for name in callbacks.__all__}
CONDITIONERS = sorted(
    word
    for word, name in WORDS.items()
    if issubclass(getattr(callbacks, name), GradientConditioner | OptimizerCallback)
)


def instantiate(*overrides: str) -> Any:
    """Compose the group ``callbacks`` and instantiate its only entry, as the template does."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        config = hydra.compose(overrides=list(overrides))
    (word,) = config.callbacks
    callback = hydra.utils.instantiate(config.callbacks[word])
    assert type(callback).__name__ == WORDS[word]
    return callback


def parts(value: Any) -> Iterator[Any]:
    """Yield a setting and everything inside it."""
    yield value
    if isinstance(value, dict):
        for pair in value.items():
            yield from parts(pair)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from parts(item)


@pytest.mark.parametrize("snippet", sorted(EXPECTED))
def test_snippet_becomes_a_callback_with_plain_settings(snippet: str) -> None:
    callback = instantiate(f"+callbacks={snippet}")
    expected = EXPECTED[snippet]
    assert {name: callback.settings[name] for name in expected} == expected
    plain = {str, int, float, bool, dict, list, tuple, type(None)}
    assert {type(part) for part in parts(callback.settings)} <= plain
    assert pickle.loads(pickle.dumps(callback)).settings == callback.settings


def test_every_snippet_is_tested() -> None:
    snippets = {path.stem for path in (CONFIGS / "callbacks").glob("*.yaml")}
    assert snippets == {*EXPECTED, *WORDS}


def instantiate_one(word: str) -> Any:
    """Compose the group ``callbacks`` with one technique, and check that it gets what its file says."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        config = hydra.compose(overrides=[f"+callbacks={word}"])
    callback = hydra.utils.instantiate(config.callbacks[word])
    assert type(callback).__name__ == WORDS[word]
    arguments = {key: value for key, value in config.callbacks[word].items() if key != "_target_"}
    assert {key: callback.settings[key] for key in arguments} == arguments
    return callback


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.mark.parametrize("word", [*CONDITIONERS, "gradient_monitor", "optimizer_swap", "spike_rewind", "tract"])
def test_snippet_of_what_reads_gradients_becomes_its_callback_and_trains(word: str) -> None:
    callback = instantiate_one(word)
    trainer = Trainer(max_steps=2, accelerator="cpu", limit_val_batches=0, callbacks=[callback], **QUIET)
    trainer.fit(VisionTransformer(), datamodule=Digits())
    assert trainer.global_step == 2


@pytest.mark.parametrize(
    ("word", "epochs", "fewest", "most"),
    [
        ("data_pruning", 11, 42, 42),  # ten whole epochs, and half of one
        ("info_batch", 5, 11, 19),
        ("loss_reweighting", 3, 12, 12),
        ("repeated_random_subset", 3, 6, 6),
        ("uniform_learning", 11, 47, 55),  # three epochs with repeated samples
    ],
)
def test_snippet_of_what_chooses_samples_becomes_its_callback_and_chooses(
    word: str, epochs: int, fewest: int, most: int
) -> None:
    seed_everything(0, verbose=False)  # which samples are below the mean loss depends on the network
    callback = instantiate_one(word)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", limit_val_batches=0, callbacks=[callback], **QUIET)
    trainer.fit(ResidualConvNet(width=2), datamodule=Digits(batch_size=350))  # four steps for a whole epoch
    assert fewest <= trainer.global_step <= most


@pytest.mark.parametrize(
    ("word", "logged"),
    [
        ("accuracy_gradient_lr", "lr/scale"),
        ("adversarial_evaluation", "adversarial/val_acc"),
        ("adversarial_training", "adversarial/pgd_accuracy"),
        ("gradcam", "explain/gradcam/confidence"),
        ("gradient_diversity", "diversity/g_vendi"),
        ("hessian_spectrum", "curvature/eigenvalue_1"),
        ("input_gradients", "explain/input_gradients/top_share"),
    ],
)
def test_snippet_of_what_validates_becomes_its_callback_and_logs(word: str, logged: str) -> None:
    trainer = Trainer(
        max_epochs=1, limit_train_batches=2, limit_val_batches=1, callbacks=[instantiate_one(word)], **QUIET
    )
    trainer.fit(ResidualConvNet(width=2), datamodule=Digits(batch_size=50))
    assert logged in trainer.callback_metrics


EXPORTED = [getattr(strategies, name) for name in strategies.__all__]
STRATEGIES = {cls.__module__.rpartition(".")[2]: cls for cls in EXPORTED if not inspect.isabstract(cls)}


def test_every_snippet_of_a_strategy_is_tested() -> None:
    assert {path.stem for path in (CONFIGS / "strategies").glob("*.yaml")} == set(STRATEGIES)


@pytest.mark.parametrize("word", sorted(STRATEGIES))
def test_snippet_of_a_strategy_becomes_part_of_the_trainer_and_trains(word: str) -> None:
    is_adam = word == "onebit_adam"
    config, trainer = instantiate_trainer(word, *(["trainer.strategy.freeze_step=1"] if is_adam else []))
    strategy = trainer.strategy
    assert type(strategy) is STRATEGIES[word]
    arguments = {key: value for key, value in config.strategy.items() if key not in ("_target_", "start_method")}
    assert {key: strategy.settings[key] for key in arguments} == arguments
    assert {type(part) for part in parts(strategy.settings)} <= {str, int, float, bool, dict, list, tuple, type(None)}
    trainer.fit(ResidualConvNet(width=8, optimizer="adamw" if is_adam else "sgd"), datamodule=Digits(batch_size=50))
    assert trainer.callback_metrics["comm/ratio"] > 1


def test_settings_of_a_strategy_change_on_the_command_line() -> None:
    _, trainer = instantiate_trainer("dgc", "trainer.strategy.ratio=0.01", "trainer.strategy.exclude=['*.head.*']")
    assert (trainer.strategy.ratio, trainer.strategy.exclude) == (0.01, ["*.head.*"])


def instantiate_trainer(word: str, *overrides: str) -> tuple[Any, Trainer]:
    """Compose a trainer of two ranks, which named a strategy already, with a snippet, as the template does."""
    trainer = {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    short = {"max_steps": 2, "limit_val_batches": 0, "log_every_n_steps": 1, **QUIET}
    added = [f"+trainer.{key}={value}" for key, value in (trainer | short).items()]
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        base = hydra.compose(overrides=added)
        snippet = hydra.compose(overrides=[f"+strategies={word}", "+trainer.strategy.start_method=fork", *overrides])
    config = OmegaConf.merge(base, snippet)
    return config.trainer, hydra.utils.instantiate(config.trainer)


@pytest.mark.parametrize(
    ("override", "name", "expected"),
    [
        ("callbacks.nm_sparsity.recipe=sr-ste", "recipe", "sr-ste"),
        ("callbacks.nm_sparsity.pattern='2:4'", "pattern", "2:4"),
        ("+callbacks.nm_sparsity.include=['*.linear1','*.linear2']", "include", ["*.linear1", "*.linear2"]),
        ("+callbacks.nm_sparsity.mask_every_n_steps=5", "mask_every_n_steps", 5),
    ],
)
def test_settings_change_on_the_command_line(override: str, name: str, expected: object) -> None:
    assert instantiate("+callbacks=nm_sparsity", override).settings[name] == expected


@pytest.mark.parametrize("snippet", sorted(EXPECTED))
def test_snippet_trains_the_plain_project(snippet: str, tmp_path: Path) -> None:
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        callbacks=[instantiate(f"+callbacks={snippet}")],
        limit_val_batches=0,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = VisionTransformer(width=16, heads=2)
    trainer.fit(module, Digits())
    if snippet == "optimizer_swap_matrices":
        moved = trainer.optimizers[0].parts[0].param_groups[0]["param_names"]
        assert moved[0] == "net.encoder.layers.0.self_attn.in_proj_weight"
        return
    zeros = {name: (weight == 0).float().mean().item() for name, weight in module.named_parameters()}
    last = "net.encoder.layers.2.linear2.weight"
    assert zeros[last] == (0.75 if snippet == "nm_sparsity_schedule" else 0.875)
    assert zeros["net.head.weight"] == 0
    if snippet == "nm_sparsity_per_layer":
        assert zeros["net.encoder.layers.1.self_attn.in_proj_weight"] == 0.5
        assert zeros["net.encoder.layers.0.linear1.weight"] == 0
