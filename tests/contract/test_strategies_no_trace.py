"""G3 of strategies: after a fit, an exception or Ctrl-C nothing is left on the module, the optimizer or the trainer."""

import copy
import itertools
import pickle
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy

from lightning_grad.testing import (
    StopAt,
    StopIn,
    assert_identical,
    loaders,
    make_trainer,
    on_ranks,
    optimizer_traces,
    traces,
    trainer_traces,
)
from tests.contract.strategy_settings import BROAD, CANONICAL, SCHEMES, Scheme
from tests.strategies.fits import outcome, train_on_ranks

_ENDS = ("success", "exception", "interrupt", "before the update", "in the update")


def _fit_and_end(strategy: Any, scheme: Scheme, how: str) -> tuple[Any, Any]:
    module = scheme.module()
    if how == "success":
        return train_on_ranks(strategy, [], module)
    stop: list[Any] = [StopAt(5, KeyboardInterrupt if how == "interrupt" else RuntimeError)]
    if how == "before the update":
        stop = [StopIn("on_before_optimizer_step", 5)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        if how == "in the update":
            stop = []
            kind = torch.optim.SGD if scheme.optimizer == "sgd" else torch.optim.Adam
            monkeypatch.setattr(sys.modules[kind.__module__], kind.__name__.lower(), _raise)
        with pytest.raises(SystemExit if how == "interrupt" else RuntimeError):
            train_on_ranks(strategy, stop, module)
    return module._trainer, module


def _raise(*_: Any, **__: Any) -> None:
    raise RuntimeError("stopped on purpose")


def _trainer_keys(trainer: Any) -> Any:
    strategy = trainer.strategy
    return sorted(vars(trainer)), type(strategy.model), strategy.lightning_module is not None, trainer.callbacks


class _Unwrapped(DDPStrategy):
    """Wraps no DDP around the module, like strategies with local steps: of a DDP, Lightning leaves an attribute behind."""

    def configure_ddp(self) -> None:
        pass


def _plain_strategy(scheme: Scheme) -> Any:
    return _Unwrapped() if scheme.is_local else "ddp"


_PLAIN: dict[tuple[str, str, bool], tuple[Any, Any]] = {}  # on a rank, for the cases that it runs


def _look(scheme: Scheme, how: str, folder: Path) -> None:
    kind = (scheme.optimizer, how, scheme.is_local)
    if kind not in _PLAIN:
        _PLAIN[kind] = _fit_and_end(_plain_strategy(scheme), scheme, how)
    plain_trainer, plain = _PLAIN[kind]
    trainer, module = _fit_and_end(scheme.build(), scheme, how)
    assert traces(module) == traces(plain)
    assert trainer_traces(trainer) == trainer_traces(plain_trainer)
    assert optimizer_traces(trainer.optimizers[0]) == optimizer_traces(plain_trainer.optimizers[0])
    assert _trainer_keys(trainer)[:2] == _trainer_keys(plain_trainer)[:2]
    parameters = [parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    module._trainer = None
    for twin in (pickle.loads(pickle.dumps(module.encoder)), copy.deepcopy(module.encoder)):
        assert_identical(dict(twin.state_dict()), dict(module.encoder.state_dict()))
    optimizer = copy.deepcopy(trainer.optimizers[0])
    assert len(pickle.dumps(optimizer)) > 0


ENDED = list(itertools.product(BROAD, _ENDS))


@pytest.mark.parametrize("case", ENDED)
@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
def test_nothing_is_left(case, together):
    together(_look, ENDED, case)


def _fit_again(trainer: Any, scheme: Scheme) -> dict[str, Any]:
    """Fit a new module with the same Trainer, from its first epoch on."""
    module, loop = scheme.module(), trainer.fit_loop
    trainer.fit_loop = type(loop)(trainer, max_epochs=loop.max_epochs)
    trainer.should_stop = False
    trainer.fit(module, *loaders())
    return outcome(trainer, module)


def _fit_twice(scheme: Scheme, folder: Path) -> None:
    strategy = scheme.build()
    trainer, module = train_on_ranks(strategy, (), scheme.module(), resumable=False)
    expected = outcome(trainer, module)
    assert expected["memory"]
    assert_identical(expected, _fit_again(trainer, scheme), "the second fit")
    trainer.callbacks.append(StopIn("on_before_optimizer_step", 5))
    with pytest.raises(RuntimeError, match="on purpose"):
        _fit_again(trainer, scheme)
    trainer.callbacks.pop()
    assert_identical(expected, _fit_again(trainer, scheme), "the fit after an exception")
    assert trainer.strategy is strategy


EACH = [(scheme,) for scheme in BROAD]


@pytest.mark.parametrize("case", EACH)
def test_a_second_fit_works(case, together):
    together(_fit_twice, EACH, case)


def _fit_after_a_failed_save(scheme: Scheme) -> None:
    module, stop = scheme.module(), StopIn("on_before_optimizer_step", 5)
    stop.on_exception = (
        _raise  # as a checkpoint callback does on a full disk: the strategy's on_exception is not called
    )
    with pytest.raises(RuntimeError, match="on purpose"):
        train_on_ranks(scheme.build(), [stop], module)
    trainer, optimizer = module._trainer, module._trainer.optimizers[0]
    trainer.callbacks.remove(stop)
    _fit_again(trainer, scheme)
    plain_trainer, plain = train_on_ranks(_plain_strategy(scheme), [], scheme.module())
    assert traces(module) == traces(plain)
    assert optimizer_traces(optimizer)[:3] == optimizer_traces(plain_trainer.optimizers[0])[:3]


def test_a_later_fit_cleans_up_after_one_whose_callback_failed_to_save():
    for scheme in BROAD:
        on_ranks(1, _fit_after_a_failed_save, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_strategy_pickles_and_copies_before_a_fit(scheme):
    strategy = scheme.build()
    for twin in (pickle.loads(pickle.dumps(strategy)), copy.deepcopy(strategy)):
        assert twin.settings == strategy.settings


def test_ranks_started_by_lightning_with_spawn():
    """The slow way, once, and for one rank, as a new interpreter takes seconds: everything is pickled into it."""
    found = _boring_weights(_boring_strategy("spawn"))
    (weights,) = on_ranks(1, lambda: _boring_weights(_boring_strategy("popen")))
    assert_identical(weights, found)


def _boring_strategy(start: str) -> Any:
    return CANONICAL[0].build(start_method=start, min_numel=1)


def _boring_weights(strategy: Any) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    module = BoringModel()
    make_trainer(strategy=strategy, devices=1, max_epochs=1, limit_train_batches=3, limit_val_batches=0).fit(module)
    return dict(module.state_dict())
