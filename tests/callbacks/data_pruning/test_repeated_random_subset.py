"""Repeated random subsets show every sample once before any is shown twice, in a resumed run too."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lightning_grad.callbacks import RepeatedRandomSubset
from tests.callbacks.data_pruning.test_data_pruning import Manual, make_data, train


def epochs_of(callback: Any, **arguments: Any) -> list[list[int]]:
    return train(callback, **{"epochs": 6, **arguments}).watch.epochs


@pytest.mark.parametrize(("samples", "prune", "size"), [(24, 0.5, 12), (24, 0.75, 6), (20, 0.7, 6), (21, 0.4, 13)])
def test_every_sample_comes_once_before_any_comes_twice(samples: int, prune: float, size: int) -> None:
    epochs = epochs_of(RepeatedRandomSubset(prune), dataset=make_data(samples))
    counts: Counter[int] = Counter()
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == size
        counts.update(epoch)
        often = [counts[index] for index in range(samples)]
        assert max(often) - min(often) <= 1


def test_all_by_prune_0() -> None:
    for epoch in epochs_of(RepeatedRandomSubset(0.0), epochs=2):
        assert sorted(epoch) == list(range(22))


def test_seeds_choose_differently() -> None:
    first, again, other = ([sorted(e) for e in epochs_of(RepeatedRandomSubset(0.5, seed=s))] for s in (0, 0, 1))
    assert first == again != other


def test_with_replacement_epochs_are_independent() -> None:
    epochs = epochs_of(RepeatedRandomSubset(0.5, replacement=True), dataset=make_data(24), epochs=8)
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 12
    together = [len({*one, *other}) for one, other in zip(epochs[::2], epochs[1::2], strict=True)]
    assert min(together) < 24


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_has_the_same_subsets(stop: int, tmp_path: Path) -> None:
    whole = [sorted(epoch) for epoch in epochs_of(RepeatedRandomSubset(0.4))]
    train(RepeatedRandomSubset(0.4), epochs=stop).trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = epochs_of(RepeatedRandomSubset(0.4), ckpt=tmp_path / "run.ckpt")
    assert [sorted(epoch) for epoch in resumed] == whole[stop:]


def test_manual_optimization() -> None:
    assert [len(epoch) for epoch in epochs_of(RepeatedRandomSubset(0.5), module=Manual(), epochs=2)] == [11, 11]
