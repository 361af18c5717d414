"""G5: what resuming keeps beyond what one callback alone is held to."""

import copy
from typing import Any

import pytest
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_grad.testing import assert_identical, fit, make_classifier, state_of
from tests.contract.recorded import bare, broken, run, subject_of, watched
from tests.contract.settings import BROAD, CANONICAL, build_together

# These runs monitor val_loss from the first epoch on, which the technique may rightly warn about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the best checkpoint"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


def _finish(callbacks: list[Any], **arguments: Any) -> dict[str, Any]:
    """Return all that a resumed run must have."""
    trainer, module = fit(callbacks, make_classifier(), resumable=True, **arguments)
    states = [callback.state_dict() for callback in callbacks if hasattr(callback, "settings")]
    return _apart_from_validations({**state_of(trainer, module), "steps": trainer.global_step, "callbacks": states})


def _paths(folder: Any) -> list[Any]:
    return sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("step=")[1]))


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_an_on_exception_checkpoint_holds_what_save_on_exception_does(technique: Any) -> None:
    key = technique.build().state_key
    saved = [dict(broken(technique).saved[name]) for name in ("on_exception", "full")]
    for checkpoint in saved:
        checkpoint["callbacks"] = checkpoint["callbacks"].get(key)  # the savers have states of their own
    assert_identical(*saved)


def _apart_from_validations(left: dict[str, Any]) -> dict[str, Any]:
    """Drop the validation that Lightning skips when it resumes behind the last batch of an epoch, and random states."""
    left = copy.deepcopy({key: value for key, value in left.items() if key != "random"})
    for own in left["callbacks"]:
        own.get("record", {}).pop("validations", None), own.pop("validations", None)
    return left


@pytest.mark.parametrize("technique", [None, *CANONICAL], ids=str)
def test_a_run_resumes_from_an_exception_at_the_last_batch_of_an_epoch(technique: Any) -> None:
    whole = bare(technique)
    resumed = subject_of(technique).continued((min(watched(technique).saved("epochs")),))
    assert_identical(_apart_from_validations(whole.left), _apart_from_validations(resumed.left))


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_a_run_that_resumes_behind_its_last_step_keeps_what_it_left(technique: Any) -> None:
    whole = watched(technique)
    resumed = run([technique.build()], ckpt=whole.saved("epochs")[whole.left["steps"]])
    assert_identical(_apart_from_validations(whole.left), _apart_from_validations(resumed.left))


@pytest.mark.parametrize("technique", [t for t in BROAD if t.name == "NMSparsity"], ids=str)
@pytest.mark.parametrize("ema_first", [False, True])
def test_resume_beside_weight_averaging(technique, ema_first, tmp_path):
    def pair() -> list[Any]:
        both = [technique.build(), EMAWeightAveraging(decay=0.8)]
        return both[::-1] if ema_first else both

    expected = _finish([*pair(), ModelCheckpoint(tmp_path, save_top_k=-1, monitor="val_loss")])
    for path in _paths(tmp_path)[:-1]:  # a fit with nothing left to do never lets Lightning put the average in place
        assert_identical(expected, _finish(pair(), ckpt=path), path.name)


def test_resume_of_several_techniques_together(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=5)
    expected = _finish([*build_together(), saving])
    for path in _paths(tmp_path):
        assert_identical(expected, _finish(build_together(), ckpt=path), path.name)
