"""Several techniques read the losses of one step, at most one weights them, and nothing stays behind."""

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.core.dispatch import wrap_method
from lightning_grad.core.losses.batch_sizes import batch_size_of
from lightning_grad.core.losses.given_functions import LossRequest
from lightning_grad.core.losses.loss_tap import read_losses, reweight_losses
from lightning_grad.core.quiet import quiet
from lightning_grad.functional import LossCall
from lightning_grad.testing import make_trainer

BATCH = (torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, -1.0]]), torch.tensor([0, 0, 1]))


class Linear(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)


class TwoLosses(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        return F.cross_entropy(logits, y) + F.mse_loss(logits, x)


class WithMetric(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        self.error = F.l1_loss(logits.detach(), x)
        with torch.no_grad():
            self.smoothed = F.cross_entropy(logits, y, label_smoothing=0.5)
        return F.cross_entropy(logits, y)


class HandWritten(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return -self(x).log_softmax(1).gather(1, y[:, None]).mean()


class Tokens(Linear):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["x"]).flatten(0, 1), batch["y"].flatten())


def losses_by_hand() -> Tensor:
    x, y = BATCH
    return x.logsumexp(1) - x[torch.arange(3), y]


def losses_of(module: Any, scale: float = 1.0) -> Tensor:
    logits = module(BATCH[0]) * scale
    return logits.logsumexp(1) - logits[torch.arange(3), BATCH[1]]


def assert_has_gradient_of(module: Any, loss: Tensor, expected: Tensor) -> None:
    found, wanted = (torch.autograd.grad(each, list(module.parameters())) for each in (loss, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


class Reader:
    def __init__(self) -> None:
        self.calls: list[LossCall] = []

    def __call__(self, call: LossCall) -> None:
        self.calls.append(call)


def reweigh(module: Any, weights: Tensor, loss_index: int | None = None) -> Callable[[], None]:
    return reweight_losses(module, lambda call: weights, LossRequest("InfoBatch", loss_index))


def test_several_readers_read_what_one_reweights() -> None:
    module, first, second = Linear(), Reader(), Reader()
    weights = torch.tensor([2.0, 0.0, 1.0])
    read_losses(module, first)
    reweigh(module, weights)
    read_losses(module, second)
    loss = module.training_step(BATCH, 0)
    for reader in (first, second):
        assert len(reader.calls) == 1
        torch.testing.assert_close(reader.calls[0].losses, losses_by_hand())
        assert not reader.calls[0].losses.requires_grad
    torch.testing.assert_close(loss, losses_by_hand().mean())  # its value stays
    assert_has_gradient_of(module, loss, (weights * losses_of(module)).mean())


def test_readers_alone_change_no_bit() -> None:
    module = Linear()
    expected = module.training_step(BATCH, 0)
    read_losses(module, Reader())
    assert torch.equal(module.training_step(BATCH, 0), expected)


def test_every_step_is_read_anew() -> None:
    module, reader = Linear(), Reader()
    read_losses(module, reader)
    for number in range(3):
        module.training_step(BATCH, number)
    assert len(reader.calls) == 3


def test_a_second_reweighter_is_refused() -> None:
    module = Linear()
    undo = reweigh(module, torch.ones(3))
    with pytest.raises(ValueError, match=r"InfoBatch and LossReweighting would both weight"):
        reweight_losses(module, lambda call: None, LossRequest("LossReweighting"))
    undo()
    reweight_losses(module, lambda call: None, LossRequest("LossReweighting"))
    reweigh(Linear(), torch.ones(3))  # another module is no concern of theirs


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_undone_in_any_order_the_step_is_what_it_was(order: tuple[int, ...]) -> None:
    module, reader = Linear(), Reader()
    undo = [
        read_losses(module, Reader()),
        reweigh(module, torch.zeros(3)),
        wrap_method(module, "training_step", lambda inner, *args: inner(*args)),
        read_losses(module, reader),
    ]
    for number in order:
        undo[number]()
        undo[number]()
    assert "training_step" not in vars(module)
    torch.testing.assert_close(module.training_step(BATCH, 0), losses_by_hand().mean())
    assert reader.calls == []
    read_losses(module, reader)
    module.training_step(BATCH, 0)
    assert len(reader.calls) == 1


def test_a_step_of_the_instance_is_given_back() -> None:
    module = Linear()

    def own(batch: Any, batch_idx: int) -> Tensor:
        return 2 * F.cross_entropy(module(batch[0]), batch[1])

    module.training_step = own
    undo = reweigh(module, torch.tensor([1.0, 0.0, 0.0]))
    assert_has_gradient_of(module, module.training_step(BATCH, 0), 2 * losses_of(module)[0] / 3)
    undo()
    assert module.training_step is own


def test_what_is_undone_early_leaves_the_others() -> None:
    module, first, second = Linear(), Reader(), Reader()
    undo = read_losses(module, first)
    undo_weights = reweigh(module, torch.zeros(3))
    read_losses(module, second)
    undo()
    undo_weights()
    torch.testing.assert_close(module.training_step(BATCH, 0), losses_by_hand().mean())
    assert (len(first.calls), len(second.calls)) == (0, 1)


def test_of_two_losses_one_must_be_named() -> None:
    module = TwoLosses()
    undo = read_losses(module, Reader())
    with pytest.raises(RuntimeError, match=r"2 losses.*0: cross_entropy, 1: mse_loss.*loss_index=0"):
        module.training_step(BATCH, 0)
    undo()
    reweigh(module, torch.ones(3))
    with pytest.raises(RuntimeError, match="2 losses"):
        module.training_step(BATCH, 0)


def test_each_reads_the_loss_that_it_names() -> None:
    module, classes, residuals = TwoLosses(), Reader(), Reader()
    read_losses(module, classes, LossRequest(loss_index=0))
    read_losses(module, residuals, LossRequest(loss_index=1))
    module.training_step(BATCH, 0)
    assert [reader.calls[0].name for reader in (classes, residuals)] == ["cross_entropy", "mse_loss"]


@pytest.mark.parametrize("which", [0, 1])
def test_only_the_loss_that_is_named_is_weighted(which: int) -> None:
    module = TwoLosses()
    module.layer.weight.data.mul_(1.5)
    weights = torch.tensor([0.5, 0.0, 3.0])
    reweigh(module, weights, loss_index=which)
    for number in range(2):
        logits = module(BATCH[0])
        both = [losses_of(module), (logits - BATCH[0]).square().mean(1)]
        both[which] = both[which] * weights
        assert_has_gradient_of(module, module.training_step(BATCH, number), both[0].mean() + both[1].mean())


def test_a_loss_that_the_step_does_not_have() -> None:
    module = Linear()
    read_losses(module, Reader(), LossRequest(loss_index=1))
    with pytest.raises(RuntimeError, match=r"loss_index=1 is out of range: the step has 1"):
        module.training_step(BATCH, 0)


@pytest.mark.parametrize("reweights", [False, True])
def test_a_hand_written_loss_says_what_to_do(reweights: bool) -> None:
    module = HandWritten()
    if reweights:
        reweigh(module, torch.ones(3))
    else:
        read_losses(module, Reader())
    with pytest.raises(RuntimeError, match="score_fn="):
        module.training_step(BATCH, 0)


def test_a_metric_is_not_taken_for_the_loss() -> None:
    module, reader = WithMetric(), Reader()
    read_losses(module, reader)
    weights = torch.tensor([2.0, 1.0, 0.0])
    reweigh(module, weights)
    loss = module.training_step(BATCH, 0)
    assert_has_gradient_of(module, loss, (weights * losses_of(module)).mean())
    assert [call.name for call in reader.calls] == ["cross_entropy"]
    assert reader.calls[0].options["label_smoothing"] == 0.0
    plain = WithMetric()
    plain.training_step(BATCH, 0)
    assert torch.equal(module.error, plain.error)
    assert torch.equal(module.smoothed, plain.smoothed)


def test_tokens_belong_to_their_samples() -> None:
    module, reader = Tokens(), Reader()
    x = torch.arange(12.0).reshape(2, 3, 2).cos()
    y = torch.tensor([[0, 1, -100], [1, 1, 0]])
    losses = F.cross_entropy(module(x).flatten(0, 1), y.flatten(), reduction="none").reshape(2, 3)
    read_losses(module, reader)
    weights = torch.tensor([0.5, 2.0])
    reweigh(module, weights)
    loss = module.training_step({"x": x, "y": y}, 0)
    own = torch.stack([losses[0, :2].mean(), losses[1].mean()]).detach()
    torch.testing.assert_close(reader.calls[0].losses, own)
    assert_has_gradient_of(module, loss, (weights[:, None] * losses).sum() / 5)


def test_a_step_that_has_its_batch_by_name() -> None:
    module, reader = Tokens(), Reader()
    read_losses(module, reader)
    module.training_step(batch={"x": torch.zeros(2, 3, 2), "y": torch.zeros(2, 3).long()}, batch_idx=0)
    assert reader.calls[0].samples == 2


def test_quiet_steps_are_neither_read_nor_weighted() -> None:
    module, reader = Linear(), Reader()
    read_losses(module, reader)
    reweigh(module, torch.zeros(3))
    with quiet(make_trainer(), module):
        torch.testing.assert_close(module.training_step(BATCH, 0), losses_by_hand().mean())
    assert reader.calls == []
    assert_has_gradient_of(module, module.training_step(BATCH, 0), 0.0 * losses_of(module).mean())


def test_an_exception_of_the_step_comes_through_and_the_next_step_is_read() -> None:
    module, reader = Linear(), Reader()
    read_losses(module, reader)
    with pytest.raises(IndexError):
        module.training_step((BATCH[0], torch.tensor([0, 0, 7])), 0)
    module.training_step(BATCH, 0)
    assert len(reader.calls) == 1


def test_a_module_that_is_tapped_can_be_pickled_without_the_tap() -> None:
    module, reader = Linear(), Reader()
    read_losses(module, reader)
    again = pickle.loads(pickle.dumps(module))
    again.training_step(BATCH, 0)
    assert reader.calls == []


class Skipping(HandWritten):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) and None


def test_a_batch_that_is_skipped_has_no_loss() -> None:
    module, reader = Skipping(), Reader()
    read_losses(module, reader)
    reweigh(module, torch.ones(3))
    assert module.training_step(BATCH, 0) is None
    assert reader.calls == []


def test_a_manual_step_returns_nothing_and_is_still_read() -> None:
    module = Skipping()
    module.automatic_optimization = False
    read_losses(module, Reader())
    with pytest.raises(RuntimeError, match="score_fn="):
        module.training_step(BATCH, 0)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(3, 2), 3),
        ([torch.zeros(3, 2), torch.zeros(3)], 3),
        ({"x": torch.zeros(3, 2), "more": [torch.zeros(3), torch.tensor(7.0)], "name": "a"}, 3),
        ([torch.zeros(3), torch.zeros(2)], None),
        ([["a", "b"]], None),
    ],
)
def test_size_of_a_batch(batch: Any, size: int | None) -> None:
    assert batch_size_of(batch) == size


@pytest.mark.parametrize("reads_first", [True, False])
def test_samples_are_counted_as_their_reader_does(reads_first: bool) -> None:
    """Whoever reads by index knows of how many samples a batch is, in whichever order techniques are listed."""
    module, seen = Linear(), []
    register = [
        lambda: read_losses(module, seen.append, samples=lambda _: 1),
        lambda: reweight_losses(module, lambda _: None, LossRequest("Weighting"), samples=lambda _: 3),
    ]
    for begin in register if reads_first else reversed(register):
        begin()
    module.training_step(BATCH, 0)
    assert [call.samples for call in seen] == [1]
