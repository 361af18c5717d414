"""G1 and G2 of strategies: an unmodified module, and at the neutral setting plain DDP bit for bit."""

import inspect
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_grad import strategies
from lightning_grad.testing import assert_identical, on_ranks, state_of
from tests.contract.strategy_settings import CANONICAL, SCHEMES, Scheme
from tests.strategies.fits import outcome, train_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*has nothing to compress and is plain DDP")


def test_every_exported_strategy_has_an_entry():
    exported = {name for name in strategies.__all__ if not inspect.isabstract(getattr(strategies, name))}
    assert exported == {scheme.name for scheme in SCHEMES} == {scheme.name for scheme in CANONICAL}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_entry_is_neutral_or_says_why_not(scheme):
    assert scheme.neutral


def _run(strategy: Any, scheme: Scheme, folder: Any, **arguments: Any) -> dict[str, Any]:
    saving = ModelCheckpoint(folder, save_top_k=-1, monitor="val_loss")
    trainer, module = train_on_ranks(strategy, [saving], scheme.module(), **arguments)
    metrics = {key: value for key, value in trainer.callback_metrics.items() if not key.startswith("comm/")}
    checkpoints = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.ckpt"))]
    keys = [[*checkpoint, *checkpoint["state_dict"]] for checkpoint in checkpoints]
    random = state_of(trainer, module)["random"]
    files = sorted(path.name for path in folder.rglob("*"))
    own = [key for key in trainer.callback_metrics if key.startswith("comm/")]
    return {
        "metrics": metrics,
        "keys": keys,
        "random": random,
        "files": files,
        "own": own,
        "left": outcome(trainer, module),
    }


_PLAIN: dict[tuple[str, int], Any] = {}  # on a rank, for the cases that it runs


def _compare(scheme: Scheme, accumulate: int, folder: Path) -> tuple[Any, Any, Any]:
    arguments, kind = {"accumulate_grad_batches": accumulate}, (scheme.optimizer, accumulate)
    if kind not in _PLAIN:
        _PLAIN[kind] = _run("ddp", scheme, folder / "plain", **arguments)
    neutral = _run(scheme.build_neutral(), scheme, folder / "neutral", **arguments)
    changed = _run(scheme.build(), scheme, folder / "changed", **arguments)
    assert neutral["left"].pop("memory") == {}
    assert neutral["left"].pop("sent") == [0, 0, 0]
    return _PLAIN[kind], neutral, changed


COMPARED = list(itertools.product([scheme for scheme in SCHEMES if scheme.has_neutral], [1, 3]))


@pytest.mark.parametrize("case", COMPARED)
def test_neutral_setting_is_bitwise_ddp(case, together):
    by_rank, _ = together(_compare, COMPARED, case)
    for plain, neutral, changed in by_rank:
        assert_identical(plain, neutral)
        assert changed["own"], "the technique itself logs what it sends"
        assert_identical(plain["random"], changed["random"])
        assert plain["left"]["steps"] == changed["left"]["steps"]
        with pytest.raises(AssertionError):
            assert_identical(plain["left"]["module"], changed["left"]["module"])
        assert [[key for key in keys if key != "lightning_grad_ranks"] for keys in changed["keys"]] == plain["keys"]
    first, second = (changed["left"]["module"] for _, _, changed in by_rank)
    for name, _ in case[0].module().named_parameters():
        assert torch.equal(first[name], second[name]), f"{name} is not the same on both ranks"


def _warnings_of(strategy: Any, scheme: Scheme) -> set[str]:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        train_on_ranks(strategy, (), scheme.module(), max_epochs=1)
    return {str(warning.message) for warning in given}


def _warnings_beside_ddp(scheme: Scheme) -> set[str]:
    return _warnings_of(scheme.build(), scheme) - _warnings_of("ddp", scheme)


@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_nobody_is_warned_of_what_ddp_does_not_warn_of(scheme):
    assert on_ranks(1, _warnings_beside_ddp, scheme) == [set()]
