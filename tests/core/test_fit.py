"""Attributes live for one fit, and no copy carries what belongs to it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from typing_extensions import override

from lightning_grad.core.callback import GradCallback
from lightning_grad.core.fit import FitScope, during_fit, until_next_fit


class Owner(FitScope):
    live = during_fit.of(list[int])
    lasting = until_next_fit.of(list[int])
    given = during_fit[int]()

    def __init__(self) -> None:
        self.setting = 1

    @during_fit
    def made(self) -> list[int]:
        """What is made of a setting."""
        return [self.setting]


def test_each_owner_has_its_own() -> None:
    one, other = Owner(), Owner()
    one.live.append(1)
    one.lasting.append(2)
    assert (one.live, one.lasting, other.live, other.lasting) == ([1], [2], [], [])


def test_it_is_made_when_it_is_first_read_and_then_kept() -> None:
    owner = Owner()
    owner.setting = 5
    assert owner.made is owner.made
    owner.setting = 6
    assert owner.made == [5]
    owner.end_fit()
    assert owner.made == [6]
    assert Owner.made.__doc__ == "What is made of a setting."


def test_what_must_be_set_says_so() -> None:
    owner = Owner()
    assert not hasattr(owner, "given")
    with pytest.raises(AttributeError, match=r"Owner\.given exists only during a fit"):
        _ = owner.given
    owner.given = 3
    assert owner.given == 3
    owner.end_fit()
    assert not hasattr(owner, "given")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda owner: pickle.loads(pickle.dumps(owner))])
def test_a_copy_has_what_lasts_only(copied: Callable[[Owner], Owner]) -> None:
    owner = Owner()
    owner.live.append(1)
    owner.lasting.append(2)
    twin = copied(owner)
    assert (twin.live, twin.lasting, twin.setting) == ([], [2], 1)
    twin.live.append(3)
    assert owner.live == [1]


class Telling(GradCallback):
    namespace = "test"
    batches = during_fit.of(int)
    total = until_next_fit.of(int)

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        self.total += 1
        if self.fails and self.total == 2:
            raise KeyError("on purpose")


class Later(pl.Callback):
    """Reads in ``on_exception``, where checkpoint callbacks save, and stands behind."""

    def __init__(self, telling: Telling) -> None:
        self.telling = telling
        self.seen: list[tuple[int, bool]] = []

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.seen.append((self.telling.batches, self.telling.fitting))


def run(callbacks: list[pl.Callback], batches: int = 3) -> None:
    pl.Trainer(
        max_epochs=1,
        limit_train_batches=batches,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    ).fit(BoringModel())


def test_a_fit_begins_and_ends_it() -> None:
    telling = Telling()
    run([telling])
    assert (telling.batches, telling.total, telling.fitting) == (0, 3, False)
    run([telling], batches=2)
    assert telling.total == 2


def test_what_others_save_after_an_exception_is_there_and_goes_then() -> None:
    telling = Telling(fails=True)
    later = Later(telling)
    with pytest.raises(KeyError, match="on purpose"):
        run([telling, later])
    assert later.seen == [(2, True)]
    assert (telling.batches, telling.total, telling.fitting) == (0, 2, False)
