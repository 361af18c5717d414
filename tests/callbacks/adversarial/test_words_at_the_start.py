"""Numbers that are refused, runs in which nothing is attacked, the line at the start, and settings that change on resume."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_grad.callbacks import AdversarialEvaluation, AdversarialTraining
from lightning_grad.core import callback as base_module
from lightning_grad.functional import fgsm, pgd
from lightning_grad.testing import assert_identical, fit, loaders, make_classifier, make_trainer
from lightning_grad.utilities import arguments as arguments_module

BOTH = [AdversarialTraining, AdversarialEvaluation]
INF = math.inf


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    for module in (base_module, arguments_module):
        monkeypatch.setattr(module, "rank_zero_info", messages.append)
    return messages


# Numbers.


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"epsilon": INF}, r"epsilon must be finite and at most 1e\+30; got inf\. Set it to"),
        ({"epsilon": 1e39}, r"epsilon must be finite and at most 1e\+30; got 1e\+39\."),
        ({"epsilon": -INF}, r"epsilon must be at least 0.*; got -inf\."),
        ({"step_size": INF}, r"step_size must be finite and at most 1e\+30; got inf\. Use None"),
        ({"step_size": -1.0}, r"step_size must be above 0; got -1\.0\."),
        ({"mean": INF, "std": 1.0}, r"mean must be finite.*; got inf\."),
        ({"mean": [0.0, -INF], "std": 1.0}, r"mean must be finite.*; got -inf\."),
        ({"mean": 0.0, "std": INF}, r"std must be finite.*; got inf\."),
        ({"mean": 0.0, "std": [1.0, 0.0]}, r"std must be above 0; got 0\.0\."),
        ({"mean": 0.0, "std": [1.0, -1.0]}, r"std must be above 0; got -1\.0\."),
        ({"mean": [], "std": 1.0}, r"mean must be a number, or one per channel; got \[\]\."),
        ({"mean": [0.1, 0.2], "std": [0.1, 0.2, 0.3]}, r"one number per channel, or one for all; got 2 and 3\."),
        ({"bounds": [0.0, INF]}, r"bounds must be finite.*; got inf\. If inputs have only one limit"),
        ({"bounds": [-INF, 0.0]}, r"bounds must be finite.*; got -inf\."),
        (
            {"bounds": [0.0]},
            r"bounds must be the minimum and the maximum of an input, such as \[0, 1\]; got \[0\.0\]\.",
        ),
        ({"bounds": [1.0, 1.0]}, r"got \[1\.0, 1\.0\]\."),
    ],
)
def test_numbers_out_of_range(make: Any, arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**arguments)


@pytest.mark.parametrize("make", BOTH)
def test_one_number_for_all_channels_beside_one_each(make: Any) -> None:
    make(mean=[0.1, 0.2, 0.3], std=[0.5])
    make(mean=[0.1], std=[0.5, 0.6, 0.7], bounds=[0.0, 1e30])


@pytest.mark.parametrize("attack", [pgd, fgsm])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"step_size": INF}, r"step_size must be finite and at least 0; got inf\."),
        ({"mean": [math.nan], "std": [1.0]}, r"mean must be finite; got \[nan\]\."),
        ({"mean": [0.0], "std": [0.0]}, r"std must be finite and above 0; got \[0\.0\]\."),
        ({"mean": [0.0], "std": [INF]}, r"std must be finite and above 0; got \[inf\]\."),
        (
            {"bounds": (1.0, 0.0)},
            r"bounds must be the smallest and the largest value of an input; got \(1\.0, 0\.0\)\.",
        ),
        ({"bounds": (0.0, math.nan)}, r"bounds must be"),
    ],
)
def test_functions_refuse_them_too(attack: Any, arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attack(lambda x: x.sum(), torch.zeros(1, 2), 0.1, **arguments)


def test_only_what_is_supported_is_changed() -> None:
    x, support = torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    for norm in ("linf", "l2"):
        for attack in (pgd, fgsm):
            moved = attack(lambda x: x.square().sum() + x.sum(), x, 0.5, norm=norm, support=support)
            assert torch.equal(moved != 0, support != 0)
            reach = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
            assert (reach <= 0.5 * (1 + 1e-6)).all()


# Runs without anything to attack.

NOTHING = "AdversarialEvaluation attacks validation batches, but this fit has no validation"


def fit_without(**arguments: Any) -> tuple[Any, list[str]]:
    """Return the trainer and what was warned of before the first batch."""
    early: list[str] = []
    trainer = make_trainer(callbacks=[AdversarialEvaluation(0.1, steps=1)], **{"max_epochs": 2, **arguments})
    module = make_classifier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.on_train_batch_start = lambda *args: early or early.extend(str(each.message) for each in caught)
        train, validation = loaders()
        trainer.fit(module, train, validation if arguments.get("limit_val_batches") != "none" else None)
    assert sum(NOTHING in str(each.message) for each in caught) <= 1, "said once"
    return trainer, [str(each.message) for each in caught if NOTHING in str(each.message)], early


@pytest.mark.parametrize(
    "arguments",
    [
        {"limit_val_batches": 0},
        {"check_val_every_n_epoch": 3},
        {"check_val_every_n_epoch": 3, "num_sanity_val_steps": 0},
    ],
    ids=["limit", "epochs", "epochs without a sanity check"],
)
def test_a_fit_without_validations_says_so_before_the_first_batch(arguments: Any) -> None:
    _, said, early = fit_without(**arguments)
    assert len(said) == 1
    assert any(NOTHING in each for each in early)
    assert "trainer.validate() or trainer.test()" in said[0]


def test_a_fit_without_a_loader_says_so_and_a_test_after_it_is_attacked() -> None:
    trainer = make_trainer(callbacks=[AdversarialEvaluation(0.1, steps=1)], max_epochs=1)
    module = make_classifier()
    train, validation = loaders()
    with pytest.warns(UserWarning, match=NOTHING):
        trainer.fit(module, train)
    trainer.validate(module, validation, verbose=False)
    assert "adversarial/val_loss" in trainer.callback_metrics


def test_a_fit_that_ends_before_its_first_validation_says_so() -> None:
    _, said, early = fit_without(max_steps=2, max_epochs=-1, num_sanity_val_steps=0)
    assert len(said) == 1
    assert not any(NOTHING in each for each in early), "nobody could have known"


@pytest.mark.parametrize("arguments", [{}, {"check_val_every_n_epoch": 2}, {"max_epochs": -1, "max_steps": 6}])
def test_a_fit_with_a_validation_does_not(arguments: Any) -> None:
    assert not fit_without(**arguments)[1]


# The line at the start.


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (
            lambda: AdversarialTraining(0.1),
            "AdversarialTraining trains on inputs attacked by FGSM (1 step, epsilon 0.1 in linf).",
        ),
        (
            lambda: AdversarialTraining(0.5, "pgd", norm="l2", name="a"),
            "AdversarialTraining[a] trains on inputs attacked by PGD (7 steps, epsilon 0.5 in l2).",
        ),
        (lambda: AdversarialTraining(0.0), "AdversarialTraining trains on unchanged inputs, because epsilon is 0."),
        (
            lambda: AdversarialEvaluation(0.1, steps=2),
            "AdversarialEvaluation runs each validation a second time on inputs attacked by PGD (2 steps, epsilon 0.1 in "
            "linf).",
        ),
        (
            lambda: AdversarialEvaluation(0.1, steps=1, every_n_validations=3),
            "AdversarialEvaluation runs one of every 3 validations a second time on inputs attacked by PGD (1 step, epsilon "
            "0.1 in linf).",
        ),
    ],
)
def test_a_line_says_what_is_attacked(callback: Any, said: str, told: list[str]) -> None:
    fit([callback()], max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    assert told == [said]


# Settings that change on resume.


def resumed(make: Any, first: Any, then: Any, folder: Path) -> tuple[Any, Any]:
    """Fit two epochs with one setting and two with the other, and return the trainer and the module."""
    keep = ModelCheckpoint(folder, filename="kept", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)
    fit([make(**first), keep], max_epochs=2)
    ckpt = sorted(folder.glob("kept*.ckpt"), key=lambda path: path.stat().st_mtime)[-1]
    return fit([make(**then)], make_classifier(), ckpt=ckpt)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_changed_settings_of_the_training_are_followed_and_said(tmp_path: Path, told: list[str]) -> None:
    first, then = {"epsilon": 0.1}, {"epsilon": 0.4, "attack": "pgd", "steps": 2, "mean": [0.0], "std": 1.0}
    _, module = resumed(AdversarialTraining, first, then, tmp_path)
    line = next(each for each in told if "resumes with changed settings" in each)
    assert line.startswith(
        "AdversarialTraining resumes with changed settings: epsilon=0.4 (was 0.1), attack='pgd' (was 'fgsm')"
    )
    # Without a state of its own it does what a callback does that is new to the run.
    fresh = AdversarialTraining(**then, name="fresh")
    ckpt = sorted(tmp_path.glob("kept*.ckpt"), key=lambda path: path.stat().st_mtime)[-1]
    _, other = fit([fresh], make_classifier(), ckpt=ckpt)
    assert_identical(dict(module.state_dict()), dict(other.state_dict()))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_changed_settings_of_the_evaluation_are_followed_and_said(tmp_path: Path, told: list[str]) -> None:
    first = {"epsilon": 0.1, "steps": 1, "every_n_validations": 5}
    then = {**first, "epsilon": 0.0, "every_n_validations": 3}
    trainer, _ = resumed(AdversarialEvaluation, first, then, tmp_path)
    assert (
        "AdversarialEvaluation resumes with changed settings: epsilon=0.0 (was 0.1), every_n_validations=3 (was 5)."
        in told
    )
    # Validations 0 and 3 of the run are attacked; the last is number 3, with an epsilon of 0.
    metrics = trainer.callback_metrics
    assert torch.equal(metrics["adversarial/val_loss"], metrics["val_loss"])
