"""G5: stop anywhere, resume, and get bitwise the uninterrupted run."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint

from lightning_grad.testing import StopAfter, assert_identical, fit, loaders, make_classifier, make_trainer, state_of
from tests.contract.settings import CANONICAL, TECHNIQUES, build_together

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
    state.pop("random")  # Lightning restores no random state
    state["steps"] = trainer.global_step
    state["callbacks"] = [callback.state_dict() for callback in callbacks if hasattr(callback, "settings")]
    return state


def _comparable(state: dict[str, Any]) -> dict[str, Any]:
    """Drop what no resume can have: the gradient before its first step, and a validation that Lightning skips."""
    for callback in state["callbacks"]:
        callback.get("record", {}).pop("validations", None), callback.pop("validations", None)
        for row in callback.get("record", {}).get("rows", []):
            row.pop("gradient_noise_kept", None), row.pop("gradient_noise_pruned", None)
    return state


def _paths(folder: Any) -> list[Any]:
    return sorted(folder.glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_run_without_a_technique_resumes_bitwise(accumulate, tmp_path):
    """The premise: these loaders and modules make Lightning itself exact, also in mid-epoch."""
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=4)
    expected = _finish([saving], accumulate_grad_batches=accumulate)
    for path in _paths(tmp_path):
        assert_identical(expected, _finish([], ckpt=path, accumulate_grad_batches=accumulate), str(path))


@pytest.mark.parametrize(
    ("technique", "accumulate"), [*((t, 1) for t in TECHNIQUES), *((t, 2) for t in CANONICAL)], ids=str
)
def test_resume_at_any_saved_step(technique, accumulate, tmp_path):
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=4)
    expected = _comparable(_finish([technique.build(), saving], accumulate_grad_batches=accumulate))
    paths = _paths(tmp_path)
    assert len(paths) == expected["steps"] // 4
    for path in paths[: -1 if technique.decides else None]:
        resumed = _finish([technique.build()], ckpt=path, accumulate_grad_batches=accumulate)
        assert_identical(expected, _comparable(resumed), path.name)


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_resume_at_an_epochs_end(technique, tmp_path):
    expected = _comparable(_finish([technique.build(), ModelCheckpoint(tmp_path, save_top_k=-1, monitor="val_loss")]))
    for path in _paths(tmp_path):
        assert_identical(expected, _comparable(_finish([technique.build()], ckpt=path)), path.name)


@pytest.mark.parametrize("step", [3, 6, 14])
def test_the_run_without_a_technique_resumes_from_an_exception(step, tmp_path):
    with pytest.raises(RuntimeError):
        fit([StopAfter(step), OnExceptionCheckpoint(tmp_path)], make_classifier(), resumable=True)
    assert_identical(_finish([]), _finish([], ckpt=_paths(tmp_path)[0]))


_UNINTERRUPTED: dict[str, dict[str, Any]] = {}  # what each technique's run ends with


@pytest.mark.parametrize(
    ("technique", "step", "how"),
    [
        *((technique, 14, "OnExceptionCheckpoint") for technique in TECHNIQUES),
        *((technique, step, "save_on_exception") for technique in CANONICAL for step in (3, 6, 14)),
    ],
    ids=str,
)
def test_resume_from_an_exception(technique, step, how, tmp_path):
    if str(technique) not in _UNINTERRUPTED:
        _UNINTERRUPTED[str(technique)] = _comparable(_finish([technique.build()]))
    expected = _UNINTERRUPTED[str(technique)]
    saving = (
        OnExceptionCheckpoint(tmp_path)
        if how == "OnExceptionCheckpoint"
        else ModelCheckpoint(tmp_path, save_on_exception=True, every_n_epochs=100)
    )
    with pytest.raises(RuntimeError):
        fit([technique.build(), StopAfter(step), saving], make_classifier(), resumable=True)
    (path,) = _paths(tmp_path)
    assert_identical(expected, _comparable(_finish([technique.build()], ckpt=path)))


@pytest.mark.parametrize("technique", [TECHNIQUES[0], TECHNIQUES[1], TECHNIQUES[8]], ids=str)
@pytest.mark.parametrize("ema_first", [False, True])
def test_resume_beside_weight_averaging(technique, ema_first, tmp_path):
    def pair() -> list[Any]:
        both = [technique.build(), EMAWeightAveraging(decay=0.8)]
        return both[::-1] if ema_first else both

    expected = _comparable(_finish([*pair(), ModelCheckpoint(tmp_path, save_top_k=-1, monitor="val_loss")]))
    for path in _paths(tmp_path)[:-1]:  # a fit with nothing left to do never lets Lightning put the average in place
        assert_identical(expected, _comparable(_finish(pair(), ckpt=path)), path.name)


def test_resume_of_several_techniques_together(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=5)
    expected = _comparable(_finish([*build_together(), saving]))
    for path in _paths(tmp_path):
        assert_identical(expected, _comparable(_finish(build_together(), ckpt=path)), path.name)


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_a_checkpoint_of_a_run_without_the_technique_is_accepted(technique, tmp_path):
    fit([ModelCheckpoint(tmp_path, save_top_k=-1, monitor="val_loss")])
    trainer, _ = fit([technique.build()], ckpt=_paths(tmp_path)[0])
    assert trainer.current_epoch == 4


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_a_run_without_the_technique_accepts_its_checkpoint(technique, tmp_path):
    fit([technique.build(), ModelCheckpoint(tmp_path, save_top_k=-1, monitor="val_loss")])
    trainer, _ = fit([], ckpt=_paths(tmp_path)[0])
    assert trainer.current_epoch == 4


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_validating_a_checkpoint_leaves_the_next_fit_alone(technique, tmp_path):
    callback = technique.build()
    trainer, module = fit([callback, ModelCheckpoint(tmp_path, monitor="val_loss")])
    trainer.validate(module, loaders()[1], ckpt_path=_paths(tmp_path)[-1], verbose=False)
    again, fresh = make_classifier(), make_trainer(callbacks=[callback])
    fresh.fit(again, *loaders())
    _, expected = fit([technique.build()])
    for key, value in expected.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
