"""The real step sees exactly the attacked inputs, and nothing else of the attack."""

import copy
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_grad.callbacks.adversarial import AdversarialTraining
from lightning_grad.callbacks.adversarial._attack import generator_for
from lightning_grad.functional.adversarial.attacks import fgsm, pgd
from lightning_grad.testing import ResumableLoader, assert_identical, state_of
from tests.callbacks.adversarial.attacked import (
    BATCH,
    BATCHES,
    At,
    Classifier,
    Linear,
    as_batches,
    attacked_and_replayed,
    attacker,
    half_precision,
    points,
    samples,
    train,
)

SIGN = torch.tensor([1.0, -1.0])  # of Linear's weight


def clean_of(loader: Any) -> list[Tensor]:
    return [batch[0] for batch in loader]


# What the step sees.


@pytest.mark.parametrize(
    ("arguments", "move"),
    [
        ({}, [0.25, -0.25]),
        ({"step_size": 0.1}, [0.1, -0.1]),
        ({"attack": "pgd"}, [0.25, -0.25]),
        ({"attack": "pgd", "steps": 2, "step_size": 0.1}, [0.2, -0.2]),
        ({"norm": "l2"}, [0.15, -0.2]),
        ({"norm": "l2", "attack": "pgd", "steps": 3, "step_size": 0.05}, [0.09, -0.12]),
        ({"mean": 0.5, "std": [0.5, 0.1]}, [0.5, -2.5]),
    ],
)
def test_the_step_sees_the_attacked_inputs(arguments: Any, move: list[float]) -> None:
    module = Linear()
    train(attacker(**arguments), module, points())
    for seen, clean in zip(module.inputs, clean_of(points()), strict=True):
        torch.testing.assert_close(seen, clean + torch.tensor(move))
    assert len(module.tape.seen) == 2 * (
        1 + {"fgsm": 1}.get(arguments.get("attack", "fgsm"), arguments.get("steps", 7))
    )


def test_bounds_hold() -> None:
    module = Linear()
    train(attacker(bounds=[0, 1]), module, points())
    for seen, clean in zip(module.inputs, clean_of(points()), strict=True):
        torch.testing.assert_close(seen, (clean + 0.25 * SIGN).clamp(0, 1))


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_random_starts_are_those_of_seed_epoch_and_batch(attack: Any) -> None:
    expected: list[Tensor] = []

    def attack_outside(trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        twin = copy.deepcopy([pl_module.body, pl_module.head])
        generator = generator_for(torch.device("cpu"), 5, f"{trainer.current_epoch}/{batch_idx}/0")

        def loss_of(x: Tensor) -> Tensor:
            return F.cross_entropy(twin[1](twin[0](x)), batch[1])

        one, many = (
            (lambda: fgsm(loss_of, batch[0], 0.2, generator=generator)),
            (lambda: pgd(loss_of, batch[0], 0.2, 7, generator=generator)),
        )
        expected.append(one() if attack == "fgsm" else many())

    module = Classifier(dropout=0.0)
    callback = AdversarialTraining(0.2, attack, seed=5, check_every_n_epochs=None)
    train([At(on_train_batch_start=attack_outside), callback], module, max_epochs=2)
    assert_identical([x for x, _ in module.batches], expected)
    assert len(expected) == 2 * BATCHES


def test_epsilon_zero_is_no_callback(tmp_path: Path) -> None:
    found = []
    for folder, callbacks in (("plain", []), ("zero", [AdversarialTraining(0.0)])):
        module = Classifier()
        trainer = train(callbacks, module, max_epochs=2, logger=CSVLogger(tmp_path / folder, name="", version=""))
        found.append([state_of(trainer, module), module.drawn, (tmp_path / folder / "metrics.csv").read_text()])
    assert_identical(found[0], found[1])


# What else is left: the same run on batches that were attacked beforehand, without the callback, is the same.

RUNS: dict[str, tuple[dict[str, Any], Any]] = {
    "fgsm": ({}, dict),
    "random start": ({"random_start": True}, dict),
    "pgd": ({"attack": "pgd", "steps": 3}, dict),
    "checked": ({"check_every_n_epochs": 1}, dict),
    "accumulation": ({}, lambda: {"accumulate_grad_batches": 3}),
    "bf16": ({"attack": "pgd", "steps": 2}, lambda: {"precision": "bf16-mixed"}),
    "bf16, checked": ({"check_every_n_epochs": 1}, lambda: {"precision": "bf16-mixed"}),
    "fp16": ({"check_every_n_epochs": 1}, lambda: {"plugins": half_precision(1024.0)}),
    "partly clean": ({"clean_fraction": 0.5}, dict),
}


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize("name", RUNS)
def test_the_run_is_that_on_batches_attacked_beforehand(name: str, tmp_path: Path) -> None:
    settings, make_arguments = RUNS[name]
    found, batches = attacked_and_replayed(list, Classifier, tmp_path, make_arguments, **settings)
    assert_identical(found[0], found[1])
    assert len(found[0]["logged"]) == 2 * 2 * BATCHES
    assert found[0]["counted"] == 2 * BATCHES
    moved = [
        (x - own).abs().max() for (x, _), own in zip(batches, clean_of(DataLoader(samples(), BATCH)) * 2, strict=True)
    ]
    assert all(0.2 < move < 0.26 for move in moved)


def test_no_gradient_is_touched_before_backward() -> None:
    kept: list[Any] = []
    compared: list[bool] = []

    def gradients(module: Any) -> list[Any]:
        return [None if p.grad is None else p.grad.clone() for p in module.parameters()]

    def after(trainer: Any, pl_module: Any) -> None:
        kept[:] = [[p.grad for p in pl_module.parameters()], gradients(pl_module)]

    def before(trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if trainer.fit_loop.batch_idx % 3:  # else the optimizer has begun anew
            compared.append(all(p.grad is old for p, old in zip(pl_module.parameters(), kept[0], strict=True)))
            assert_identical(gradients(pl_module), kept[1])
        else:
            assert all(p.grad is None for p in pl_module.parameters())

    train([attacker(), At(on_before_backward=before, on_after_backward=after)], Classifier(), accumulate_grad_batches=3)
    assert compared == [True] * 4


class Faint(Linear):
    """Its gradient in half precision is nothing without a scale."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0]
        self.inputs.append(x.detach().clone())
        half = F.linear(x, self.weight.unsqueeze(0))
        assert half.dtype == torch.float16
        return half.float().mean() * 1e-7


@pytest.mark.parametrize(("scale", "moves"), [(2.0**20, True), (1.0, False)])
def test_small_gradients_do_not_vanish_in_fp16(scale: float, moves: bool) -> None:
    module = Faint()
    train(attacker(), module, points(), plugins=half_precision(scale))
    for seen, clean in zip(module.inputs, clean_of(points()), strict=True):
        torch.testing.assert_close(seen, clean + 0.25 * SIGN * moves)


# Batches.


@dataclass
class Sample:
    label: Tensor
    x: Tensor


class Keyed(Linear):
    def input_of(self, batch: Any) -> Tensor:
        return batch.x if isinstance(batch, Sample) else batch["views"][1] if "views" in batch else batch["x"]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda x: {"label": torch.zeros(4), "x": x}, None),
        (lambda x: {"other": x + 1, "x": x}, "x"),
        (lambda x: Sample(torch.zeros(4), x), None),
        (lambda x: Sample(torch.zeros(4), x), "x"),
        (lambda x: {"views": [x + 1, x]}, "views.1"),
    ],
)
def test_batches_of_other_forms_and_their_keys(make: Any, key: Any) -> None:
    module, batches = Keyed(), [make(x) for x in clean_of(points())]
    train(attacker(input_key=key), module, as_batches(batches))
    for seen, clean in zip(module.inputs, clean_of(points()), strict=True):
        torch.testing.assert_close(seen, clean + 0.25 * SIGN)


def test_batches_made_beforehand_are_not_edited() -> None:
    made = [[x, torch.zeros(4)] for x in clean_of(points())]
    before = copy.deepcopy(made)
    train(attacker(bounds=[0, 1]), Linear(), as_batches(made), max_epochs=2)
    assert_identical(made, before)


def test_a_key_that_leads_nowhere() -> None:
    with pytest.raises(
        ValueError, match=r"AdversarialTraining: input_key='pixels' is not in the batch.*available there: 0\."
    ):
        train(attacker(input_key="pixels"), Linear(), points())


def test_integer_images_are_refused_with_advice() -> None:
    class Images(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (batch[0].float() @ self.weight).mean()

    said = r"AdversarialTraining needs an input with a gradient.*no nn\.Embedding\. Convert integer images to floats"
    with pytest.raises(TypeError, match=said):
        train(attacker(), Images(), as_batches([[torch.ones(4, 2, dtype=torch.uint8)]]))


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.29, 29), (0.3, 30), (0.004, 0), (0.5, 50)])
def test_clean_fraction_leaves_so_many_samples(fraction: float, count: int) -> None:
    module = Linear()
    train(attacker(clean_fraction=fraction), module, points(3, 100))
    rows = [(seen == clean).all(1) for seen, clean in zip(module.inputs, clean_of(points(3, 100)), strict=True)]
    assert [int(row.sum()) for row in rows] == [count] * 3
    if count > 20:
        assert not torch.equal(rows[0], rows[1])
        assert not torch.equal(rows[0], torch.arange(100) < count)


# The length of the run.


class Logged(pl.Callback):
    """Writes down values that are logged in a step."""

    def __init__(self, key: str) -> None:
        self.key, self.values = f"adversarial/{key}", []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        # A callback's log comes after this hook of the callback, so that this one must stand behind it.
        self.values.append(trainer.callback_metrics.get(self.key, torch.tensor(math.nan)).item())


def test_warmup_ramps_epsilon() -> None:
    module, logged = Linear(), Logged("epsilon")
    train([attacker(0.4, warmup_fraction=0.5), logged], module, points(4), max_epochs=2)
    expected = [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4]
    assert logged.values == pytest.approx(expected)
    moves = [
        (seen - clean).abs().max().item() for seen, clean in zip(module.inputs, clean_of(points(4)) * 2, strict=True)
    ]
    assert moves == pytest.approx(expected, abs=1e-6)


def test_warmup_needs_a_known_length() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([[torch.ones(4, 2)]] * 3)

    with pytest.raises(ValueError, match=r"AdversarialTraining needs the length of the run.*max_steps"):
        train(attacker(warmup_fraction=0.5), Linear(), as_batches(Endless()))
    train(attacker(), Linear(), as_batches(Endless()))


def test_loss_gain_is_that_of_the_attack() -> None:
    logged = Logged("loss_gain")
    train([attacker(), logged], Linear(), points())
    assert logged.values == pytest.approx([0.25 * 7.0] * 2, rel=1e-5)


# Steps of other kinds.


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_returns_nothing_for_some_batches() -> None:
    class Passing(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 == 0 else {"loss": loss, "x": batch[0]}

    module = Passing()
    # Each epoch begins with a batch that is passed over.
    train(attacker(check_every_n_epochs=1), module, points(4), max_epochs=2)
    for i, (seen, clean) in enumerate(zip(module.inputs, clean_of(points(4)) * 2, strict=True)):
        torch.testing.assert_close(seen, clean + 0.25 * SIGN * (i % 2))


def test_a_validation_step_that_calls_the_training_step_is_not_attacked() -> None:
    class Validated(Linear):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

    module = Validated()
    module.val_dataloader = points
    train(attacker(), module, points())
    clean = clean_of(points())
    expected = [*clean, *(x + 0.25 * SIGN for x in clean), *clean]  # the sanity check comes first
    torch.testing.assert_close(module.inputs, expected)


# Refusals.


def test_inputs_outside_the_bounds() -> None:
    said = r"AdversarialTraining: the inputs range from \S+ to \S+, outside bounds=\(0, 0\.5\).*set mean and std"
    with pytest.raises(ValueError, match=said):
        train(attacker(bounds=[0, 0.5]), Linear(), points())
    train(attacker(bounds=[0, 100], mean=50.0, std=50.0), Linear(), points())
    with pytest.raises(ValueError, match=r"range from 5\S+ to \S+, outside bounds=\(0, 1\)"):
        train(attacker(bounds=[0, 1], mean=50.0, std=50.0), Linear(), points())


@pytest.mark.parametrize("name", ["mean", "std"])
def test_channels_that_are_too_many(name: str) -> None:
    space = {"mean": 0.0, "std": 1.0, name: [0.1, 0.2, 0.3]}
    with pytest.raises(
        ValueError, match=rf"{name} must have one number for each of 2 channels \(dimension 1 of \(4, 2\)\).*got 3\."
    ):
        train(attacker(**space), Linear(), points())


def test_a_loss_that_does_not_depend_on_the_input() -> None:
    class Detached(Linear):
        def input_of(self, batch: Any) -> Tensor:
            return batch[0].detach()

    with pytest.raises(
        RuntimeError, match=r"AdversarialTraining: The loss does not depend.*input_key.*without detach\(\)"
    ):
        train(attacker(), Detached(), points())


def test_a_step_that_changes_weights() -> None:
    class Changing(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                self.weight.mul_(0.9)
            return super().training_step(batch, batch_idx) + 0 * self.weight.sum()

    said = r"changes the parameter 'weight'.*on_train_batch_end, or train without AdversarialTraining\."
    with pytest.raises(RuntimeError, match=said):
        train(attacker(), Changing(), points())


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_manual_optimization_and_loops_that_fetch_their_batches() -> None:
    class Manual(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    class Fetching(Linear):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            return None

    with pytest.raises(ValueError, match=r"AdversarialTraining.*its training_step also steps"):
        train(attacker(), Manual(), points())
    with pytest.raises(ValueError, match=r"AdversarialTraining needs the batch, but training_step\(dataloader_iter\)"):
        train(attacker(), Fetching(), points())


def test_two_of_them() -> None:
    said = r"AdversarialTraining and AdversarialTraining\[b\] would attack each other's inputs"
    with pytest.raises(ValueError, match=said):
        train([attacker(), attacker(name="b")], Linear(), points())


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_sharded_strategies(strategy: str) -> None:
    trainer = train([], Linear(), points())
    trainer.strategy.__class__ = type(strategy, (type(trainer.strategy),), {})
    with pytest.raises(ValueError, match="AdversarialTraining"):
        attacker().setup(trainer, Linear(), "fit")


# The check for overfitting to the attack.


def test_accuracies_are_told_at_the_end_of_epochs(tmp_path: Path) -> None:
    rows: list[tuple[int, int]] = []

    class Record(CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            if any("accuracy" in key and key.startswith("adversarial/") for key in metrics):
                assert metrics.keys() == {"adversarial/attack_accuracy", "adversarial/pgd_accuracy"}
                assert all(0.0 <= value <= 1.0 for value in metrics.values())
                rows.append((module.current_epoch, module.trainer.fit_loop.batch_idx))

    for every, epochs in ((1, [0, 1, 2, 3, 4]), (2, [1, 3]), (None, [])):
        rows.clear()
        module = Classifier()
        train(attacker(check_every_n_epochs=every), module, max_epochs=5, logger=Record(tmp_path))
        assert rows == [(epoch, BATCHES - 1) for epoch in epochs]


class Masked(pl.LightningModule):
    """Its first input tells the class by far; in a later epoch a wave hides the gradient from a step that is long."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        margin = x[:, 0] * (2 * y - 1)  # the distance to the wrong side
        if self.current_epoch >= 2:
            # Wrong at a distance of 0.25 from the sample, and right again at 0.5, where one long step ends.
            moved = 1.0 - margin
            margin = 1.0 - 32 * moved * (0.5 - moved).clamp(min=0)
        logits = torch.stack([-margin, margin], 1) * (2 * y - 1).unsqueeze(1)
        return F.cross_entropy(logits * self.scale, y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def far_points() -> DataLoader[Any]:
    y = torch.arange(8) % 2
    return as_batches([[torch.stack([2.0 * y - 1, torch.zeros(8)], 1), y]])


def test_overfitting_to_the_attack_is_told() -> None:
    said = r"accuracy on one batch is 100\.0% under the attack.*but 0\.0% under PGD with 10 steps"
    with pytest.warns(UserWarning, match=said):
        train(attacker(0.5, check_every_n_epochs=1), Masked(), far_points(), max_epochs=3)


@pytest.mark.parametrize("arguments", [{"epsilon": 0.5, "attack": "pgd", "steps": 10}, {"epsilon": 2.0}])
def test_no_overfitting_is_told_where_both_attacks_do_as_well(arguments: Any, recwarn: Any) -> None:
    train(attacker(check_every_n_epochs=1, **arguments), Masked(), far_points(), max_epochs=3)
    assert not [warning for warning in recwarn if "overfitted" in str(warning.message)]


# Stopping, copying, clearing up.


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("every", [{"every_n_train_steps": 4}, {"every_n_epochs": 1}], ids=["steps", "epochs"])
def test_resume_is_bitwise(every: Any, tmp_path: Path) -> None:
    def make() -> AdversarialTraining:
        return AdversarialTraining(0.2, warmup_fraction=0.7, clean_fraction=0.25, check_every_n_epochs=1)

    def run(callbacks: list[Any], ckpt: Any = None) -> Any:
        module, loader = Classifier(dropout=0.0), ResumableLoader(samples(), BATCH)
        trainer = train(callbacks, module, loader, ckpt, max_epochs=3, enable_checkpointing=len(callbacks) > 1)
        state = state_of(trainer, module)
        del state["random"]
        checked = [trainer.callback_metrics[f"adversarial/{name}_accuracy"] for name in ("attack", "pgd")]
        return [state, module.batches[-3:], callbacks[0].state_dict(), checked]

    expected = run([make(), ModelCheckpoint(tmp_path, save_top_k=-1, **every)])
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"])
    assert len(paths) >= 3
    for path in paths[:-1]:  # behind the last one no whole epoch is left, whose first batch is checked
        assert_identical(run([make()], path), expected, path.name)


def test_copies_in_mid_fit() -> None:
    copies: list[Any] = []

    def duplicate(trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        own = next(c for c in trainer.callbacks if isinstance(c, AdversarialTraining))
        copies.extend([copy.deepcopy(own), pickle.loads(pickle.dumps(own))])
        copies.append(pickle.loads(pickle.dumps(pl_module.body)))

    # In front of the callback, so that what it keeps of the batch is still there.
    callback = attacker(attack="pgd", steps=2)
    found = state_of(train([At(on_train_batch_end=duplicate), callback], (module := Classifier())), module)
    plain = Classifier()
    assert_identical(found, state_of(train([attacker(attack="pgd", steps=2)], plain), plain))
    for other in (copies[0], copies[1]):
        assert other.settings == callback.settings
        module = Classifier()
        assert_identical(found, state_of(train([other], module), module))


class StopError(Exception):
    """Raised on purpose."""


@pytest.mark.parametrize("when", [None, 0, 5, 8])
def test_nothing_is_left_on_the_module(when: int | None) -> None:
    class Failing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            calls.append(1)
            if stops and len(calls) - 1 == when:  # 0, 5 and 8 are in an attack of two steps, 8 is a real one
                raise StopError
            return super().training_step(batch, batch_idx)

    calls: list[int] = []
    stops: list[int] = []
    module, callback = Failing(), attacker(attack="pgd", steps=2)
    train(attacker(0.0), module)
    before = {name: sorted(vars(part)) for name, part in module.named_modules()}
    calls.clear()
    stops.append(1)
    if when is None:
        train(callback, module)
    else:
        with pytest.raises(StopError):
            train(callback, module)
    assert {name: sorted(vars(part)) for name, part in module.named_modules()} == before
    assert callback._attacked is callback._place is callback._start_loss is None
    assert all(part.training for part in module.modules())
