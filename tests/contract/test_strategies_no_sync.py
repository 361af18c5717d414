"""G7 of strategies: between two log steps nothing of theirs makes the host wait for the device."""

from typing import Any

import pytest
import torch

from lightning_grad.strategies._split_groups import SplitGroups
from lightning_grad.testing import guarded, on_ranks
from tests.contract.strategy_settings import SCHEMES, Scheme
from tests.strategies.fits import train_on_ranks

_EXACT = [scheme for scheme in SCHEMES if not scheme.syncs]


def _guard(cls: type, name: str, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cls, name, guarded(getattr(cls, name), seen, name))


def _guarded_fit(scheme: Scheme) -> list[str]:
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("register_step_pre_hook", "register_step_post_hook"):
            original = getattr(torch.optim.Optimizer, name)

            def register(self: Any, hook: Any, original: Any = original, name: str = name) -> Any:
                return original(self, guarded(hook, seen, name))

            monkeypatch.setattr(torch.optim.Optimizer, name, register)
        strategy = scheme.build()
        _guard(type(strategy), "_exchange", seen, monkeypatch)
        _guard(type(strategy), "_log_step", seen, monkeypatch)
        _guard(SplitGroups, "_take", seen, monkeypatch)
        train_on_ranks(strategy, (), scheme.module(), log_every_n_steps=10_000)
    return seen


@pytest.mark.parametrize("scheme", _EXACT, ids=str)
def test_exchange_and_hooks_of_a_step_do_not_wait(scheme):
    (seen,) = on_ranks(1, _guarded_fit, scheme)
    assert 0 < seen.count("_exchange") <= 18 if scheme.is_local else seen.count("_exchange") == 18
    if scheme.name == "OneBitAdamStrategy" or (scheme.optimizer == "sgd" and scheme.name == "DGCStrategy"):
        assert seen.count("_take") == 18
        assert seen.count("register_step_pre_hook") == seen.count("register_step_post_hook") == 18


def _waits(scheme: Scheme) -> None:
    with pytest.raises(AssertionError, match="waits for the device"):
        _guarded_fit(scheme)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.syncs], ids=str)
def test_what_waits_says_so(scheme):
    """Also that the guard sees the waiting of a sampled threshold."""
    assert len(scheme.syncs) > 20
    assert "waits for the device" in " ".join(type(scheme.build()).__doc__.split())
    on_ranks(1, _waits, scheme)
