"""G5: stop anywhere, resume, and get bitwise the uninterrupted run."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_grad.testing import StopAfter, assert_identical, fit, make_classifier, state_of
from tests.contract.recorded import bare, built, reused, run, watched
from tests.contract.settings import BROAD, CANONICAL, TECHNIQUES, build_together

# These runs monitor val_loss from the first epoch on, which the technique may rightly warn about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the best checkpoint"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


def _finish(callbacks: list[Any], **arguments: Any) -> dict[str, Any]:
    trainer, module = fit(callbacks, make_classifier(), resumable=True, **arguments)
    state = state_of(trainer, module)
    state["steps"] = trainer.global_step
    state["callbacks"] = [callback.state_dict() for callback in callbacks if hasattr(callback, "settings")]
    return _comparable(state)


def _comparable(left: dict[str, Any]) -> dict[str, Any]:
    """Drop what no resume can have: random states, the gradient before its first step, a validation that Lightning skips."""
    state = copy.deepcopy({key: value for key, value in left.items() if key != "random"})
    for callback in state["callbacks"]:
        callback.get("record", {}).pop("validations", None), callback.pop("validations", None)
        for row in callback.get("record", {}).get("rows", []):
            row.pop("gradient_variance_kept", None), row.pop("gradient_variance_pruned", None)
    return state


def _paths(folder: Any) -> list[Any]:
    return sorted(folder.glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"])


def _assert_resumes(technique: Any, accumulate: int, kind: str, chosen: slice) -> None:
    """Resume from some checkpoints of the watched run, and compare with its end."""
    whole = watched(technique, accumulate)
    for path in list(whole.saved(kind).values())[chosen]:
        resumed = run(built(technique), ckpt=path, resumable=True, accumulate_grad_batches=accumulate)
        assert_identical(_comparable(whole.left), _comparable(resumed.left), str(path))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_run_without_a_technique_resumes_bitwise(accumulate):
    """The premise: these loaders and modules make Lightning itself exact, also in mid-epoch."""
    _assert_resumes(None, accumulate, "steps", slice(1, -1, 3))


@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_looking_and_saving_change_nothing(technique):
    """What is read off the watched run below, and in other files, holds of the run that nobody watches."""
    assert_identical(bare(technique).left, watched(technique).left)


@pytest.mark.parametrize(
    ("technique", "accumulate"), [*((t, 1) for t in TECHNIQUES), *((t, 2) for t in CANONICAL)], ids=str
)
def test_resume_at_any_saved_step(technique, accumulate):
    """Within each epoch; another variant of a mechanism within the first and the third."""
    whole = watched(technique, accumulate)
    assert list(whole.saved("steps")) == list(range(2, whole.left["steps"] + 1, 2))
    _assert_resumes(technique, accumulate, "steps", slice(1, -1, 3 if technique in CANONICAL else 6))


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_resume_at_an_epochs_end(technique):
    assert len(watched(technique).saved("epochs")) == 4
    _assert_resumes(technique, 1, "epochs", slice(None))


def _stop_and_go_on(technique: Any, steps: Any, folder: Any) -> dict[str, Any]:
    """Break off at one step after the other, resume from what that saved each time, and return what the last run left."""
    path: Any = None
    for step in steps:
        saving = ModelCheckpoint(folder, str(step), save_on_exception=True, every_n_epochs=100)
        with pytest.raises(RuntimeError, match="on purpose"):
            fit([*built(technique), StopAfter(step), saving], resumable=True, ckpt=path)
        path = folder / f"{step}.ckpt"
    return _comparable(run(built(technique), resumable=True, ckpt=path).left)


@pytest.mark.parametrize("steps", [(3, 14), (6,)], ids=str)
def test_the_run_without_a_technique_resumes_from_an_exception(steps, tmp_path):
    """The premise; a run that goes on from step 6, an epoch's end, and breaks off again is not exact by itself."""
    assert_identical(_comparable(bare(None).left), _stop_and_go_on(None, steps, tmp_path))


@pytest.mark.parametrize(
    ("technique", "steps"),
    [*((t, (3, 14) if t in CANONICAL else (14,)) for t in TECHNIQUES), *((t, (6,)) for t in CANONICAL)],
    ids=str,
)
def test_resume_from_an_exception(technique, steps, tmp_path):
    assert_identical(_comparable(bare(technique).left), _stop_and_go_on(technique, steps, tmp_path))


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_an_on_exception_checkpoint_holds_what_save_on_exception_does(technique):
    one, other = (dict(reused(technique).saved[name]) for name in ("on_exception", "full"))
    key = technique.build().state_key
    for checkpoint in (one, other):
        checkpoint["callbacks"] = checkpoint["callbacks"].get(key)  # the savers have states of their own
    assert_identical(one, other)


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


def _half_way(technique: Any) -> Any:
    return list(watched(technique).saved("epochs").values())[1]


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_a_checkpoint_of_a_run_without_the_technique_is_accepted(technique):
    trainer, _ = fit([technique.build()], ckpt=_half_way(None))
    assert trainer.current_epoch == 4


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_a_run_without_the_technique_accepts_its_checkpoint(technique):
    trainer, _ = fit([], ckpt=_half_way(technique))
    assert trainer.current_epoch == 4


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_validating_a_checkpoint_leaves_the_next_fit_alone(technique):
    assert_identical(bare(technique).weights, reused(technique).after_a_validation.weights)
