"""The environment variable that turns techniques off: bitwise the plain run, whatever they are."""

import csv
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_grad.callbacks import NMSparsity, ZClip
from lightning_grad.core import GradCallback
from lightning_grad.core.switch import VARIABLE
from lightning_grad.testing import StopAt, assert_identical, fit, loaders, make_classifier, make_trainer, on_ranks
from lightning_grad.testing.checks.trained import replaces_optimizers
from lightning_grad.testing.runs import Run
from tests.contract import strategy_settings
from tests.contract.recorded import bare, run, subject, watched
from tests.contract.settings import CANONICAL, Technique, build_together
from tests.strategies.fits import outcome, train_on_ranks


class _FailingSetup:
    def setup(self, *arguments: Any, **keywords: Any) -> None:
        super().setup(*arguments, **keywords)  # type: ignore[misc]
        raise AssertionError("not off")


class Foreign(_FailingSetup, GradCallback):
    """A technique of another package, all of whose hooks fail, one of them in a mixin."""

    on_fit_start = on_train_batch_start = on_train_end = _FailingSetup.setup  # type: ignore[assignment]


class _Off(NamedTuple):
    """A run in which every technique was turned off, and what it wrote."""

    run: Run
    folder: Path
    warned: list[str]
    names: list[str]


def _every_technique() -> list[Any]:
    return [*(technique.build() for technique in CANONICAL), Foreign()]


@pytest.fixture(scope="session")  # tests of single techniques run between those of other modules
def off(tmp_path_factory: pytest.TempPathFactory) -> _Off:
    folder, callbacks = tmp_path_factory.mktemp("off"), _every_technique()
    saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, monitor="val_loss")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        left = run([*callbacks, saving], logger=CSVLogger(folder, "logs", ""))
    assert left.trainer.callbacks[: len(callbacks)] == callbacks, "each is back in its place"
    warned = [text for text in left.warned if VARIABLE in text]
    return _Off(left, folder, warned, [callback.display_name for callback in callbacks])


def _assert_plain(left: Run) -> None:
    assert_identical({**bare(None).left, "callbacks": []}, {**left.left, "callbacks": []})
    assert left.traces == bare(None).traces


def test_the_run_is_bitwise_plain(off: _Off):
    _assert_plain(off.run)
    assert off.warned == [f"{VARIABLE}=1 turns off {', '.join(off.names)}. Unset it to use them again."]


def test_nothing_is_logged_or_written(off: _Off):
    assert {path.name for path in (off.folder / "logs").rglob("*")} == {"metrics.csv"}
    with (off.folder / "logs" / "metrics.csv").open() as file:
        assert set(next(csv.reader(file))) == {"epoch", "step", "train_loss", "val_acc", "val_loss"}
    assert not any("/" in key for key in off.run.trainer.callback_metrics)


def _assert_continues(callbacks: list[Any], path: Path, **arguments: Any) -> None:
    _, module = fit(callbacks, resumable=True, ckpt=path, **arguments)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of the others that are in it
def test_a_run_that_was_off_continues_with_a_technique(off: _Off, technique: Technique):
    if not replaces_optimizers(subject(technique)):
        _assert_continues([technique.build()], off.folder / "step=18.ckpt")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_that_was_off_continues_with_several_techniques(off: _Off, tmp_path: Path):
    assert torch.load(off.folder / "step=18.ckpt", weights_only=True)["callbacks"].keys().isdisjoint(off.names)
    off.run.trainer.save_checkpoint(tmp_path / "by_hand.ckpt")  # with the techniques, which have no state
    _assert_continues(build_together(), tmp_path / "by_hand.ckpt", max_epochs=5)


def test_states_of_techniques_are_ignored(off: _Off, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved = torch.load(watched(None).saved("epochs")[12], weights_only=True)
    saved["callbacks"] = {name: {"settings": {"ratio": 2.0}, "of": "another run"} for name in off.names}
    torch.save(saved, tmp_path / "states.ckpt")
    monkeypatch.setenv(VARIABLE, "1")
    left = run(_every_technique(), ckpt=tmp_path / "states.ckpt")
    assert "turns off" in " ".join(left.warned)
    left.left["random"] = bare(None).left["random"]  # Lightning restores none
    _assert_plain(left)


@pytest.mark.filterwarnings("ignore:.*no last checkpoint available", "ignore:`.fit.ckpt_path=None.` was called without")
def test_exceptions_give_the_technique_back_when_all_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    callbacks = [NMSparsity(**NMSparsity.trial)]
    monkeypatch.setenv(VARIABLE, "NMSparsity")
    trainer = make_trainer(
        callbacks=[*callbacks, StopAt(3), OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True
    )
    with pytest.raises(RuntimeError, match="on purpose"), pytest.warns(UserWarning, match="turns off NMSparsity"):
        trainer.fit(make_classifier(), *loaders())
    assert trainer.callbacks[0] is callbacks[0]
    assert not [name for name in vars(trainer.strategy) if "on_exception" in name]
    (path,) = tmp_path.glob("*.ckpt")
    assert "NMSparsity" not in torch.load(path, weights_only=True)["callbacks"]


class _FailingExit(Callback):
    def on_exception(self, *_: Any) -> None:
        raise ValueError("the others are not told")


def test_a_technique_that_an_exception_left_off_returns(monkeypatch: pytest.MonkeyPatch):
    clipper = ZClip()
    trainer = make_trainer(callbacks=[_FailingExit(), clipper, StopAt(1)], max_epochs=1)
    monkeypatch.setenv(VARIABLE, "1")
    with pytest.raises(ValueError, match="not told"), pytest.warns(UserWarning, match="turns off ZClip"):
        trainer.fit(make_classifier(), *loaders())
    monkeypatch.delenv(VARIABLE)
    later = make_trainer(callbacks=trainer.callbacks[:2], max_epochs=1)
    later.fit(make_classifier(), *loaders())
    assert later.callbacks[1] is clipper
    assert clipper.states()


def test_only_named_classes_are_off(monkeypatch: pytest.MonkeyPatch):
    (clipping,) = [technique for technique in CANONICAL if technique.name == "NormClipping"]
    callbacks = [NMSparsity(**NMSparsity.trial), clipping.build()]
    monkeypatch.setenv(VARIABLE, "NMSparsity, ProbeCallback,")
    left = run(callbacks)
    assert "turns off NMSparsity. " in " ".join(left.warned)
    assert_identical(bare(clipping).weights, left.weights)
    monkeypatch.setenv(VARIABLE, "NMSparsty")
    with pytest.raises(ValueError, match=f"^{VARIABLE} .*got 'NMSparsty'. Did you mean 'NMSparsity'") as error:
        run(callbacks)
    assert "must be '1', 'AccuracyGradientLR', " in str(error.value)
    assert "GradientConditioner" not in str(error.value)
    monkeypatch.setenv(VARIABLE, "0")
    later = run(callbacks)
    with pytest.raises(AssertionError):
        assert_identical(left.weights, later.weights)


def _leave_off(trainer: Any, module: Any) -> None:
    trainer.fit_loop.max_epochs += 1
    trainer.callbacks[:] = [_FailingExit(), StopAt(trainer.global_step + 1)]
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match="not told"):
        trainer.fit(module, *loaders())
    trainer.callbacks.clear()


def _with_and_without() -> list[Any]:
    plain = outcome(*train_on_ranks("ddp"))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        patch.setenv(VARIABLE, "1")
        for scheme in strategy_settings.CANONICAL:
            strategy = scheme.build()
            trainer, module = train_on_ranks(strategy, [Foreign()] if scheme is strategy_settings.CANONICAL[0] else [])
            left = outcome(trainer, module)
            assert trainer.strategy is strategy
            assert left.pop("memory") == {}
            assert left.pop("sent") == [0, 0, 0]
            assert_identical(plain, left)
            assert not any("/" in key for key in trainer.callback_metrics)
        _leave_off(trainer, module)
        patch.delenv(VARIABLE)
        trainer.fit(module, *loaders())
        assert trainer.strategy is strategy
        assert strategy.ledger.steps > 0
    return [str(one.message).split(" turns off ")[1] for one in given if VARIABLE in str(one.message)]


def test_a_strategy_is_plain_ddp():
    first, *others = (scheme.name for scheme in strategy_settings.CANONICAL)
    names = [f"Foreign, {first}", *others]
    assert on_ranks(2, _with_and_without) == [[f"{name}. Unset it to use them again." for name in names], []]
