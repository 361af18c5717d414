"""OptimizerSwap with Schedule-Free: which weights validation, checkpoints and training see, and resuming."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor

from lightning_grad.callbacks import NMSparsity, OptimizerSwap
from lightning_grad.testing import assert_identical, fit, make_classifier, make_trainer, state_of
from tests.callbacks.optimizers.swapped import searched
from tests.cases import cases

AdamWScheduleFree = pytest.importorskip("schedulefree").AdamWScheduleFree
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined multiple optimizers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
BETA = 0.8
SHORT = {"max_epochs": 2, "val_check_interval": 3}


def swap(name: str = "schedulefree-adamw", **options: Any) -> OptimizerSwap:
    return OptimizerSwap(name, options={"betas": [BETA, 0.95], **options}, lr_factor=1.0)


def weights_of(module: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


class Seen(pl.Callback):
    """Writes down the weights of each validation, at its begin and end, and the averages computed by hand."""

    def __init__(self) -> None:
        self.validated: list[dict[str, Tensor]] = []
        self.by_hand: list[dict[str, Tensor]] = []
        self._last: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        z = {weight: trainer.optimizers[0].state[weight]["z"].double() for weight in pl_module.parameters()}
        self._last = {n: (w.double() - (1 - BETA) * z[w]) / BETA for n, w in pl_module.named_parameters()}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated.append(weights_of(pl_module))
            self.by_hand.append(self._last)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            assert_identical(weights_of(pl_module), self.validated[-1])


class Raises(pl.Callback):
    def __init__(self, hook: str, step: int) -> None:
        def fail(trainer: pl.Trainer, module: Any, *args: Any) -> None:
            self.run = trainer, module
            if trainer.global_step == step and not trainer.sanity_checking:
                raise ZeroDivisionError

        setattr(self, hook, fail)


def plain_logits(path: Path, module: Any) -> list[Tensor]:
    """Return the validation logits of a module without OptimizerSwap that loads a checkpoint."""
    plain = make_classifier()
    plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    make_trainer().validate(plain, module.trainer.val_dataloaders, verbose=False)
    return plain.validated


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a run with validations, what it saw, and its files."""
    folder = tmp_path_factory.mktemp("whole")
    early, late, callback = Seen(), Seen(), swap()
    best = ModelCheckpoint(folder, "{step}", monitor="val_loss", save_top_k=-1, save_weights_only=True)
    trainer, module = fit([early, callback, late, best], **SHORT)
    trainer.save_checkpoint(folder / "after.ckpt")
    return trainer, module, callback, early, late, folder


def test_validation_sees_the_averages_in_every_hook(whole: Any) -> None:
    *_, early, late, _ = whole
    assert len(early.validated) == 4
    assert_identical(early.validated, late.validated)
    for seen, expected in zip(early.validated, early.by_hand, strict=True):
        for name, weight in seen.items():
            torch.testing.assert_close(weight.double(), expected[name], rtol=1e-4, atol=1e-6)


def test_every_file_holds_the_validated_weights(whole: Any) -> None:
    _, module, _, early, _, folder = whole
    for step, seen in zip((3, 6, 9, 12), early.validated, strict=True):
        saved = torch.load(folder / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert_identical({name: saved[name] for name in seen}, seen)
    after = torch.load(folder / "after.ckpt", weights_only=True)["state_dict"]
    assert_identical({name: after[name] for name in seen}, weights_of(module))
    assert_identical(plain_logits(folder / "after.ckpt", module), module.validated)


def test_training_is_bitwise_that_without_validations(whole: Any) -> None:
    trainer, _, callback, *_ = whole
    alone = swap()
    other, _ = fit([alone], limit_val_batches=0, **SHORT)
    assert_identical(alone.state_dict(), callback.state_dict())
    assert_identical(other.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())


def test_calling_train_and_eval_alone_would_change_the_run(whole: Any) -> None:
    """The two methods of the optimizer do not undo each other exactly."""
    trainer, module, callback, *_ = whole
    optimizer, before = trainer.optimizers[0], weights_of(module)
    optimizer.train()
    trained = callback.state_dict()["training_weights"]
    changed = [name for name, weight in module.named_parameters() if not torch.equal(weight, trained[name])]
    optimizer.eval()
    module.load_state_dict(before, strict=False)
    assert changed


@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint")
@pytest.mark.parametrize(
    ("hook", "step"), [("on_train_batch_end", 5), ("on_validation_batch_end", 9), ("on_train_epoch_end", 6)]
)
def test_resumes_bitwise_after_an_exception(hook: str, step: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_epochs": 2, "resumable": True}
    if hook == "on_validation_batch_end":
        settings["val_check_interval"] = 3
    trainer, module = fit([swap()], **settings)
    raises = Raises(hook, step)
    with pytest.raises(ZeroDivisionError):
        fit([raises, swap(), OnExceptionCheckpoint(tmp_path)], **settings)
    (path,) = tmp_path.iterdir()
    saved = torch.load(path, weights_only=True)
    broken, left = raises.run
    assert_identical({name: saved["state_dict"][name] for name in weights_of(left)}, weights_of(left))
    path = tmp_path / "by_hand.ckpt"
    broken.save_checkpoint(path)
    later = torch.load(path, weights_only=True)
    assert_identical(later["state_dict"], saved["state_dict"])
    assert_identical(later["callbacks"]["OptimizerSwap"], saved["callbacks"]["OptimizerSwap"])
    trained = saved["callbacks"]["OptimizerSwap"]["training_weights"]
    for (name, weight), state in zip(trained.items(), saved["optimizer_states"][0]["state"].values(), strict=True):
        by_hand = (weight.double() - (1 - BETA) * state["z"].double()) / BETA
        torch.testing.assert_close(saved["state_dict"][name].double(), by_hand, rtol=1e-4, atol=1e-6)
    resumed = fit([swap()], ckpt=path, **settings)
    assert_identical(state_of(*resumed)["optimizers"], state_of(trainer, module)["optimizers"])
    assert_identical(weights_of(resumed[1]), weights_of(module))


def test_resumes_bitwise_from_a_file_that_is_saved_after_the_fit(whole: Any) -> None:
    *_, folder = whole
    callback, again = swap(), swap()
    trainer, module = fit([callback], **{**SHORT, "max_epochs": 3})
    resumed = fit([again], ckpt=folder / "after.ckpt", **{**SHORT, "max_epochs": 3})
    assert_identical(state_of(*resumed)["optimizers"], state_of(trainer, module)["optimizers"])
    assert_identical(again.state_dict(), callback.state_dict())


def test_a_run_without_a_batch_left_ends_with_the_averages(whole: Any) -> None:
    _, module, *_, folder = whole
    _, loaded = fit([swap()], ckpt=folder / "after.ckpt", **SHORT)
    assert_identical(weights_of(loaded), weights_of(module))


@pytest.mark.parametrize("path", ["pytorch_optimizer.ScheduleFreeAdamW", "schedulefree.RAdamScheduleFree"])
def test_works_with_any_optimizer_that_has_both_modes(path: str, tmp_path: Path) -> None:
    pytest.importorskip(path.partition(".")[0])
    early = Seen()
    best = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, monitor="val_loss")
    _, module = fit([early, swap(path), best], max_epochs=2)
    saved = torch.load(tmp_path / "step=12.ckpt", weights_only=True)["state_dict"]
    assert_identical({name: saved[name] for name in early.validated[-1]}, early.validated[-1])
    assert_identical(weights_of(module), early.validated[-1])


def test_two_ranks_save_what_both_validate(tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            torch.save(weights_of(pl_module), tmp_path / f"rank{trainer.global_rank}.pt")

    files = ModelCheckpoint(tmp_path, "{step}", monitor="val_loss", save_weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit([swap(), Save(), files], max_epochs=1, strategy="ddp_fork", devices=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    saved = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)["state_dict"]
    assert_identical(first, second)
    assert_identical({name: saved[name] for name in first}, first)


def test_of_two_optimizers_one_averages() -> None:
    callback = OptimizerSwap("schedulefree-adamw", lr_factor=1.0, which=[1])
    _, module = fit([callback], make_classifier(manual=True), max_epochs=1)
    assert set(callback.state_dict()["training_weights"]) == {
        name for name, _ in module.named_parameters() if name.startswith(("hidden", "norm", "head"))
    }


def test_groups_that_are_added_later_are_averaged_too() -> None:
    class Adds(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": pl_module.head.parameters()})

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.trained = pl_module.head.weight.detach().double()
            self.z = trainer.optimizers[0].state[pl_module.head.weight].get("z")

    module, adds = make_classifier(), Adds()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.hidden.parameters(), lr=1e-2)
    fit([OptimizerSwap("schedulefree-adamw"), adds], module, max_epochs=2, limit_val_batches=0)
    expected = (adds.trained - 0.1 * adds.z.double()) / 0.9
    assert not torch.equal(expected, adds.trained)
    torch.testing.assert_close(module.head.weight.detach().double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_works_next_to_sparse_weights(first: bool, tmp_path: Path) -> None:
    def callbacks() -> list[pl.Callback]:
        return [swap(), NMSparsity()] if first else [NMSparsity(), swap()]

    files = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, monitor="val_loss")
    trainer, module = fit([*callbacks(), files], **SHORT)
    assert_identical(plain_logits(tmp_path / "step=12.ckpt", module), module.validated)
    resumed = fit(callbacks(), ckpt=tmp_path / "step=6.ckpt", **SHORT)
    assert_identical(state_of(*resumed)["optimizers"], state_of(trainer, module)["optimizers"])
    assert_identical(weights_of(resumed[1]), weights_of(module))


@cases(
    ("optimizer", "other", "words"),
    [
        ("schedulefree-adamw", EMAWeightAveraging(decay=0.9), "weight averaging would average its training"),
        (lambda groups: AdamWScheduleFree(groups), EMAWeightAveraging(decay=0.9), "weight averaging would average"),
        ("schedulefree-adamw", StochasticWeightAveraging(0.1), "StochasticWeightAveraging would average its training"),
    ],
)
def test_refuses_another_average(optimizer: Any, other: pl.Callback, words: str) -> None:
    with pytest.raises(ValueError, match=f"averages the weights itself, and {words}"):
        fit([other, OptimizerSwap(optimizer, lr_factor=1.0)], max_epochs=1)


def test_says_that_statistics_belong_to_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(OptimizerSwap, "say", lambda _, text: told.append(text))
    fit([swap()], max_epochs=1, limit_train_batches=1)
    assert any("statistics of BatchNorm belong to the training weights" in text for text in told)


@pytest.mark.parametrize("name", ["schedulefree-adamw", "sophia"])
def test_a_search_for_a_learning_rate_leaves_no_trace(name: str, tmp_path: Path) -> None:
    """It trains before ``on_fit_start``, and without the callbacks."""
    first, second = (OptimizerSwap(name, lr_factor=1.0) for _ in range(2))
    assert_identical(searched(first, tmp_path), searched(second, tmp_path, searches=False))


def test_nothing_of_it_stays(whole: Any) -> None:
    trainer, module, *_ = whole
    loop = trainer.fit_loop
    assert not {"save_checkpoint", "on_run_end", "on_load_checkpoint"} & {*vars(trainer), *vars(loop), *vars(module)}
    assert "run" not in vars(loop.epoch_loop.val_loop)
