"""Domains get the weights of the published rule, the gradient is that of the weighted losses, and a matching domain wins."""

import csv
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from lightning_grad.callbacks import (
    CurriculumWeighting,
    DomainReweighting,
    InfoBatch,
    LossReweighting,
    RepeatedRandomSubset,
    ZLoss,
)
from lightning_grad.callbacks.data_pruning._domains import find_domains
from lightning_grad.callbacks.data_pruning._drawn_samples import DrawnSamples
from lightning_grad.core.undo import UndoList
from lightning_grad.functional import gradient_alignments, update_domain_weights
from lightning_grad.testing import assert_identical, state_of
from lightning_grad.testing.syncs import NoSync
from tests.callbacks.data_pruning.test_data_pruning import BATCH, CLASSES, SAMPLES, WIDTH, Manual, make_data, train
from tests.callbacks.data_pruning.test_loss_reweighting import Linear, Stream

NAMES = ["a", "b"]
DOMAINS = {"a": list(range(14)), "b": list(range(14, 20))}  # two samples belong to none
TARGET = Subset(make_data(30), range(SAMPLES, 30))


def target(trainer: pl.Trainer) -> Any:
    return TARGET


def sources_of(dataset: Any) -> list[str | None]:
    return ["a" if index < 14 else "b" if index < 20 else None for index in range(len(dataset))]


def whole(**changes: Any) -> DomainReweighting:
    """One whose updates read all samples of each domain and of the target."""
    return DomainReweighting(**{"domains": DOMAINS, "target": target, "every_n_steps": 2, "eta": 0.8, **changes})


# The weights and the gradients, against the definitions.


def gradient_of(matrix: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
    error = ((x @ matrix.T + bias).softmax(1) - F.one_hot(y, CLASSES)) / len(y)
    return [error.T @ x, error.sum(0)]


def mixtures_by_hand(steps: Any, every: int, smoothing: float, floor: float, normalize: bool) -> list[Tensor]:
    """The mixture in each step, from the weights that the step began with."""
    shares = torch.tensor([14 / 20, 6 / 20], dtype=torch.float64)
    raw, mean, found = shares, shares, list[Tensor]()
    x, y, _ = make_data().tensors
    target_x, target_y = (part[SAMPLES:] for part in make_data(30).tensors[:2])
    for number, (_, matrix, bias, *_) in enumerate(steps):
        if number and number % every == 0:
            gradients = [gradient_of(matrix, bias, x[rows], y[rows]) for rows in DOMAINS.values()]
            alignments = gradient_alignments(gradients, gradient_of(matrix, bias, target_x, target_y), normalize)
            raw = update_domain_weights(raw, alignments, 0.8, shares, floor)
            mean = smoothing * mean + (1 - smoothing) * raw
        found.append(mean)
    return found


@pytest.mark.parametrize(("smoothing", "floor", "normalize"), [(0.0, 0.0, False), (0.6, 0.1, True)])
def test_steps_follow_the_rule(smoothing: float, floor: float, normalize: bool) -> None:
    callback = whole(smoothing=smoothing, floor=floor, normalize=normalize)
    module = train(callback, Linear(), epochs=4).module
    mixtures = mixtures_by_hand(module.steps, 2, smoothing, floor, normalize)
    numbers = torch.tensor([0] * 14 + [1] * 6 + [2] * 2)
    for ((x, y, index), matrix, bias, loss, gradient), mixture in zip(module.steps, mixtures, strict=True):
        factors = torch.cat([mixture / torch.tensor([0.7, 0.3]), torch.ones(1)])
        logits = x @ matrix.T + bias
        error = (logits.softmax(1) - F.one_hot(y, CLASSES)).double()
        expected = (factors[numbers[index]][:, None] * error).T @ x.double() / len(y)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)
        assert loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-4)  # the step's own value stays
    assert float((mixtures[-1] - mixtures[0]).abs().max()) > 0.02
    rows = [[row["weight/a"], row["weight/b"]] for row in callback.record.rows()]
    torch.testing.assert_close(torch.tensor(rows, dtype=torch.float64), torch.stack(mixtures[2::2]), rtol=1e-4, atol=0)


class Two(Linear):
    """A step whose loss is two terms."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y) + 0.1 * logits.square().mean()
        self.steps.append([batch, self.head.weight.detach().clone(), self.head.bias.detach().clone(), loss.item()])
        return loss


def test_a_loss_of_several_terms() -> None:
    fixed = DomainReweighting(DOMAINS, eta=0.0, initial={"a": 0.25, "b": 0.75})
    for (x, y, index), matrix, bias, _, gradient in train(fixed, Two(), epochs=1).module.steps:
        weights = torch.tensor([0.25 / 0.7] * 14 + [0.75 / 0.3] * 6 + [1.0] * 2)[index]
        matrix.requires_grad_()
        logits = x @ matrix.T + bias
        losses = F.cross_entropy(logits, y, reduction="none") + 0.1 * logits.square().mean(1)
        (expected,) = torch.autograd.grad((weights * losses).mean(), matrix)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


class Ignored(Linear):
    """Ignores positions: samples of the first domain have one, others five."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        kept = torch.arange(5) < torch.where(index < 14, 1, 5)[:, None]
        logits = self(x)
        loss = F.cross_entropy(logits[:, :, None].expand(-1, -1, 5), torch.where(kept, y[:, None], -100))
        self.steps.append([batch, self.head.weight.detach().clone(), self.head.bias.detach().clone(), loss.item()])
        return loss


def test_a_loss_that_divides_by_positions_is_that_of_the_mixture() -> None:
    # The batch divides by the mean number of positions in the mixture, not in the data.
    fixed = DomainReweighting(DOMAINS, eta=0.0, initial={"a": 0.25, "b": 0.75})
    found = train(fixed, Ignored(), epochs=1, log_every_n_steps=1)
    for (x, y, index), matrix, bias, _, gradient in found.module.steps:
        weights = torch.tensor([0.25 / 0.7] * 14 + [0.75 / 0.3] * 6 + [1.0] * 2)[index]
        counts = torch.where(index < 14, 1.0, 5.0)
        error = (x @ matrix.T + bias).softmax(1) - F.one_hot(y, CLASSES)
        mean = (weights * counts).sum() / weights.sum()
        expected = ((weights * counts)[:, None] * error).T @ x / (len(y) * mean)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert float(found.trainer.callback_metrics["data/mean_weight"]) == pytest.approx(float(weights.mean()))


# A planted domain.


def planted(shifts: tuple[int, ...]) -> tuple[ConcatDataset[Any], TensorDataset]:
    """Domains that each shift the labels of their samples, and a target that does not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, WIDTH, generator=generator)
    y = x[:, :CLASSES].argmax(1)
    parts = [
        TensorDataset(x[n : n + 100], (y[n : n + 100] + shift) % CLASSES, torch.arange(100))
        for n, shift in zip(range(0, 400, 100), shifts, strict=True)
    ]
    return ConcatDataset(parts), TensorDataset(x[400:], y[400:], torch.arange(100))


def last_mixture(shifts: tuple[int, ...]) -> list[float]:
    data, wanted = planted(shifts)
    names = ["a", "b", "c", "d"]
    callback = DomainReweighting(names, lambda trainer: wanted, every_n_steps=4, samples=100)
    train(callback, Linear(), data, epochs=4, batch_size=20)
    last = callback.record.rows()[-1]
    return [last[f"weight/{name}"] for name in names]


def test_a_planted_matching_domain_rises_above_four_fifths() -> None:
    assert last_mixture((1, 2, 0, 1))[2] > 0.8


def test_domains_that_are_alike_do_not() -> None:
    assert max(last_mixture((0, 0, 0, 0))) < 0.5


# The domains.


@pytest.mark.parametrize("form", ["parts", "indices", "function"])
def test_three_ways_to_name_domains(form: str) -> None:
    data = ConcatDataset([Subset(make_data(), range(14)), Subset(make_data(), range(14, SAMPLES))])
    given = {"parts": NAMES, "indices": {"a": range(14), "b": range(14, SAMPLES)}, "function": sources_of}[form]
    found = find_domains(given, data, torch.arange(SAMPLES), "Technique")
    last = SAMPLES if form != "function" else 20
    assert found.names == NAMES
    assert found.members == [list(range(14)), list(range(14, last))]
    assert found.shares == pytest.approx([14 / last, (last - 14) / last])


def test_a_subset_of_parts_and_a_population() -> None:
    data = Subset(ConcatDataset([make_data(4), make_data(6)]), [9, 0, 5, 1])
    found = find_domains(NAMES, data, torch.tensor([1, 2, 3]), "Technique")
    assert found.of_sample.tolist() == [1, 0, 1, 0]
    assert found.members == [[1, 3], [2]]
    numbers = find_domains(lambda _: torch.tensor([7, 3, 7, 3]), data, torch.arange(4), "Technique")
    assert numbers.names == ["3", "7"]


@pytest.mark.parametrize(
    ("domains", "kind", "words"),
    [
        (NAMES, TypeError, "names the parts of a ConcatDataset, but the training set is TensorDataset"),
        ({"a": [0], "b": [SAMPLES]}, ValueError, "has the index 22 in 'b', but the training set has 22 samples"),
        (lambda _: ["a"], ValueError, "the domain of each of the 22 samples.* got 1 entries"),
        (lambda _: ["a"] * SAMPLES, ValueError, r"at least two different domains; got \['a'\]"),
        (lambda _: [0.5] * SAMPLES, ValueError, "a name, a number or None"),
        (lambda _: "text", ValueError, "got str"),
    ],
)
def test_domains_that_do_not_fit(domains: Any, kind: Any, words: str) -> None:
    steps = Steps()
    with pytest.raises(kind, match=words):
        train(DomainReweighting(domains, target), more=[steps])
    assert not steps.count


def test_parts_without_a_name_or_a_sample() -> None:
    data = ConcatDataset([make_data(4), make_data(6), make_data(2)])
    with pytest.raises(ValueError, match="names 2 domains, but the ConcatDataset has 3 parts"):
        find_domains(NAMES, data, torch.arange(12), "Technique")
    with pytest.raises(ValueError, match="no training sample of the domain 'c'"):
        find_domains(["a", "b", "c"], data, torch.arange(10), "Technique")


# The run.


class Steps(pl.Callback):
    count = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.count += 1


@pytest.mark.parametrize(
    ("wanted", "kind", "words"),
    [
        (lambda _: TensorDataset(make_data().tensors[0]), ValueError, r"batch\[1\] is missing in the target"),
        (lambda _: Stream(), TypeError, "reads the samples of its target by index, but the target is Stream"),
        (None, ValueError, "takes the validation set as its target, but there is none"),
    ],
)
def test_targets_of_another_form(wanted: Any, kind: Any, words: str) -> None:
    steps = Steps()
    with pytest.raises(kind, match=words):
        train(whole(target=wanted), more=[steps])
    assert not steps.count


def test_iterable_data() -> None:
    with pytest.raises(TypeError, match="the samples of the IterableDataset Stream have none"):
        train(whole(), loader=DataLoader(Stream(), BATCH), epochs=1)


@pytest.mark.parametrize("other", [LossReweighting, InfoBatch, CurriculumWeighting, ZLoss])
def test_one_writer_of_a_loss(other: Any) -> None:
    what = "change the loss of a step" if other is ZLoss else "weight the samples of a batch"
    with pytest.raises(ValueError, match=f"DomainReweighting and {other.__name__} would both {what}. Keep one"):
        train(whole(), more=[other()])


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="DomainReweighting does not work with manual optimization"):
        train(whole(), Manual())
    with pytest.raises(ValueError, match="one share for each of the domains a, b; got a, c"):
        train(whole(initial={"a": 0.5, "c": 0.5}))
    with pytest.raises(ValueError, match="the index -1, which is below 0"):
        DomainReweighting({"a": [-1], "b": [1]})


def test_without_a_step_size_it_is_a_fixed_mixture_or_the_plain_run() -> None:
    plain, off = (train(callback) for callback in (pl.Callback(), whole(eta=0.0)))
    assert_identical(state_of(plain.trainer, plain.module), state_of(off.trainer, off.module))
    fixed = whole(eta=0.0, initial={"a": 0.25, "b": 0.75})
    step = train(fixed, Linear(), epochs=1).module.steps[0]
    (x, y, index), matrix, bias = step[:3]
    weights = torch.tensor([0.25 / 0.7] * 14 + [0.75 / 0.3] * 6 + [1.0] * 2)[index]
    expected = (weights[:, None] * ((x @ matrix.T + bias).softmax(1) - F.one_hot(y, CLASSES))).T @ x / len(y)
    torch.testing.assert_close(step[-1], expected, rtol=1e-4, atol=1e-6)


def test_beside_a_callback_that_chooses_samples() -> None:
    fixed = {"eta": 0.0, "initial": {"a": 0.25, "b": 0.75}}
    for callbacks in ([whole(**fixed), RepeatedRandomSubset(0.5)][::order] for order in (1, -1)):
        steps = train(callbacks[0], Linear(), epochs=2, more=callbacks[1:]).module.steps
        assert sum(len(step[0][1]) for step in steps) < 2 * SAMPLES
        for (x, y, index), matrix, bias, _, gradient in steps:
            weights = torch.tensor([0.25 / 0.7] * 14 + [0.75 / 0.3] * 6 + [1.0] * 2)[index]
            expected = (weights[:, None] * ((x @ matrix.T + bias).softmax(1) - F.one_hot(y, CLASSES))).T @ x / len(y)
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


class WriteMixtures(pl.Callback):
    """Writes the mixture of each update, and that by hand."""

    def __init__(self, folder: Path, callback: DomainReweighting) -> None:
        self.folder, self.callback = folder, callback

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        own = [[row["weight/a"], row["weight/b"]] for row in self.callback.record.rows()]
        by_hand = mixtures_by_hand(pl_module.steps, 2, 0.5, 0.05, normalize=True)[2::2]
        found = {"own": own, "by hand": [each.tolist() for each in by_hand]}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))


def test_two_ranks_share_an_update(tmp_path: Path) -> None:
    callback = whole()
    more, loader = [WriteMixtures(tmp_path, callback)], DataLoader(make_data(), BATCH // 2)
    train(callback, Linear(), loader=loader, epochs=3, more=more, strategy="ddp_fork", devices=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["own"] == second["own"]
    assert len(first["own"]) >= 3
    torch.testing.assert_close(*(torch.tensor(first[name]) for name in ("own", "by hand")), rtol=1e-4, atol=1e-6)


def test_steps_between_updates_do_not_wait_for_the_device() -> None:
    class Guarded(DomainReweighting):
        guarded = 0

        def weigh(self, losses: Any) -> Tensor | None:
            if self._factors is None:  # the step after an update
                return super().weigh(losses)
            self.guarded += 1
            with NoSync():
                return super().weigh(losses)

        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 0 or trainer.global_step % 4 == 0:
                return super().on_train_batch_start(trainer, *args)
            with NoSync():
                return super().on_train_batch_start(trainer, *args)

    callback = Guarded(DOMAINS, target, every_n_steps=4)
    train(callback, epochs=4, log_every_n_steps=1000)
    assert callback.guarded > 4


def test_a_resumed_run_keeps_its_domains(tmp_path: Path) -> None:
    second = ["b"]

    def sources(dataset: Any) -> list[str]:
        return [second[0] if index < 9 else "a" for index in range(len(dataset))]

    first = train(whole(domains=sources), epochs=2, enable_checkpointing=False)
    first.trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = whole(domains=sources)
    train(again, epochs=3, ckpt=tmp_path / "a.ckpt")
    assert [row["step"] for row in again.record.rows()] == [2, 4, 6, 8]
    with pytest.raises(ValueError, match="its weights belong to these domains"):
        train(whole(), epochs=3, ckpt=tmp_path / "a.ckpt")
    second[0] = "x"
    with pytest.raises(ValueError, match="resumes with weights of a, b, but the domains are a, x"):
        train(whole(domains=sources), epochs=3, ckpt=tmp_path / "a.ckpt")


def test_logs_table_and_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    callback = whole()
    run = train(callback, epochs=3, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    metrics = run.trainer.callback_metrics
    names = {"weight/a", "weight/b", "mean_weight", "loss", "weighted_loss"}
    assert {key.removeprefix("data/") for key in metrics if key.startswith("data/")} == names
    assert float(metrics["data/weight/a"] + metrics["data/weight/b"]) == pytest.approx(1.0)
    rows = list(csv.DictReader((tmp_path / "domain_reweighting.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8]
    assert set(rows[0]) == {"step", "weight/a", "weight/b", "alignment/a", "alignment/b"}
    assert (tmp_path / "domain_reweighting.png").stat().st_size > 1000


def test_another_callback_must_choose_the_samples_of_the_same_loader() -> None:
    def read(key: str) -> None:
        callbacks = [RepeatedRandomSubset(loader_key=key)]
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks)
        DrawnSamples(trainer, "DomainReweighting", UndoList(), "a")

    read("a")
    with pytest.raises(ValueError, match="of the loader 'a', but RepeatedRandomSubset chooses those of the loader 'b'"):
        read("b")
