"""Runs that resume under other settings: they are followed at once or from the next epoch on, or refused with a way out."""

import ast
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_grad.callbacks import (
    DataPruning,
    InfoBatch,
    LossReweighting,
    RepeatedRandomSubset,
    UniformLearning,
)
from lightning_grad.testing import BATCH, BATCHES, assert_identical, fit, make_classifier, state_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:.*keeps only the hardest"
)
TOTAL = BATCH * BATCHES


class Note(pl.Callback):
    """Notes what is kept, and how long an epoch is, when its first batch and when its last has been trained on."""

    def __init__(self, technique: Any, stop: int | None = None) -> None:
        self.technique, self.stop = technique, stop
        self.kept: dict[int, Tensor | None] = {}
        self.batches: dict[int, int] = {}
        self.scored: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        epoch = trainer.current_epoch
        self.batches[epoch] = self.batches.get(epoch, 0) + 1
        self.kept[epoch] = getattr(self.technique, "kept", None)
        self.scored[epoch] = getattr(self.technique, "scored", None)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.stop

    def sizes(self) -> dict[int, int]:
        return {epoch: TOTAL if kept is None else len(kept) for epoch, kept in self.kept.items()}


def run(
    technique: Any,
    ckpt: Any = None,
    epochs: int = 4,
    module: Any = None,
    saver: Any = None,
    stop: int | None = None,
) -> Note:
    """Fit as for so many epochs, and stop before the end where only the first ones are looked at."""
    note = Note(technique, stop)
    fit([technique, note, *([saver] if saver else [])], module, resumable=True, ckpt=ckpt, max_epochs=epochs)
    return note


def pruning(**arguments: Any) -> DataPruning:
    return DataPruning(**{"prune": 0.3, "epoch": 1, "figure": False, "num_shown": 0, **arguments})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the checkpoint after some epochs, or within the third."""
    made: dict[str, Path] = {}

    def after(
        make: Callable[[], Any], epochs: int = 2, within: bool = False, module: Any = make_classifier, until: int = 0
    ) -> Path:
        technique = make()
        key = f"{technique.state_dict()['settings']} {epochs} {within} {module.__qualname__}"
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoints")
            when: dict[str, Any] = {"every_n_train_steps": 1} if within else {"every_n_epochs": 1}
            saver = pl.callbacks.ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **when)
            stop = epochs + within
            run(technique, epochs=max(3, epochs + 1, until), module=module(), saver=saver, stop=stop)
            found = sorted(
                folder.glob(f"epoch={epochs if within else epochs - 1}-*"), key=lambda p: int(p.stem.split("=")[-1])
            )
            made[key] = found[1] if within else found[-1]
        return made[key]

    return after


# The choice among scored samples is made again, at once.

CHOICES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "more": ({}, {"prune": 0.6}),
    "less": ({"prune": 0.6}, {"prune": 0.3}),
    "all": ({}, {"prune": 0.0}),
    "some of all": ({"prune": 0.0}, {"prune": 0.5}),
    "easy": ({}, {"keep": "easy"}),
    "offset": ({}, {"offset": 0.2}),
    "by class": ({}, {"balance": "class"}),
    "class floor": ({"prune": 0.5}, {"prune": 0.5, "class_floor": 0.3}),
    "ccs": ({}, {"select": "ccs"}),
    "strata": ({"select": "ccs"}, {"select": "ccs", "strata": 3}),
    "another random choice": ({"keep": "random"}, {"keep": "random", "seed": 5}),
    "two rounds, one of them past": ({"prune": 0.2}, {"epoch": [1, 3], "prune": [0.4, 0.6]}),
    "one round less": ({"epoch": [1, 3], "prune": [0.4, 0.6]}, {"epoch": [1], "prune": [0.2]}),
}


@functools.cache
def kept_from_the_start(settings: str) -> Tensor | None:
    """Return what a run keeps in its third epoch that had these settings, as text, from the start."""
    return run(pruning(**ast.literal_eval(settings)), stop=3).kept[2]


@pytest.mark.parametrize("name", CHOICES)
def test_the_choice_is_what_it_would_have_been_under_the_new_settings(name: str, checkpoint: Any) -> None:
    before, after = CHOICES[name]
    resumed = run(pruning(**after), checkpoint(lambda: pruning(**before), until=4))
    assert sorted(resumed.kept) == [2, 3]
    assert_identical(resumed.kept[2], kept_from_the_start(str(after)))
    if name not in ("strata",):
        with pytest.raises(AssertionError):
            assert_identical(resumed.kept[2], kept_from_the_start(str(before)))


def test_nothing_is_scored_for_it(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(pruning)

    def scored(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("a pass")

    monkeypatch.setattr("lightning_grad.callbacks.data_pruning._passes.look_at_all", scored)
    note = run(pruning(prune=0.6, offset=0.1, keep="hard"), path)
    assert note.scored[3].epoch == 1
    assert note.sizes() == {2: 20, 3: 20}


def test_an_epoch_that_has_begun_goes_on_and_the_next_follows(checkpoint: Any) -> None:
    note = run(pruning(prune=0.6), checkpoint(pruning, within=True))
    assert note.sizes() == {2: 34, 3: 20}
    assert note.batches == {2: 3, 3: 3}, "5 batches of 34 samples, of which 2 had been trained on"


@pytest.mark.parametrize("within", [False, True])
def test_the_budget_is_followed(within: bool, checkpoint: Any) -> None:
    longer = run(pruning(budget="steps"), checkpoint(pruning, within=within))
    shorter = run(pruning(), checkpoint(lambda: pruning(budget="steps"), within=within))
    assert longer.batches == {2: 3 if within else 6, 3: 6}
    assert shorter.batches == {2: 4 if within else 5, 3: 5}
    assert longer.sizes() == shorter.sizes() == {2: 34, 3: 34}


# Rounds that move.


def test_a_round_that_is_put_off_trains_on_all_samples_until_then(checkpoint: Any) -> None:
    note = run(pruning(epoch=3), checkpoint(pruning), epochs=5)
    assert note.sizes() == {2: 48, 3: 34, 4: 34}
    assert note.scored[4].epoch == 3


def test_a_round_that_is_brought_forward_is_done_at_once(checkpoint: Any) -> None:
    note = run(pruning(epoch=1), checkpoint(lambda: pruning(epoch=5), until=6))
    assert note.sizes() == {2: 34, 3: 34}
    assert note.scored[3].epoch == 2


def test_a_round_that_is_added_is_done_when_it_comes(checkpoint: Any) -> None:
    note = run(pruning(epoch=[1, 3], prune=[0.3, 0.5]), checkpoint(pruning))
    assert note.sizes() == {2: 34, 3: 24}
    assert [note.scored[epoch].epoch for epoch in (2, 3)] == [1, 3]


# Another score.


def loss_of(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def same_samples(trainer: Any) -> Any:
    return trainer.train_dataloader.dataset


OTHERS: dict[str, dict[str, Any]] = {
    "grand-last": {"score": "grand-last"},
    "loss": {"score": "loss"},
    "margin": {"score": "margin"},
    "prototypes": {"score": "prototypes"},
    "a function": {"score_fn": loss_of},
    "another data set": {"score_dataset": same_samples},
    "random": {"keep": "random"},
    "random by class": {"keep": "random", "balance": "class"},
}
RECORDED: dict[str, tuple[dict[str, Any], int]] = {
    "aum": ({"score": "aum"}, 1),
    "forgetting": ({"score": "forgetting"}, 1),
    "vog": ({"score": "vog", "epoch": 2}, 2),
}


def began(path: Path, settings: dict[str, Any], epoch: int) -> None:
    """Check that a run scores all samples when it resumes, and continues with a part of them."""
    technique = pruning(**settings)
    note = run(technique, path, epochs=epoch + 2)
    assert note.scored[epoch].epoch == epoch
    assert note.scored[epoch].name == technique.source.name
    assert not note.scored[epoch].values.isnan().any()
    assert note.sizes()[epoch] == note.sizes()[epoch + 1] == 34


@pytest.mark.parametrize("name", OTHERS)
def test_another_score_is_taken_at_once_and_back(name: str, checkpoint: Any) -> None:
    began(checkpoint(pruning), OTHERS[name], 2)
    began(checkpoint(lambda: pruning(**OTHERS[name])), {}, 2)


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_score_is_left_at_once(name: str, checkpoint: Any) -> None:
    settings, _ = RECORDED[name]
    began(checkpoint(lambda: pruning(**settings), epochs=3), {"score": "loss"}, 3)


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_recorded_score_is_refused_without_a_record_and_the_way_out_works(
    name: str, within: bool, named: bool, checkpoint: Any
) -> None:
    (settings, needed), first = RECORDED[name], 3 if within else 2
    path = checkpoint(pruning, within=within)
    more = {"name": "late"} if named else {}  # a state under another name is not looked at
    was = "" if named else r" \(was 'el2n'\)"
    says = rf"resumes with score='{name}'{was}, but the checkpoint has no record for this score.*epoch to {first + needed} or"
    for early in range(max(1, settings.get("epoch", 1)), first + needed):
        with pytest.raises(ValueError, match=says):
            run(pruning(**{**settings, **more, "epoch": early}), path, epochs=9)
    note = run(pruning(**{**settings, **more, "epoch": first + needed}), path, epochs=first + needed + 1)
    assert not note.scored[first + needed].values.isnan().any()
    if not within:
        assert set(note.sizes().values()) == {48, 34}


def test_what_was_recorded_of_another_score_is_no_record(checkpoint: Any) -> None:
    path = checkpoint(lambda: pruning(score="aum", epoch=5), until=6)
    with pytest.raises(ValueError, match=r"score='forgetting' \(was 'aum'\)"):
        run(pruning(score="forgetting", epoch=2), path)
    run(pruning(score="aum", epoch=2), path)


class TwoLosses(pl.LightningModule):
    """Computes a loss twice, the second of the opposite answers."""

    def __init__(self) -> None:
        super().__init__()
        pl.seed_everything(7, verbose=False)
        self.layer = torch.nn.Linear(16, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.layer(batch[0].mean(1))
        return F.cross_entropy(logits, batch[1]) + F.cross_entropy(-logits, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_another_loss_is_another_score(checkpoint: Any) -> None:
    path = checkpoint(lambda: pruning(loss_index=0), module=TwoLosses)
    note = run(pruning(loss_index=1), path, module=TwoLosses())
    assert note.scored[2].epoch == 2
    path = checkpoint(lambda: pruning(loss_index=0, score="aum"), module=TwoLosses)
    with pytest.raises(ValueError, match=r"loss_index=1 \(was 0\), but the checkpoint has no record"):
        run(pruning(loss_index=1, score="aum"), path, module=TwoLosses())


def test_score_files_that_change_are_read(checkpoint: Any, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{name}.npz") for name in "ab"]
    for path, score in zip(paths, ("el2n", "margin"), strict=True):
        run(pruning(prune=0.0, score=score, save_scores=path), epochs=2)
    first = run(pruning(score_files=[paths[0]]), checkpoint(lambda: pruning(score_files=[paths[1]])), epochs=3)
    assert_identical(first.kept[2], run(pruning(score_files=[paths[0]]), epochs=3).kept[2])
    second = run(pruning(score_files=[paths[0]]), checkpoint(pruning), epochs=3)
    assert_identical(first.kept[2], second.kept[2])


# The others.


def test_infobatch_follows_from_the_next_epoch_on(checkpoint: Any) -> None:
    half = checkpoint(InfoBatch)
    kept = {share: run(InfoBatch(share), half, epochs=12, stop=3).kept for share in (0.0, 0.25, 0.5, 0.9)}
    losses = torch.load(half, weights_only=True)["callbacks"]["InfoBatch"]["values"]
    low = int((losses < losses.mean()).sum())
    assert kept[0.0][2] is None
    for share in (0.25, 0.5, 0.9):
        dropped = TOTAL - len(kept[share][2])  # type: ignore[arg-type]
        assert abs(dropped - share * low) <= 2
    assert run(InfoBatch(prune_until=0.1), half, epochs=12, stop=3).kept[2] is None
    with pytest.raises(AssertionError):
        assert_identical(run(InfoBatch(seed=9), half, epochs=12, stop=3).kept[2], kept[0.5][2])


@pytest.mark.parametrize("prune", [0.0, 0.9])
def test_an_epoch_of_infobatch_that_has_begun_keeps_its_weights(prune: float, checkpoint: Any) -> None:
    path = checkpoint(InfoBatch, within=True)

    def state(technique: Any) -> Any:
        module = make_classifier()
        trainer, module = fit([technique], module, resumable=True, ckpt=path, max_epochs=3)
        return state_of(trainer, module)

    assert_identical(state(InfoBatch(prune)), state(InfoBatch()))


def test_infobatch_resumes_from_a_checkpoint_of_version_0_2(checkpoint: Any, tmp_path: Path) -> None:
    half, old = checkpoint(InfoBatch), tmp_path / "old.ckpt"
    saved = torch.load(half, weights_only=True)
    own = saved["callbacks"]["InfoBatch"]
    own["losses"] = own.pop("values")
    torch.save(saved, old)
    assert_identical(run(InfoBatch(), old, epochs=12, stop=3).kept, run(InfoBatch(), half, epochs=12, stop=3).kept)


def test_losses_of_another_kind_are_recorded_anew(checkpoint: Any) -> None:
    path = checkpoint(lambda: InfoBatch(loss_index=0), module=TwoLosses)
    note = run(InfoBatch(loss_index=1), path, epochs=12, module=TwoLosses(), stop=4)
    assert note.kept[2] is None
    assert note.kept[3] is not None
    assert run(InfoBatch(loss_index=0), path, epochs=12, module=TwoLosses(), stop=3).kept[2] is not None


def test_random_subsets_follow(checkpoint: Any) -> None:
    path, usual = checkpoint(RepeatedRandomSubset), run(RepeatedRandomSubset())
    for arguments in ({"prune": 0.25}, {"seed": 4}, {"replacement": True}):
        resumed = run(RepeatedRandomSubset(**arguments), path)
        assert_identical(resumed.kept[3], run(RepeatedRandomSubset(**arguments)).kept[3])
        with pytest.raises(AssertionError):
            assert_identical(resumed.kept[3], usual.kept[3])
    note = run(RepeatedRandomSubset(prune=0.75), checkpoint(RepeatedRandomSubset, within=True))
    assert note.sizes() == {2: 24, 3: 12}


def test_uniform_learning_follows(checkpoint: Any) -> None:
    once = checkpoint(lambda: UniformLearning(epoch=1))
    for repeats in (1, 3):
        technique = UniformLearning(epoch=1, repeats=repeats)
        added = run(technique, once).sizes()[2] - TOTAL
        assert added > 1
        # One is left out where it would be a last batch of its own.
        assert repeats * len(technique._repeated) - added == ((TOTAL + repeats * len(technique._repeated)) % BATCH == 1)
    assert run(UniformLearning(epoch=1, repeats=0), once).sizes() == {2: TOTAL, 3: TOTAL}
    late = run(UniformLearning(epoch=3), once).sizes()
    assert late[2] == TOTAL < late[3]
    never = checkpoint(lambda: UniformLearning(epoch=1, repeats=0))
    assert run(UniformLearning(epoch=1), never).sizes()[2] > TOTAL


@pytest.mark.parametrize(
    ("arguments", "again"), [({"seed": 3}, True), ({"loss_index": 0}, True), ({"repeats": 2}, False), ({}, False)]
)
def test_uniform_learning_looks_again_where_it_must(
    arguments: Any, again: bool, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, looks = checkpoint(lambda: UniformLearning(epoch=1)), []
    original = UniformLearning._find

    def find(self: Any, *rest: Any) -> Any:
        looks.append(1)
        return original(self, *rest)

    monkeypatch.setattr(UniformLearning, "_find", find)
    run(UniformLearning(epoch=1, **arguments), path)
    assert bool(looks) == again


def test_loss_weights_follow(checkpoint: Any) -> None:
    path = checkpoint(LossReweighting, within=True)

    def state(*callbacks: Any) -> Any:
        return state_of(*fit(callbacks, make_classifier(), resumable=True, ckpt=path, max_epochs=4))

    plain = state()
    assert_identical(state(LossReweighting(temperature=float("inf"))), plain)
    for arguments in (
        {},
        {"rule": "extremes"},
        {"temperature": 0.1},
        {"warmup_fraction": 0.9, "start_temperature": 2.0},
    ):
        with pytest.raises(AssertionError):
            assert_identical(state(LossReweighting(**arguments)), plain)
