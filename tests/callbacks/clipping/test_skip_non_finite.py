"""Skipping steps that are not finite: what stays unmoved, what is said, when it raises, fp16 and two ranks."""

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_grad.callbacks import GradientNoise, NormClipping, SkipNonFinite
from lightning_grad.testing import assert_identical
from tests.callbacks.clipping import Dictated, Gradients, Regression, Spoil, pairs, rows_of, small_net, train

NAN, INF = float("nan"), float("inf")
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
}


class States(pl.Callback):
    """Keeps the weights and the optimizer's state after every batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        moments = [
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
            for state in trainer.optimizers[0].state.values()
        ]
        self.seen.append((weights, moments))


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("step", [0, 3])
def test_a_skipped_step_moves_no_bit(step: int, optimizer: str, bad: float) -> None:
    module, states = Regression(small_net(), OPTIMIZERS[optimizer], {step: bad}), States()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    before = Gradients()
    with pytest.warns(UserWarning, match="skips a step"):
        train([before, SkipNonFinite(), states], module, pairs())
    assert not any(gradient.isfinite().all() for gradient in before.seen[step].values())
    previous = (start, []) if step == 0 else states.seen[step - 1]
    assert_identical(previous, states.seen[step])
    for earlier, later in zip([(start, []), *states.seen], states.seen, strict=False):
        same = all(torch.equal(earlier[0][name], later[0][name]) for name in start)
        assert same == (later is states.seen[step]), "the other steps are made"
    assert all(parameter.isfinite().all() for parameter in module.parameters())


class OfItsOwn(torch.optim.SGD):
    """Leaves zeros, as some optimizers do."""

    def zero_grad(self) -> None:  # type: ignore[override]
        super().zero_grad(set_to_none=False)


def test_an_optimizer_that_clears_gradients_in_its_own_way() -> None:
    module, states = Regression(small_net(), lambda p: OfItsOwn(p, 0.1, 0.9, weight_decay=0.1), {3: NAN}), States()
    with pytest.warns(UserWarning, match="skips a step"):
        train([SkipNonFinite(), states], module, pairs())
    assert_identical(states.seen[2], states.seen[3])


def test_one_bad_entry_of_one_gradient_is_enough() -> None:
    data = torch.ones(3, 8)
    data[1, 7] = NAN
    module, states = Dictated(("a", "b")), States()
    with pytest.warns(UserWarning, match=r"1 of 2 gradients are not finite, starting with b, batch 1 \(loss nan\)"):
        train([SkipNonFinite(), states], module, rows_of(data))
    assert_identical(states.seen[0], states.seen[1])
    assert torch.equal(module.b, torch.full((4,), -0.2))


def test_large_gradients_are_finite() -> None:
    module = Dictated()
    train([SkipNonFinite()], module, rows_of(torch.full((2, 4), 1e38)))
    assert (module.w < 0.0).all()


def test_what_is_not_looked_at_is_not_skipped() -> None:
    data = torch.ones(2, 8)
    data[0, 7] = NAN
    module = Dictated(("a", "b"))
    train([SkipNonFinite(include=["a"])], module, rows_of(data))
    assert torch.equal(module.a, torch.full((4,), -0.2))
    assert module.b[3].isnan()


def test_rules_after_it_see_nothing_of_the_step() -> None:
    data = torch.ones(4, 4)
    data[1] = NAN
    clip, after = NormClipping(0.5), Gradients()
    module = Dictated()
    train([SkipNonFinite(max_warnings=0), clip, GradientNoise(eta=0.0), after], module, rows_of(data))
    assert [len(step) for step in after.seen] == [1, 0, 1, 1]
    assert clip.state_dict()["optimizers"]["0"]["states"][""]["clipped"].item() == 3
    torch.testing.assert_close(module.w, torch.full((4,), -3 * 0.1 * 0.25))


# What is said.


class Backwards(nn.Module):
    """Registers its layers in the reverse of the order in which it uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.first = nn.Linear(4, 3), nn.Linear(5, 4), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def test_the_first_parameter_in_the_order_of_the_forward_pass_is_named() -> None:
    module = Regression(Backwards(), spoilt={4: NAN})
    assert next(iter(dict(module.named_parameters()))) == "net.last.weight"
    said = r"SkipNonFinite skips a step: 6 of 6 gradients are not finite, starting with net.first.weight, batch 4 \(loss nan\)"
    with pytest.warns(UserWarning, match=said):
        train([SkipNonFinite()], module, pairs())
    assert not any(child._forward_pre_hooks for child in module.modules())


@pytest.mark.parametrize(("which", "first"), [(["middle", "last"], "net.middle.weight"), (["last"], "net.last.weight")])
def test_only_what_is_bad_is_named(which: list[str], first: str) -> None:
    class Some(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 2:
                for name in which:
                    getattr(pl_module.net, name).weight.grad[0, 0] = INF

    said = rf"{len(which)} of 6 gradients are not finite, starting with {first}, batch 2 \(loss \d"
    with pytest.warns(UserWarning, match=said):
        train([Some(), SkipNonFinite()], Regression(Backwards()), pairs())


def test_the_loss_that_is_told_is_that_of_the_training_step() -> None:
    """And not the one that Lightning divides by the number of accumulated batches."""
    data = torch.zeros(2, 4)
    with pytest.warns(UserWarning, match=r"batch 1 \(loss 3\)"):
        train(
            [Spoil({0: NAN}), SkipNonFinite()],
            _ConstantLoss(),
            rows_of(data),
            accumulate_grad_batches=2,
        )


class _ConstantLoss(Dictated):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 3.0


@pytest.mark.parametrize("limit", [0, 1, 2, 5])
def test_so_many_skips_are_told_and_the_others_counted(limit: int) -> None:
    data = torch.ones(8, 4)
    data[::2] = NAN
    callback = SkipNonFinite(max_warnings=limit)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train([callback], Dictated(), rows_of(data), log_every_n_steps=1)
    told = [str(warning.message) for warning in caught if "skips a step" in str(warning.message)]
    assert [f"batch {i}" in message for i, message in zip((0, 2, 4, 6), told, strict=False)] == [True] * min(limit, 4)
    assert len(told) == min(limit, 4)
    assert [message.endswith("Later ones are only counted.") for message in told] == [
        number == limit for number in range(1, len(told) + 1)
    ]
    assert callback.state_dict()["skipped"] == {"0": 4}
    assert trainer.callback_metrics["grad/skip_non_finite/skipped"].item() == 4.0


# A run of them.


def test_so_many_in_a_row_raise_and_say_what_to_do() -> None:
    data = torch.ones(9, 4)
    data[[1, 2, 4, 5, 6]] = NAN  # two, then three
    module, states = Dictated(), States()
    said = (
        r"3 steps in a row .* in the last, 1 of 1 gradients are not finite, starting with w, batch 6 .*"
        r" Lower the learning rate, or resume"
    )
    with pytest.raises(RuntimeError, match=said), pytest.warns(UserWarning, match="skips a step"):
        train([SkipNonFinite(max_in_row=3), states], module, rows_of(data))
    assert len(states.seen) == 6
    assert module.w.isfinite().all()


def test_without_a_limit_it_goes_on() -> None:
    data = torch.full((15, 4), NAN)
    module, callback = Dictated(), SkipNonFinite(max_in_row=None, max_warnings=0)
    trainer = train([callback], module, rows_of(data))
    assert trainer.global_step == 15
    assert callback.state_dict()["skipped"] == {"0": 15}
    assert torch.equal(module.w, torch.zeros(4))


def test_each_optimizer_skips_and_counts_for_itself() -> None:
    class Two(Dictated):
        def __init__(self) -> None:
            super().__init__(("a", "b"))
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([parameter], lr=0.1) for parameter in (self.a, self.b)]

    data = torch.ones(5, 8)
    data[1:4, 4:] = NAN
    module, callback = Two(), SkipNonFinite(max_in_row=4, max_warnings=0)
    train([callback], module, rows_of(data))
    torch.testing.assert_close(module.a, torch.full((4,), -0.5))
    torch.testing.assert_close(module.b, torch.full((4,), -0.2))
    assert callback.state_dict()["skipped"].get("0", 0) == 0
    assert callback.state_dict()["skipped"]["1"] == 3


# fp16.


def run_fp16(data: Tensor, scale: float, **arguments: Any) -> tuple[SkipNonFinite, Dictated, float]:
    callback, module = SkipNonFinite(**arguments), Dictated()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    train([callback], module, rows_of(data), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    return callback, module, scaler.get_scale()


def test_overflow_in_fp16_is_left_to_the_scaler() -> None:
    data = torch.ones(10, 4)
    data[:6] = INF
    # No warning, and no error after one in a row: the scale is still above 1.
    callback, module, scale = run_fp16(data, 2.0**10, max_in_row=1)
    assert scale == 2.0**4
    assert callback.state_dict()["skipped"] == {"0": 6}
    assert callback.state_dict()["in_row"] == {"0": 0}
    torch.testing.assert_close(module.w, torch.full((4,), -0.4))


def test_gradients_that_stay_bad_when_the_scale_is_spent_raise() -> None:
    # The scale is 2, 1, and from the third step on below 1.
    with (
        pytest.raises(RuntimeError, match=r"2 steps in a row .* batch 3"),
        pytest.warns(UserWarning, match="skips a step: .* starting with w.*batch 2"),
    ):
        run_fp16(torch.full((8, 4), NAN), 2.0, max_in_row=2)


# Two ranks.


class Ranked(Regression):
    """Every rank has the same data, but for one batch of one rank."""

    def __init__(self, net: nn.Module, spoilt: dict[int, float], rank: int) -> None:
        super().__init__(net, OPTIMIZERS["adamw"], spoilt)
        self.rank = rank

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == self.rank:
            return super().training_step(batch, batch_idx)
        spoilt, self.spoilt = self.spoilt, {}
        loss = super().training_step(batch, batch_idx)
        self.spoilt = spoilt
        return loss


class SaveStates(States):
    """Every rank writes what it has seen."""

    def __init__(self, folder: Any, skip: SkipNonFinite) -> None:
        super().__init__()
        self.folder, self.skip = folder, skip

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save((self.seen, self.skip.state_dict()["skipped"]), self.folder / f"{trainer.global_rank}.pt")


DDP = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("by", ["batch", "gradient"])
def test_both_ranks_skip_when_one_has_bad_data(by: str, rank: int, tmp_path: Any) -> None:
    skip = SkipNonFinite(max_warnings=0)
    module = Ranked(small_net(), {3: NAN} if by == "batch" else {}, rank)
    # A gradient that is spoilt after the reduction is seen by its rank alone.
    spoil = [Spoil({3: NAN}, rank)] if by == "gradient" else []
    train([*spoil, skip, SaveStates(tmp_path, skip)], module, pairs(), **DDP)
    (first, skipped), (second, skipped_too) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert skipped == skipped_too == {"0": 1}
    assert_identical(first, second)
    assert_identical(first[2], first[3])
    assert not torch.equal(first[4][0]["net.0.weight"], first[3][0]["net.0.weight"])
    assert all(value.isfinite().all() for value in first[5][0].values())
