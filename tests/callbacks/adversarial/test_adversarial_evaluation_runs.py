"""When the second validation runs, that it leaves no trace, and whom it refuses."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch.nn import functional as F

from lightning_grad.callbacks import AdversarialEvaluation
from lightning_grad.callbacks.adversarial import adversarial_evaluation
from lightning_grad.core.dispatch import MethodDispatcher
from lightning_grad.core.quiet import is_quiet
from lightning_grad.testing import assert_identical, make_trainer
from tests.callbacks.adversarial.attacked import At, Tape
from tests.callbacks.adversarial.test_adversarial_evaluation import (
    ComputesAtTheEnd,
    ListsCleared,
    Net,
    attack,
    evaluator,
    fit,
    loader,
    parted,
    validate,
)

# When.


class Notes(Net):
    """Remembers what it logs, of both validations."""

    def build(self) -> None:
        self.logged = Tape()

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if name.endswith("val_acc") and not trainer.training:
            self.logged((name.removesuffix("val_acc"), trainer.current_epoch, trainer.sanity_checking))
        super().log(name, *args, **kwargs)

    def attacked(self, sanity: bool = False) -> list[int]:
        return sorted({epoch for name, epoch, sane in self.logged.seen if name and sane == sanity})


@pytest.mark.parametrize(("every", "epochs"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_every_so_many_validations_from_the_first(every: int, epochs: list[int]) -> None:
    callback, module = evaluator(every_n_validations=every), Notes()
    fit([callback], module, max_epochs=5)
    assert module.attacked() == epochs
    assert module.attacked(sanity=True) == [0]
    for evaluate in ("validate", "test"):
        module.logged.seen.clear()
        getattr(make_trainer(callbacks=[callback]), evaluate)(module, loader(), verbose=False)
        assert len(module.logged.seen) == 2 * 3
    assert callback.state_dict()["validations"] == 5
    module.logged.seen.clear()
    fit([callback], module, max_epochs=2)
    assert module.attacked()[0] == 0, "another fit begins anew"


def test_resuming_goes_on_counting(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit([evaluator(every_n_validations=2), save], Notes(), max_epochs=1)
    module = Notes()
    fit([evaluator(every_n_validations=2), save], module, ckpt=tmp_path / "epoch=0.ckpt", max_epochs=5)
    assert module.attacked() == [2, 4]


@pytest.mark.parametrize("inference", [True, False])
def test_a_test_is_a_validation(inference: bool) -> None:
    class Tested(Net):
        def on_test_epoch_start(self) -> None:
            self.sizes: list[float] = []

        def test_step(self, batch: Any, batch_idx: int) -> Any:
            self.sizes.append(batch[0].norm().item())
            return super().test_step(batch, batch_idx)

        def on_test_epoch_end(self) -> None:
            self.log("size", sum(self.sizes))

    trainer = make_trainer(callbacks=[evaluator()], inference_mode=inference)
    trainer.test(Tested(), loader(), verbose=False)
    clean, attacked = parted(dict(trainer.callback_metrics))
    attacked_batches = attack(Tested(), [loader()])
    assert attacked["size"] == pytest.approx(sum(x.norm().item() for x, _ in attacked_batches[0]))
    expected = validate([], Net(), attacked_batches)
    assert_identical({key: attacked[key] for key in expected}, expected)
    assert_identical({key: clean[key] for key in expected}, validate([], Net()))


def test_two_with_names() -> None:
    found = validate([evaluator(0.1, name="weak"), evaluator(0.5, name="strong", norm="l2")], ListsCleared())
    alone = {"weak": [evaluator(0.1)], "strong": [evaluator(0.5, norm="l2")]}
    for name, callbacks in alone.items():
        clean, attacked = parted(validate(callbacks, ListsCleared()))
        assert_identical(parted(found, f"adversarial/{name}/"), (clean, attacked))
    assert len(found) == 3 * len(clean)


# Traces.


class Fails(ListsCleared):
    """Fails at its second batch, in the attack or on what was attacked."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        now = "attack" if is_quiet(self) else "attacked" if self in adversarial_evaluation._SECOND else "clean"
        if batch_idx == 1 and now == self.where:
            raise KeyError(now)
        return super().validation_step(batch, batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if is_quiet(self):  # which an attack asks next
            raise ValueError("no")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("where", ["attack", "attacked", "clean"])
@pytest.mark.parametrize("run", [validate, fit])
def test_an_exception_leaves_no_trace(where: str, run: Any) -> None:
    module, logger, callback = Fails(where), Figures(), evaluator()
    held, trainers = module.outputs, []
    with pytest.raises(KeyError, match=where):
        run([callback, At(setup=lambda trainer, *_, **__: trainers.append(trainer))], module, logger=logger)
    assert module.outputs is held
    assert len(held) == 1 + (where != "clean"), "the clean outputs until then"
    assert not any(isinstance(value, MethodDispatcher) for value in vars(module).values())
    assert trainers[0].loggers == [logger]
    assert not is_quiet(module)
    assert module not in adversarial_evaluation._SECOND
    assert callback._evaluation is None
    module.where = "nowhere"
    module.outputs.clear()
    module.by_name["y"].clear()
    module.train()
    assert_identical(parted(validate([callback], module))[0], validate([], ListsCleared()))


def test_after_a_fit_nothing_is_left() -> None:
    plain, module, callback = Net(), Net(), evaluator()
    fit([], plain)
    trainer = fit([callback], module)
    assert vars(module).keys() == vars(plain).keys()
    assert callback._evaluation is None
    assert callback._search._places == {}
    assert trainer.loggers == []


def test_copies_in_mid_validation() -> None:
    copies: list[Any] = []

    def note(trainer: Any, pl_module: Any, *_: Any) -> None:
        for make in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
            copies.append((make(callback), make(pl_module)))

    callback = evaluator()
    found = validate([At(on_validation_batch_end=note), callback], ListsCleared(), inference_mode=False)
    for other, module in copies[:2]:
        assert other.settings == callback.settings
        assert not any(isinstance(value, MethodDispatcher) for value in vars(module).values())
        module.outputs.clear()
        module.by_name["y"].clear()
        assert_identical(validate([other], module), found)
    assert len(copies) == 6


# Loggers.


class Figures(Logger):
    """Remembers what it is sent."""

    name, version = "figures", 0

    def __init__(self) -> None:
        super().__init__()
        self.experiment, self.lines = Tape(), []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.lines.append((step, set(metrics)))

    def log_hyperparams(self, *_: Any) -> None:
        pass


def test_figures_come_once_and_lines_together(capsys: Any) -> None:
    class Draws(ComputesAtTheEnd):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("size", batch[0].norm(), on_step=True, on_epoch=True)
            self.logger.experiment(f"batch {batch_idx}")
            return super().validation_step(batch, batch_idx)

        def on_validation_epoch_end(self) -> None:
            self.logger.experiment("figure")
            self.loggers[1].log_metrics({"direct": 1.0}, step=7)
            self.print("printed")
            super().on_validation_epoch_end()

    loggers = [Figures(), Figures()]
    fit([evaluator()], Draws(), logger=loggers, num_sanity_val_steps=0)
    assert loggers[0].experiment.seen == ["batch 0", "batch 1", "batch 2", "figure"] * 2
    assert [line for line in loggers[1].lines if "direct" in line[1]] == [(7, {"direct"})] * 2
    assert capsys.readouterr().out.count("printed") == 2
    lines = [
        parted(dict.fromkeys(keys)) for _, keys in loggers[0].lines if any("val_" in k or "size" in k for k in keys)
    ]
    assert len(lines) == 2 * (3 + 1)
    assert all(attacked.keys() == clean.keys() - {"epoch"} for clean, attacked in lines)


# Refusals.


def test_modules_that_do_not_validate() -> None:
    class Trains(pl.LightningModule):
        training_step, configure_optimizers = Net.training_step, Net.configure_optimizers

    with pytest.raises(
        ValueError, match=r"AdversarialEvaluation runs validation_step on attacked inputs, but Trains has none"
    ):
        make_trainer(callbacks=[evaluator()]).fit(Trains(), loader())


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize("kind", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_sharded_weights_are_refused(kind: str, stage: str) -> None:
    trainer = SimpleNamespace(strategy=type(kind, (), {})(), callbacks=[], loggers=[], is_global_zero=True)
    with pytest.raises(ValueError, match=rf"AdversarialEvaluation.*{kind}"):
        evaluator().setup(trainer, Net(), stage)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"restarts": 0}, "restarts"),
        ({"every_n_validations": 0}, "every_n_validations"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"loss_index": -1}, "loss_index"),
        ({"seed": -1}, "seed"),
        ({"steps": 0}, "steps"),
        ({"mean": 0.5}, "mean and std"),
    ],
)
def test_wrong_arguments(arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AdversarialEvaluation(**arguments)


def test_inputs_outside_the_bounds() -> None:
    with pytest.raises(ValueError, match=r"AdversarialEvaluation: the inputs range from .* outside bounds"):
        validate([evaluator(bounds=[0, 1])], Net())


def test_a_later_batch_without_a_loss() -> None:
    class Skips(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return super().validation_step(batch, batch_idx) if batch_idx == 0 else None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx == 0 else None

    with pytest.raises(RuntimeError, match=r"AdversarialEvaluation: the step showed a loss .* none for a later one"):
        validate([evaluator()], Skips())


def test_a_later_batch_whose_samples_have_no_loss_of_their_own() -> None:
    class Sums(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self.net(batch[0])
            return F.cross_entropy(logits, batch[1]) if batch_idx == 0 else logits.square().mean()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).square().mean()

    with pytest.raises(RuntimeError, match=r"AdversarialEvaluation: the step .* none for a later one"):
        validate([evaluator(restarts=2)], Sums())
