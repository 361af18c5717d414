"""A probe looks at the same samples when it should, and the run is the one without it."""

import ast
import csv
import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from lightning_grad import core
from lightning_grad.core import ProbeCallback, ProbeLook, Reading
from lightning_grad.core.quiet import is_quiet
from lightning_grad.testing import (
    StopAt,
    assert_identical,
    fit,
    loaders,
    make_classifier,
    make_trainer,
    state_of,
    traces,
    trainer_traces,
)
from tests.core import activation_norm
from tests.core.activation_norm import ActivationNorm
from tests.core.probed import SAMPLES, Answers, Augmented, Noisy, make_noisy, noisy_loaders

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
]


def run(*callbacks: Any, module: Any = None, data: Any = None, ckpt: Any = None, **arguments: Any) -> Any:
    """Fit the noisy module for two epochs of six batches, and return (trainer, module)."""
    module = make_noisy() if module is None else module
    if any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        arguments.setdefault("enable_checkpointing", True)
    trainer = make_trainer(callbacks=list(callbacks), **{"max_epochs": 2, **arguments})
    train, validation = noisy_loaders() if data is None else data
    trainer.fit(module, train, validation, ckpt_path=ckpt)
    return trainer, module


def everything(trainer: Any, module: Any, folder: Path) -> dict[str, Any]:
    """Return what a run without the probe has too: states, random numbers, metrics, and what was logged."""
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    logged = [{key: value for key, value in row.items() if "/" not in key and value} for row in rows]
    return {
        **state_of(trainer, module),
        "python": list(random.getstate()[1]),
        "numpy": np.random.get_state()[1].tolist(),
        "data": trainer.train_dataloader.dataset.generator.bit_generator.state["state"],
        "metrics": {key: value for key, value in trainer.callback_metrics.items() if "/" not in key},
        "logged": [row for row in logged if set(row) - {"epoch", "step"}],
    }


# The run is the one without the probe.

SETTINGS: dict[str, dict[str, Any]] = {
    "each epoch": {},
    "each step": {"every_n_steps": 1},
    "training samples": {"every_n_steps": 2, "split": "train"},
    "training samples each epoch": {"every_n_epochs": 2, "split": "train"},
}
TWO_AT_ONCE = [("each epoch", "training samples"), ("each step", "training samples each epoch")]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 4},
    "bf16": {"precision": "bf16-mixed"},
    "validated in mid-epoch": {"val_check_interval": 2},
    "not validated": {"limit_val_batches": 1, "check_val_every_n_epoch": 2},
}


def left_by(folder: Path, *callbacks: Any, **arguments: Any) -> Any:
    trainer, module = run(*callbacks, logger=CSVLogger(folder, name="", version=""), **arguments)
    return everything(trainer, module, folder)


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what is left by the run without a probe, each way once."""
    return functools.cache(lambda way: left_by(tmp_path_factory.mktemp("plain"), **WAYS[way]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", TWO_AT_ONCE)
def test_a_run_with_probes_is_bitwise_the_run_without(
    settings: tuple[str, str], way: str, tmp_path: Path, plain_runs: Any
) -> None:
    probes = [Answers(4, **SETTINGS[setting], name=setting) for setting in settings]
    for probe in probes:
        probe.meets = lambda look: look.run()
    assert_identical(plain_runs(way), left_by(tmp_path, *probes, **WAYS[way]))
    assert all(len(probe.record.rows()) > 0 for probe in probes)


@pytest.mark.parametrize("part", ["module", "random", "data"])
def test_the_comparison_notices_a_look_that_is_not_quiet(part: str, tmp_path: Path, plain_runs: Any) -> None:
    class Naive(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if part == "random":
                torch.rand(1)
            else:
                batch = next(iter(DataLoader(trainer.train_dataloader.dataset, 4)))
                if part == "module":
                    pl_module(batch[0])

    plain, looked = plain_runs("plain"), left_by(tmp_path, Naive())
    with pytest.raises(AssertionError, match=part if part != "module" else None):
        assert_identical(plain[part], looked[part], part)


def test_gradients_in_mid_accumulation_are_the_same_objects() -> None:
    probe = Answers(4, every_n_steps=1, split="train")
    found: list[Any] = []

    def differentiate(look: ProbeLook) -> None:
        assert all(p.grad is None for p in look.pl_module.parameters())
        with torch.enable_grad():
            look.pl_module(look.batch[0]).sum().backward()

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            found.append([(id(p.grad), p.grad.clone()) for p in pl_module.parameters()])

    probe.meets = differentiate
    run(Watch(), probe, Watch(), max_epochs=1)
    for before, after in zip(found[::2], found[1::2], strict=True):
        for (was, value), (now, other) in zip(before, after, strict=True):
            assert was == now
            assert torch.equal(value, other)


def test_the_module_is_quiet_and_in_eval_mode_and_nothing_needs_a_gradient() -> None:
    probe, seen = Answers(4), []
    probe.meets = lambda look: seen.append(
        (is_quiet(look.pl_module), look.pl_module.training, torch.is_grad_enabled(), look.trainer.state.stage.value)
    )
    run(probe, max_epochs=2)
    assert set(seen) == {(True, False, False, "validate")}


def test_a_hook_of_the_module_sees_the_stage_that_the_samples_are_of() -> None:
    class Asks(Noisy):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            stages.append((is_quiet(self), self.trainer.state.stage.value))
            return batch

    stages: list[Any] = []
    for split, stage in (("train", "train"), ("val", "validate")):
        stages.clear()
        run(Answers(4, split=split), Answers(4, every_n_steps=1, split=split, name="b"), module=Asks(), max_epochs=1)
        assert {stage for is_look, stage in stages if is_look} == {stage}


def test_it_can_differentiate_where_lightning_validates_in_inference_mode() -> None:
    probe, seen = Answers(4), []

    def differentiate(look: ProbeLook) -> None:
        with torch.enable_grad():
            x = look.batch[0].requires_grad_()
            (gradient,) = torch.autograd.grad(look.pl_module(x).sum(), x)
        seen.append(gradient)

    class Infers(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.fit_loop.epoch_loop.val_loop.inference_mode = True

        def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
            assert torch.is_inference_mode_enabled()

    probe.meets = differentiate
    run(Infers(), probe, max_epochs=1)
    assert len(seen) == 2


def test_direct_calls_are_in_the_precision_of_the_run() -> None:
    probe, kinds = Answers(4), []
    probe.meets = lambda look: kinds.append(look.pl_module(look.batch[0]).dtype)
    run(probe, precision="bf16-mixed", max_epochs=1)
    assert set(kinds) == {torch.bfloat16}


# When it looks.


def looks_of(probe: Any) -> list[tuple[int, int]]:
    return [(row["epoch"], row["step"]) for row in probe.record.rows()]


@pytest.mark.parametrize(
    ("way", "settings"),
    [
        (
            {},
            [
                ({}, [(0, 5), (1, 11), (2, 17)]),
                ({"every_n_epochs": 2}, [(1, 11)]),
                ({"every_n_steps": 4}, [(0, 3), (1, 7), (1, 11), (2, 15)]),
            ],
        ),
        (
            {"accumulate_grad_batches": 4},
            [
                ({"every_n_steps": 1}, [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5)]),
                ({}, [(0, 1), (1, 3), (2, 5)]),
            ],
        ),
        ({"val_check_interval": 4}, [({}, [(0, 5), (1, 11), (2, 17)])]),
        ({"check_val_every_n_epoch": 2}, [({}, [(0, 5), (1, 11), (2, 17)])]),
        ({"limit_val_batches": 0}, [({"split": "train"}, [(0, 5), (1, 11), (2, 17)])]),
        ({"limit_train_batches": 3}, [({}, [(0, 2), (1, 5), (2, 8)])]),
        ({"max_steps": 9}, [({}, [(0, 5)])]),
    ],
)
def test_when_it_looks(way: dict[str, Any], settings: list[tuple[dict[str, Any], Any]], tmp_path: Path) -> None:
    probes = [Answers(4, **setting, name=f"p{number}") for number, (setting, _) in enumerate(settings)]
    run(*probes, logger=CSVLogger(tmp_path, name="", version=""), **{"max_epochs": 3, **way})
    written = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    for probe, (setting, expected) in zip(probes, settings, strict=True):
        assert looks_of(probe) == expected, setting
        rows = [row for row in written if row[f"answers/{probe.name}/mean"]]
        assert [int(row["step"]) for row in rows] == [step for _, step in expected], setting


def test_manual_optimization_counts_the_batches() -> None:
    probe = ActivationNorm("hidden", every_n_steps=4)
    probe.probe = lambda look: Reading({"mean": look.pl_module(look.batch[0]).mean()})  # type: ignore[method-assign]
    trainer, _ = fit([probe], make_classifier(manual=True), max_epochs=2)
    assert looks_of(probe) == [(0, 3), (1, 7), (1, 11)]
    del trainer


def test_validation_data_that_lightning_has_not_loaded_yet_is_read_and_left_to_it() -> None:
    class Loads(Noisy):
        def val_dataloader(self) -> Any:
            loads.append(is_quiet(self))
            torch.rand(1)
            return noisy_loaders()[1]

    loads: list[bool] = []
    arguments = {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}
    found = []
    for callbacks in ([], [Answers(4)]):
        pl.seed_everything(5, verbose=False)
        module, trainer = Loads(), make_trainer(callbacks=callbacks, max_epochs=3, **arguments)
        trainer.fit(module, noisy_loaders()[0])
        found.append(state_of(trainer, module))
    assert loads == [False, True, False]
    assert_identical(found[0], found[1])


def test_a_validation_of_its_own_is_not_looked_at() -> None:
    probe = Answers(4)
    trainer, module = run(probe, max_epochs=1)
    before = len(probe.seen)
    trainer.validate(module, noisy_loaders()[1], verbose=False)
    assert len(probe.seen) == before


# Averaged weights.


@pytest.mark.parametrize("ema_first", [False, True])
def test_an_epochs_look_sees_the_averaged_weights_that_are_validated(ema_first: bool) -> None:
    probe, average = ActivationNorm("body.0"), EMAWeightAveraging(decay=0.8)
    validated: list[float] = []

    class Norm(pl.Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if not trainer.sanity_checking:
                batch = torch.stack([data[index][0] for index in range(0, SAMPLES, 3)])
                validated.append(pl_module.body[0](batch).norm(dim=1).mean().item())

    data = Augmented(1, noise=0.0)
    loaders = DataLoader(Augmented(noise=0.0), 4), DataLoader(data, SAMPLES)
    both = [average, probe] if ema_first else [probe, average]
    run(*both, Norm(), data=loaders)
    assert [row["norm"] for row in probe.record.rows()] == pytest.approx(validated)
    plain = ActivationNorm("body.0")
    run(plain, data=(DataLoader(Augmented(noise=0.0), 4), DataLoader(data, SAMPLES)), max_epochs=1)
    assert plain.record.rows()[0]["norm"] != pytest.approx(validated[0], rel=1e-3)


def test_an_averaging_callback_of_any_kind_is_looked_through() -> None:
    class Doubles(pl.Callback):
        """Validates with weights of its own."""

        def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.head.weight.data.mul_(2.0)

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.head.weight.data.div_(2.0)

    probe, seen, trained = Answers(4), [], []
    probe.meets = lambda look: seen.append((look.step, look.pl_module.head.weight.norm().item()))

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            trained.append(pl_module.head.weight.norm().item())

    run(probe, Doubles(), Watch())
    assert seen[1:] == [(step, pytest.approx(2 * trained[step])) for step in (5, 11)]


# Resuming.

RESUMED = ["each epoch", "training samples", "training samples each epoch"]


def finish(*callbacks: Any, ckpt: Any = None, **arguments: Any) -> dict[str, Any]:
    """Finish a run with a probe of each setting but that of each step, and return what is left."""
    probes = [Answers(4, **SETTINGS[setting], name=setting) for setting in RESUMED]
    data = noisy_loaders(resumable=True)
    arguments = {"max_epochs": 3, **arguments}
    trainer, module = run(*probes, *callbacks, data=data, module=plain_noisy(), ckpt=ckpt, **arguments)
    state = state_of(trainer, module)
    state.pop("random")
    return {**state, **{probe.name: probe.state_dict() for probe in probes}}


def plain_noisy() -> Noisy:
    module = make_noisy()
    module.body[3].p = 0.0  # Lightning restores no random numbers
    return module


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("way", ["plain", "accumulated", "validated in mid-epoch", "every second epoch"])
def test_a_killed_run_resumes_exactly(way: str, averages: bool, tmp_path: Path) -> None:
    arguments = {**WAYS, "every second epoch": {"check_val_every_n_epoch": 2}}[way]
    average = [EMAWeightAveraging(decay=0.8)] if averages else []
    every = 3 if way != "accumulated" else 1
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=every)
    expected = finish(*average, saving, **arguments)
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"])
    saved = {path: torch.load(path, weights_only=True)["callbacks"] for path in paths}
    chosen = {*paths[:-1:2]}
    for setting in RESUMED:
        pending = [path for path, states in saved.items() if states[f"Answers[{setting}]"]["due"]]
        assert pending or setting == "training samples"
        chosen |= {*pending[:1]}
    for path in chosen - {paths[-1]}:  # behind the last step Lightning runs nothing
        average = [EMAWeightAveraging(decay=0.8)] if averages else []
        resumed = finish(*average, ckpt=path, **arguments)
        assert_identical(expected, resumed, path.name)


def test_a_checkpoint_of_a_run_without_the_probe_is_accepted(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_top_k=-1)
    run(saving, data=noisy_loaders(resumable=True), max_epochs=1)
    probe = Answers(4)
    run(probe, data=noisy_loaders(resumable=True), ckpt=next(tmp_path.glob("*.ckpt")), max_epochs=3)
    assert looks_of(probe) == [(1, 11), (2, 17)]


# Ranks.


def _meet_on_ranks(on_all: bool, fails_at: int, rank: int | None) -> Answers:
    """Return a probe that raises from a step on, on all ranks or on one."""
    probe = Answers(4, every_n_steps=2)
    probe.looks_on_all_ranks = on_all  # type: ignore[misc]

    def meets(look: ProbeLook) -> None:
        if on_all:
            assert look.trainer.strategy.reduce(torch.ones(()), reduce_op="sum") == 2
        if look.step >= fails_at and rank in (None, look.trainer.global_rank):
            raise KeyError("on purpose")

    probe.meets = meets
    return probe


def _run_on_ranks(*callbacks: Any, logger: Any = False) -> Any:
    return run(*callbacks, strategy="ddp", devices=2, max_epochs=1, logger=logger)


_plain_on_ranks = functools.cache(lambda: state_of(*_run_on_ranks()))  # on a rank, for the cases that it runs


def _on_a_rank(on_all: bool, folder: Path) -> dict[str, Any]:
    probe = _meet_on_ranks(on_all, 100, None)
    trainer, module = _run_on_ranks(probe, logger=CSVLogger(folder, name="", version=""))
    assert_identical(_plain_on_ranks(), state_of(trainer, module))
    metrics = {key: value.item() for key, value in trainer.callback_metrics.items() if "/" in key}
    return {"looks": len(probe.seen), "rows": probe.record.rows(), "metrics": metrics}


def _fails_on_ranks(on_all: bool, rank: int | None, folder: Path) -> str:
    with pytest.raises((KeyError, RuntimeError)) as caught:
        _run_on_ranks(_meet_on_ranks(on_all, 0, rank), logger=CSVLogger(folder, name="", version=""))
    return str([caught.value, *getattr(caught.value, "__notes__", [])])


LOOKING: list[Any] = [(False,), (True,)]
FAILING: list[Any] = [(False, None), (True, None), (True, 1)]
TOGETHER = [{_on_a_rank: LOOKING, _fails_on_ranks: FAILING}]


@pytest.mark.parametrize("case", LOOKING)
def test_the_first_rank_looks_unless_all_must(case: tuple[bool], together: Any) -> None:
    (first, second), _ = together(_on_a_rank, LOOKING, case)
    assert first["looks"] == 2  # of three batches a rank: the rehearsal, and one look
    assert second["looks"] == (2 if case[0] else 0)
    assert first["rows"] == second["rows"]
    assert first["metrics"] == second["metrics"]
    assert set(first["metrics"]) == {"answers/mean", "answers/drawn"}


@pytest.mark.parametrize("case", FAILING[:2])
def test_all_ranks_raise_what_the_first_look_of_one_raises(case: Any, together: Any) -> None:
    for words in together(_fails_on_ranks, FAILING, case)[0]:
        assert "on purpose" in words
        assert "Answers" in words


def test_all_ranks_raise_where_a_later_one_alone_fails(together: Any) -> None:
    (first, second), _ = together(_fails_on_ranks, FAILING, FAILING[2])
    assert "Answers failed on another rank. That rank shows the error." in first
    assert "on purpose" in second


# What fails.


class Failing(ProbeCallback):
    """Raises in some of its looks."""

    namespace = "failing"

    def __init__(self, fails_at: Sequence[int] = (), error: str = "ValueError") -> None:
        super().__init__(2, every_n_steps=1)
        self.fails_at, self.error = fails_at, error

    def probe(self, look: ProbeLook) -> Reading:
        look.undo.push(look.pl_module.head.register_forward_hook(lambda *_: None).remove)
        if look.step in self.fails_at:
            raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[self.error]("no such thing")
        return Reading({"seen": float(look.step)})


def test_what_fails_in_the_first_look_ends_the_fit_and_names_the_probe() -> None:
    module = make_noisy()
    with pytest.raises(ValueError, match="no such thing") as caught:
        run(Failing((0,)), module=module)
    assert any("Failing.probe raised this in the first look" in note for note in caught.value.__notes__)
    assert not module.head._forward_hooks


@pytest.mark.parametrize("error", ["ValueError", "RuntimeError"])
def test_what_fails_later_is_a_warning_and_the_run_is_the_same(error: str) -> None:
    probe = Failing((2, 3), error)
    with pytest.warns(UserWarning, match=f"Failing failed at step .*; training continues. {error}: no such") as warned:
        trainer, module = run(probe, max_epochs=1)
    assert len([w for w in warned if "Failing failed" in str(w.message)]) == 2
    assert [row["seen"] for row in probe.record.rows()] == [0.0, 1.0, 4.0, 5.0]
    plain_trainer, plain = run(max_epochs=1)
    assert_identical(state_of(plain_trainer, plain), state_of(trainer, module))
    assert not module.head._forward_hooks


def test_steps_back_are_taken_when_a_look_ends_and_when_it_fails() -> None:
    probe, taken = Answers(2, every_n_steps=1), []

    def meets(look: ProbeLook) -> None:
        look.undo.push(lambda: taken.append((look.step, is_quiet(look.pl_module))))
        if look.step == 1:
            raise ValueError("no such thing")

    probe.meets = meets
    with pytest.warns(UserWarning, match="no such thing"):
        run(probe, max_epochs=1, limit_train_batches=3)
    assert taken == [(0, True), (1, True), (2, True)]


def test_a_probe_that_changes_a_weight_ends_the_fit_at_any_look() -> None:
    probe = Answers(2, every_n_steps=2)

    def change(look: ProbeLook) -> None:
        if look.step == 3:
            look.pl_module.head.weight.add_(1.0)

    probe.meets = change
    with pytest.raises(RuntimeError, match=r"changes the parameter 'head\.weight'"):
        run(probe, max_epochs=1)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"norm": 1.0}, "must return a Reading; got dict"),
        (Reading({"norms": torch.ones(3)}), "the scalar 'norms' must be one number; got 3"),
        (Reading(arrays={"norms": [1.0]}), "the array 'norms' must be a tensor or an array; got list"),
        (Reading(pictures={"map": torch.ones(2, 2)}), "the picture 'map' must be a Picture or a matplotlib Figure"),
    ],
)
def test_what_is_no_reading_is_refused(found: Any, words: str) -> None:
    probe = Answers(2)
    probe.probe = lambda look: found  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=words):
        run(probe)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"samples": 0}, "at least 1"),
        ({"samples": []}, "an integer >= 1 or a list of different indices >= 0"),
        ({"samples": [1, 1]}, "different indices"),
        ({"samples": [-1]}, "indices >= 0"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
        (
            {"every_n_epochs": 1, "every_n_steps": 1},
            "every_n_epochs or every_n_steps; got every_n_epochs=1 and every_n_steps=1",
        ),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Answers(**arguments)
    with pytest.raises(ValueError, match="split must be 'train' or 'val'"):
        ProbeCallback(split="test")


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(torch.ones(4), 0)] * 8)


@pytest.mark.parametrize(
    ("validation", "setting", "error", "words"),
    [
        (None, {"samples": 25}, ValueError, "would inspect 25 samples, but the validation set has 24. Set samples to"),
        (None, {"samples": [0, 24]}, ValueError, "would inspect sample 24, but the validation set has 24"),
        (None, {"loader_key": 1}, ValueError, "loader_key=1 matches nothing: the only validation loader has no key"),
        (DataLoader(Endless(), 4), {}, TypeError, "the validation data has none; got Endless"),
        (
            DataLoader([(torch.ones(2, 4), torch.zeros(2).long())], None),
            {},
            TypeError,
            "whole batches from its data set",
        ),
    ],
)
def test_data_that_cannot_be_read_by_index_is_refused(
    validation: Any, setting: dict[str, Any], error: type[Exception], words: str
) -> None:
    train, usual = noisy_loaders()
    with pytest.raises(error, match=words):
        run(Answers(**{"samples": 1, **setting}), data=(train, usual if validation is None else validation))


def test_a_fit_without_validation_is_refused_before_the_first_batch() -> None:
    with pytest.raises(ValueError, match=r"this fit has no validation\. .* or set split='train'"):
        run(Answers(4), limit_val_batches=0)


def test_a_step_that_optimizes_by_itself_is_not_run() -> None:
    probe = ActivationNorm("hidden")
    with pytest.raises(ValueError, match="manual optimization, because training_step steps the optimizers"):
        fit([probe], make_classifier(manual=True))


class RealOnly(Answers):
    compatibility = Answers.compatibility.but(
        complex_parameters=core.no("reads real weights, and {} has others", "Drop it")
    )


def test_parameters_that_a_probe_does_not_work_with_are_refused_before_the_first_batch() -> None:
    module = make_classifier()
    module.phase = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    probe = RealOnly(4)
    with pytest.raises(ValueError, match=r"RealOnly reads real weights, and .* has others\. Drop it\."):
        run(probe, module=module)
    assert not probe.seen


# Which samples.


def test_a_count_is_spread_and_indices_are_taken_as_they_are() -> None:
    for samples, expected in ((4, [0, 6, 12, 18]), ([7, 3], [7, 3]), (1, [0])):
        probe = Answers(samples)
        run(probe, max_epochs=1)
        assert {tuple(seen["indices"]) for seen in probe.seen} == {tuple(expected)}


def test_augmented_samples_are_the_same_in_every_look_and_differ_from_the_plain_ones() -> None:
    probe = Answers(4, every_n_steps=2, split="train")
    run(probe)
    assert len(probe.seen) > 5
    assert all(torch.equal(seen["x"], probe.seen[0]["x"]) for seen in probe.seen)
    rows = probe.record.rows()
    assert len({row["drawn"] for row in rows}) == 1
    own = Answers(4, split="train", dataset=plain_data)
    run(own, max_epochs=1)
    assert torch.equal(own.seen[0]["x"], Augmented().x[::6])
    assert not torch.equal(own.seen[0]["x"], probe.seen[0]["x"])


def plain_data(trainer: Any) -> Any:
    torch.rand(1)
    return TensorDataset(trainer.train_dataloader.dataset.x, torch.zeros(SAMPLES).long())


def test_a_data_set_that_takes_lists_of_indices_gets_one() -> None:
    x, y = torch.randn(SAMPLES, 4), torch.arange(SAMPLES) % 3
    batches = DataLoader(TensorDataset(x, y), None, sampler=BatchSampler(SequentialSampler(x), 8, False))
    probe = Answers([5, 2])
    run(probe, data=(noisy_loaders()[0], batches), max_epochs=1)
    assert torch.equal(probe.seen[0]["x"], x[[5, 2]])


def test_one_of_several_loaders_is_chosen() -> None:
    one, two = Augmented(1, noise=0.0), Augmented(2, noise=0.0)
    pair = [DataLoader(one, 8), DataLoader(two, 8)]

    class Two(Noisy):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    probe = Answers(4, loader_key=1)
    run(probe, module=Two(), data=(noisy_loaders()[0], pair), max_epochs=1)
    assert torch.equal(probe.seen[0]["x"], two.x[::6])
    with pytest.raises(ValueError, match=r"must know which validation loader .* Set loader_key to one of '0', '1'"):
        run(Answers(4), module=Two(), data=(noisy_loaders()[0], pair), max_epochs=1)


def test_a_batch_of_one_of_several_training_loaders_is_not_run() -> None:
    class Both(Noisy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"], batch_idx)

    data = {"a": noisy_loaders()[0], "b": noisy_loaders()[0]}, noisy_loaders()[1]
    probe = Answers(4, split="train", loader_key="b")
    run(probe, module=Both(), data=data, max_epochs=1)
    assert len(probe.seen) == 2
    probe.meets = lambda look: look.run()
    with pytest.raises(ValueError, match="cannot run training_step on the samples of one loader"):
        run(probe, module=Both(), data=data, max_epochs=1)


def test_parts_are_the_samples_in_smaller_batches() -> None:
    probe, parts = Answers(20, split="train"), []
    probe.meets = lambda look: parts.append(
        [(part.indices, part.batch[0], part.losses().losses) for part in look.parts()]
    )
    _, module = run(probe, max_epochs=1, data=noisy_loaders(resumable=True))
    assert [len(indices) for indices, _, _ in parts[0]] == [4, 4, 4, 4, 4]
    assert [index for indices, _, _ in parts[0] for index in indices] == probe.seen[0]["indices"]
    assert torch.equal(torch.cat([x for _, x, _ in parts[0]]), probe.seen[0]["x"])
    assert all(losses.shape == (4,) for _, _, losses in parts[0])
    probe.meets = lambda look: parts.append([len(part.indices) for part in look.parts(8)])
    run(probe, max_epochs=1)
    assert parts[-1] == [8, 8, 4]
    del module


def test_a_probe_draws_other_numbers_for_each_part_and_the_same_in_each_look() -> None:
    class Own(Noisy):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)

    probe, drawn = Answers(8, split="train"), []
    probe.meets = lambda look: drawn.append(
        [(torch.rand(1).item(), torch.rand(1, generator=look.pl_module.generator).item()) for _ in look.parts(4)]
    )
    run(probe, module=Own(), max_epochs=2)
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0][0][0] != drawn[0][1][0]


def test_the_batch_is_not_the_data_sets_own() -> None:
    x = torch.randn(SAMPLES, 4)
    data = DataLoader(
        TensorDataset(x, torch.zeros(SAMPLES).long()), 8, collate_fn=lambda items: (x[:8], torch.zeros(8).long())
    )
    probe = Answers(8)
    probe.meets = lambda look: look.batch[0].zero_()
    run(probe, data=(noisy_loaders()[0], data), max_epochs=1)
    assert x.abs().min() > 0


# No trace.


@pytest.mark.parametrize("how", ["success", "exception", "interrupt"])
def test_nothing_is_left(how: str) -> None:
    found = []
    for callbacks in ([], [ActivationNorm("body.0", every_n_steps=2)]):
        module, trainers = make_noisy(), []
        stop = StopAt(8 if how != "success" else -1, KeyboardInterrupt if how == "interrupt" else RuntimeError)
        stop.setup = lambda trainer, *_, **__: trainers.append(trainer)  # type: ignore[method-assign] # noqa: B023
        if how == "success":
            run(*callbacks, stop, module=module)
        else:
            with pytest.raises((RuntimeError, SystemExit)):
                run(*callbacks, stop, module=module)
        found.append((traces(module), trainer_traces(trainers[0])))
        assert all(key not in vars(callback) for callback in callbacks for key in ("_samples", "_dataset"))
    assert found[0] == found[1]


def test_a_second_fit_starts_a_new_record() -> None:
    probe = Answers(4)
    run(probe)
    first = probe.record.rows()
    run(probe)
    assert probe.record.rows() == first


# The proof for authors.


def test_an_author_needs_forty_lines_and_public_names_only() -> None:
    text = Path(activation_norm.__file__).read_text()
    assert len(text.splitlines()) <= 40
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [node for node in imports if isinstance(node, ast.Import) and "lightning_grad" in ast.unparse(node)]
    ours = [
        node for node in imports if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_")
    ]
    assert [node.module for node in ours] == ["lightning_grad.core"]
    assert {name.name for name in ours[0].names} <= set(core.__all__)
    page = Path(__file__).parents[2] / "docs" / "adding_a_technique.md"
    assert text.split("\n", 2)[2] in page.read_text(), "the page shows another class"


def test_the_layers_norm_is_what_is_logged() -> None:
    probe = ActivationNorm("hidden", samples=4)
    trainer, module = fit([probe])
    samples = loaders()[1].dataset.tensors[0]
    x = samples[:: len(samples) // 4]
    module.eval()
    with torch.no_grad():
        expected = module.hidden(module.encoder(module.mix(x)).mean(1)).norm(dim=1).mean()
    assert trainer.callback_metrics["activations/norm"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_layer_that_is_not_there_is_told_after_the_first_batch() -> None:
    with pytest.raises(AttributeError, match="nowhere") as caught:
        fit([ActivationNorm("nowhere", every_n_epochs=4)])
    assert "ActivationNorm.probe raised this in the first look" in caught.value.__notes__[0]


def test_it_says_what_it_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_grad.core.callback.rank_zero_info", said.append)
    run(Answers([3], every_n_epochs=2), Answers(4, every_n_steps=1, split="train", name="b"), max_epochs=1)
    assert said == [
        "Answers inspects 1 validation sample every 2 epochs.",
        "Answers[b] inspects 4 training samples every step.",
    ]
