"""Unlearning: the mask against autograd, weights that do not move, labels that the step gets, and what is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_grad.callbacks import InfoBatch, Lookahead, NMSparsity, NormClipping, SaliencyUnlearning
from lightning_grad.functional import saliency_masks
from lightning_grad.testing import assert_identical, make_trainer, state_of

SAMPLES, BATCH, CLASSES = 48, 8, 3
FORGET = [1, 4, 9, 20, 33, 47]


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(SAMPLES, 6, generator=generator), torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    )


class Net(pl.LightningModule):
    """A classifier that remembers the labels that its steps get."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 8), nn.ReLU()
        )
        self.head = nn.Linear(8, CLASSES)
        self.got: list[tuple[Tensor, Tensor]] = []
        self.validated: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch[0], batch[1]
        if self.training:
            self.got.append((x.clone(), y.clone()))
        return self.loss(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(batch[1].clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


def run(
    *callbacks: Any, module: Any = None, data: Any = None, epochs: int = 2, val: Any = None, **arguments: Any
) -> Any:
    data = make_data() if data is None else data
    torch.manual_seed(7)
    loader = data if isinstance(data, DataLoader) else DataLoader(data, BATCH, shuffle=True)
    trainer = make_trainer(callbacks=list(callbacks), max_epochs=epochs, **arguments)
    module = Net() if module is None else module
    trainer.fit(module, loader, val)
    return trainer, module


class MaskSpy(pl.Callback):
    """Keeps which entries a technique lets train."""

    def __init__(self, callback: SaliencyUnlearning) -> None:
        self.callback = callback

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        masks = self.callback._held.masks
        self.masks = {name: masks[id(p)] for name, p in pl_module.named_parameters()}


def expected_masks(keep: float = 0.5, forget: list[int] = FORGET) -> dict[str, Tensor]:
    module, (x, y) = Net().eval(), make_data().tensors
    F.cross_entropy(module(x[forget]), y[forget]).backward()
    gradients = [p.grad for p in module.parameters()]
    masks = saliency_masks(gradients, keep)  # type: ignore[arg-type]
    return dict(zip(dict(module.named_parameters()), masks, strict=True))


# The mask.


def test_the_mask_is_that_of_the_gradient_of_the_forget_loss_in_eval_mode() -> None:
    callback = SaliencyUnlearning(FORGET)
    spy = MaskSpy(callback)
    run(callback, spy, epochs=1)
    expected = expected_masks()
    assert_identical(spy.masks, expected)
    together = torch.cat([mask.flatten() for mask in expected.values()])
    assert abs(2 * int(together.sum()) - len(together)) <= 1
    assert any(not torch.equal(spy.masks[name], expected_masks(forget=[0, 2])[name]) for name in expected)


class Decay(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("kind", [Net, Decay])
@pytest.mark.parametrize("others", [[], [NormClipping(0.1)], [NMSparsity(include=["net.4"])]])
@pytest.mark.parametrize("is_first", [True, False])
def test_weights_outside_the_mask_keep_their_bits(kind: Any, others: list[Any], is_first: bool) -> None:
    callback = SaliencyUnlearning(FORGET)
    spy, start = MaskSpy(callback), kind()
    seen: list[dict[str, Tensor]] = []

    class Dense(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            weights = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
            seen.append({n: p.clone() for (n, _), p in zip(start.named_parameters(), weights, strict=True)})

    techniques = [callback, *others] if is_first else [*others, callback]
    run(*techniques, spy, Dense(), module=kind(), gradient_clip_val=None if others else 1.0)
    for weights in seen:
        for name, before in start.named_parameters():
            assert torch.equal(weights[name][~spy.masks[name]], before[~spy.masks[name]]), name
    moved = [(seen[-1][n] != before)[spy.masks[n]].float().mean() for n, before in start.named_parameters()]
    assert min(moved) > 0.8


@pytest.mark.parametrize("is_first", [True, False])
def test_slow_weights_outside_the_mask_keep_their_bits(is_first: bool) -> None:
    callback, slow, start = SaliencyUnlearning(FORGET), Lookahead(k=2), Decay()
    spy = MaskSpy(callback)
    _, module = run(*[callback, slow][:: 1 if is_first else -1], spy, module=Decay())
    for (name, after), before in zip(module.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(after[~spy.masks[name]], before[~spy.masks[name]]), name
        assert not torch.equal(after, before), name


@pytest.mark.parametrize("kind", [Net, Decay])
def test_masks_of_gradients_alone_would_not_hold_them(kind: Any) -> None:
    masks, start, module = expected_masks(), kind(), kind()

    class Naive(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            for name, p in pl_module.named_parameters():
                p.grad.mul_(masks[name])

    run(Naive(), module=module)
    moved = [(p != q)[~masks[n]].any() for (n, p), q in zip(module.named_parameters(), start.parameters(), strict=True)]
    assert any(moved)


def test_clipping_sees_the_gradients_of_the_mask_only() -> None:
    callback = SaliencyUnlearning(FORGET)
    spy, norms = MaskSpy(callback), []

    class Sees(Net):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            norms.append(sum((p.grad[~spy.masks[n]] != 0).sum() for n, p in self.named_parameters()))

    run(callback, spy, module=Sees(), epochs=1)
    assert norms == [0] * 6


def test_gradients_that_are_not_finite_do_not_reach_other_weights() -> None:
    """Products with a mask of zeros would be NaN."""
    callback, start, module = SaliencyUnlearning(FORGET), Net(), Net()
    spy = MaskSpy(callback)

    class Breaks(pl.Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            for p in pl_module.parameters():
                p.grad.fill_(float("nan"))

    run(callback, spy, Breaks(), module=module, epochs=1)
    for (name, after), before in zip(module.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(after[~spy.masks[name]], before[~spy.masks[name]])
        assert after[spy.masks[name]].isnan().all()


@pytest.mark.parametrize(("size", "scale"), [(1e-9, 2.0**20), (1.0, 2.0**24)])
def test_gradients_in_half_precision_neither_underflow_nor_overflow(size: float, scale: float) -> None:
    class Sized(Net):
        def loss(self, logits: Tensor, y: Tensor) -> Tensor:
            return size * super().loss(logits, y)

    callback = SaliencyUnlearning(FORGET)
    spy, scaler = MaskSpy(callback), torch.amp.GradScaler("cpu", init_scale=scale)
    run(callback, spy, module=Sized(), epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    same = [(spy.masks[name] == mask).flatten() for name, mask in expected_masks().items()]
    assert torch.cat(same).float().mean() > 0.97, "half precision moves few entries across the threshold"


def test_with_all_weights_and_the_same_labels_it_is_a_run_without_it() -> None:
    """Passes over the data leave no trace: order of samples, dropout, BatchNorm and metrics are bitwise the same."""
    own = SaliencyUnlearning(FORGET, keep=1.0, relabel=lambda batch, forget, generator: batch)
    assert_identical(state_of(*run(own)), state_of(*run()))


def test_a_sample_to_forget_in_no_batch_of_its_own_loss_is_an_error() -> None:
    class Blind(Net):
        def loss(self, logits: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(logits * 0.0, y)

    with pytest.raises(ValueError, match=r"gradient of the loss.*largest entry is 0"):
        run(SaliencyUnlearning(FORGET), module=Blind())


# The labels.


def labels_of(module: Net) -> list[dict[int, int]]:
    """Return, for each epoch, the label that each sample had in the steps."""
    x, _ = make_data().tensors
    steps = [pair for xs, ys in module.got for pair in zip(xs, ys.flatten(), strict=True)]
    rows = [(int((x == row).all(1).nonzero()), int(label)) for row, label in steps]
    return [dict(rows[start : start + SAMPLES]) for start in range(0, len(rows), SAMPLES)]


def assert_relabeled(module: Net, own: Tensor) -> None:
    first, second = labels_of(module)
    assert first == second, "drawn once"
    for index in range(SAMPLES):
        assert (first[index] == own[index]) == (index not in FORGET)


def test_samples_to_forget_have_another_label_in_every_step() -> None:
    data = make_data()
    before = data.tensors[1].clone()
    _, module = run(SaliencyUnlearning(FORGET), data=data, val=DataLoader(data, SAMPLES))
    assert_relabeled(module, before)
    assert torch.equal(data.tensors[1], before)
    assert all(torch.equal(labels, before) for labels in module.validated)
    _, other = run(SaliencyUnlearning(FORGET, seed=1))
    assert labels_of(module) != labels_of(other)


class HandWritten(Net):
    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return (logits.exp().sum(1).log() - logits[torch.arange(len(y)), y]).mean()


def test_a_hand_written_loss_is_seen_too() -> None:
    _, module = run(SaliencyUnlearning(FORGET, num_classes=CLASSES), module=HandWritten())
    assert_relabeled(module, make_data().tensors[1])

    class Steps(HandWritten):  # Adam would turn rounding errors into steps
        configure_optimizers = Decay.configure_optimizers

    _, module = run(SaliencyUnlearning(FORGET, num_classes=CLASSES), module=Steps())
    _, plain = run(SaliencyUnlearning(FORGET), module=Decay())
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"does not show the number of classes. Set num_classes"):
        run(SaliencyUnlearning(FORGET), module=HandWritten())


def test_more_classes_than_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match=f"num_classes must be at most {CLASSES}.*got {CLASSES + 2}"):
        run(SaliencyUnlearning(FORGET, num_classes=CLASSES + 2))


def as_dict(samples: list[Any]) -> dict[str, Any]:
    x, y = torch.utils.data.default_collate(samples)
    return {"id": torch.arange(len(y)), "flag": y > 0, "inputs": {"x": x}, "answer": y}


@pytest.mark.parametrize("base", [Net, HandWritten])
def test_labels_are_found_in_any_batch(base: Any) -> None:
    class Mapped(base):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["inputs"]["x"], batch["answer"]), batch_idx)  # type: ignore[no-any-return]

    loader = DataLoader(make_data(), BATCH, shuffle=True, collate_fn=as_dict)
    _, module = run(SaliencyUnlearning(FORGET, num_classes=CLASSES), module=Mapped(), data=loader)
    assert_relabeled(module, make_data().tensors[1])


def test_binary_labels_flip() -> None:
    class Binary(Net):
        def loss(self, logits: Tensor, y: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(logits[:, :1], y)

    x, y = make_data().tensors
    data = TensorDataset(x, (y > 0).float()[:, None])
    _, module = run(SaliencyUnlearning(FORGET), module=Binary(), data=data)
    assert_relabeled(module, (y > 0).long())


def test_two_parts_that_decide_the_loss_are_ambiguous() -> None:
    class Grouped(HandWritten):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y, group = batch
            return super().training_step((x + group[:, None], y), batch_idx)

    data = TensorDataset(*make_data().tensors, torch.arange(SAMPLES) % 2)
    with pytest.raises(ValueError, match=r"batch\[1\] and batch\[2\] both change.*Set relabel="):
        run(SaliencyUnlearning(FORGET, num_classes=CLASSES), module=Grouped(), data=data)

    class Called(Grouped):
        loss = Net.loss

    _, module = run(SaliencyUnlearning(FORGET), module=Called(), data=data)  # the call shows which one
    assert len(module.got) == 12


class Regression(Net):
    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(logits, y)


def test_targets_that_are_no_classes_need_a_function() -> None:
    x, _ = make_data().tensors
    data = TensorDataset(x, torch.randn(SAMPLES, CLASSES))
    with pytest.raises(ValueError, match=r"no tensor of classes \(B,\) changes.*Set relabel= to a function"):
        run(SaliencyUnlearning(FORGET), module=Regression(), data=data)
    seen: list[Tensor] = []

    def relabel(batch: Any, forget: Tensor, generator: torch.Generator) -> Any:
        seen.append(torch.rand(1, generator=generator))
        return [batch[0], torch.where(forget[:, None], 99.0, batch[1])]

    _, module = run(SaliencyUnlearning(FORGET, relabel=relabel), module=Regression(), data=data)
    rows = {
        int((x == row).all(1).nonzero())
        for xs, ys in module.got
        for row, y in zip(xs, ys, strict=True)
        if (y == 99.0).all()
    }
    assert rows == set(FORGET)
    first = list(seen)
    seen.clear()
    run(SaliencyUnlearning(FORGET, relabel=relabel), module=Regression(), data=data)
    assert_identical(seen, first)


def test_shares_of_right_answers() -> None:
    class Counts(Net):
        right: tuple[Tensor, ...] = ()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss

        def loss(self, logits: Tensor, y: Tensor) -> Tensor:
            if self.training:
                self.right = (*self.right, logits.argmax(1))
            return super().loss(logits, y)

    trainer, module = run(SaliencyUnlearning(FORGET), module=Counts(), epochs=1)
    own, forget = make_data().tensors[1], torch.zeros(SAMPLES, dtype=torch.bool)
    forget[FORGET] = True
    order = [int((make_data().tensors[0] == row).all(1).nonzero()) for xs, _ in module.got for row in xs]
    right = torch.cat(module.right) == own[order]
    metrics = trainer.callback_metrics
    assert metrics["unlearning/forget_accuracy"] == pytest.approx(right[forget[order]].float().mean().item())
    assert metrics["unlearning/retain_accuracy"] == pytest.approx(right[~forget[order]].float().mean().item())


def test_a_trained_model_forgets() -> None:
    class Fast(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net[3] = nn.Identity()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=2e-2)

    _, trained = run(module=Fast(), epochs=60)
    x, y = make_data().tensors
    assert (trained.eval()(x).argmax(1) == y).float().mean() > 0.9
    trained.train()
    _, module = run(SaliencyUnlearning(FORGET), module=trained, epochs=40)
    right = module.eval()(x).argmax(1) == y
    retain = torch.ones(SAMPLES, dtype=torch.bool)
    retain[FORGET] = False
    assert right[FORGET].float().mean() < 0.4
    assert right[retain].float().mean() > 0.85


# The samples.


def test_a_function_names_the_samples() -> None:
    x, _ = make_data().tensors
    by_hand = x[FORGET, 0].tolist()
    spied = SaliencyUnlearning(lambda sample: sample[0][0].item() in by_hand)
    (_trainer, module), (_, other) = run(spied), run(SaliencyUnlearning(FORGET))
    assert_identical(module.state_dict(), other.state_dict())


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(make_data())


@pytest.mark.parametrize(
    ("forget", "data", "error", "words"),
    [
        (FORGET, Endless(), TypeError, "samples of the IterableDataset Endless have none"),
        ([SAMPLES], None, ValueError, f"from 0 to {SAMPLES - 1}; got {SAMPLES}"),
        (list(range(SAMPLES)), None, ValueError, f"would forget all {SAMPLES} samples"),
        (lambda sample: False, None, ValueError, "forget returned False for all"),
        (lambda sample: True, None, ValueError, "would forget all"),
    ],
)
def test_bad_samples_are_refused_before_the_first_batch(forget: Any, data: Any, error: Any, words: str) -> None:
    module = Net()
    loader = DataLoader(data, BATCH) if data is not None else None
    with pytest.raises(error, match=words):
        run(SaliencyUnlearning(forget), module=module, data=loader)
    assert not module.got


def test_samples_that_are_never_drawn_are_refused() -> None:
    sampler = torch.utils.data.SubsetRandomSampler(range(10))
    with pytest.raises(ValueError, match="no index in forget is among all 10 samples that training draws"):
        run(SaliencyUnlearning([20]), data=DataLoader(make_data(), BATCH, sampler=sampler))


def test_several_loaders_and_another_choice_of_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="would both choose the training samples"):
        run(SaliencyUnlearning(FORGET), InfoBatch())

    class Keyed(Net):
        def train_dataloader(self) -> Any:
            return {"a": DataLoader(make_data(), BATCH)}

    with pytest.raises(ValueError, match="Train with one loader"):
        make_trainer(callbacks=[SaliencyUnlearning(FORGET)]).fit(Keyed())


# Resuming, and ranks.


def test_a_run_resumes_with_its_mask_and_its_labels(tmp_path: Path) -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net[3] = nn.Identity()  # Lightning restores no random state

    def train(epochs: int, ckpt: Any = None) -> Any:
        trainer = make_trainer(callbacks=[SaliencyUnlearning(FORGET)], max_epochs=epochs)
        module = Plain()
        trainer.fit(module, DataLoader(make_data(), BATCH), ckpt_path=ckpt)
        return trainer, module

    whole, (trainer, _) = train(4), train(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert_identical(state_of(*whole), state_of(*train(4, tmp_path / "two.ckpt")))
    other = make_trainer(callbacks=[SaliencyUnlearning([0])], max_epochs=4)
    with pytest.raises(ValueError, match="forget"):
        other.fit(Plain(), DataLoader(make_data(), BATCH), ckpt_path=tmp_path / "two.ckpt")


class Saves(pl.Callback):
    def __init__(self, folder: Path, spy: MaskSpy) -> None:
        self.folder, self.spy = folder, spy

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        kept = {"masks": self.spy.masks, "weights": pl_module.state_dict(), "got": labels_seen(pl_module)}
        torch.save(kept, self.folder / f"{trainer.global_rank}.pt")


def labels_seen(module: Net) -> dict[int, int]:
    x, _ = make_data().tensors
    return {int((x == row).all(1).nonzero()): int(y) for xs, ys in module.got for row, y in zip(xs, ys, strict=True)}


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_two_ranks_have_the_mask_and_the_labels_of_one(tmp_path: Path) -> None:
    callback = SaliencyUnlearning(FORGET)
    spy = MaskSpy(callback)
    run(callback, spy, Saves(tmp_path, spy), strategy="ddp_fork", devices=2, epochs=1)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, mask in expected_masks().items():
        assert torch.equal(first["masks"][name], second["masks"][name])
        assert (first["masks"][name] == mask).float().mean() > 0.98, "sums in another order may move the threshold"
    weights = {n: first["weights"][n] for n, _ in Net().named_parameters()}
    assert_identical(weights, {n: second["weights"][n] for n in weights})
    _, module = run(SaliencyUnlearning(FORGET), epochs=1)
    both = {**first["got"], **second["got"]}
    assert both == {index: label for index, label in labels_seen(module).items() if index in both}
    assert len(both) == SAMPLES
