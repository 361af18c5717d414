"""OptimizerCallback: which steps its hooks see, optimizers that are replaced in mid-run, rates, moments, backward."""

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim.lr_scheduler import MultiplicativeLR

from lightning_grad.callbacks import MomentumReset, SkipNonFinite
from lightning_grad.core import OptimizerCallback
from lightning_grad.testing import assert_identical, fit, make_classifier, state_of
from tests.callbacks.clipping import Dictated, rows_of, train

RATE = 1e-2
DATA = torch.randn(12, 4, generator=torch.Generator().manual_seed(2)) + 2.0
# The module prints that it has several optimizers only under manual optimization.
pytestmark = pytest.mark.filterwarnings("ignore:You defined multiple optimizers")


def adam(parameters: Any) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=RATE)


class Steps(OptimizerCallback):
    """Writes down what its hooks are called for."""

    namespace = "steps"

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self.seen: list[tuple[str, int, type]] = []

    def _note(self, what: str, index: int, optimizer: Any) -> None:
        assert not torch.is_grad_enabled()
        self.seen.append((what, index, type(optimizer)))

    def before_step(self, index: int, optimizer: Any) -> None:
        self._note("before_step", index, optimizer)

    def before_update(self, index: int, optimizer: Any) -> None:
        self._note("before_update", index, optimizer)

    def after_step(self, index: int, optimizer: Any) -> None:
        self._note("after_step", index, optimizer)

    def count(self, what: str, index: int = 0) -> int:
        return sum(seen[:2] == (what, index) for seen in self.seen)


class Times(OptimizerCallback):
    """Multiplies the rates of every step, before it begins or when its gradients are there."""

    namespace = "times"

    def __init__(self, factor: float, early: bool = True, name: str | None = None) -> None:
        super().__init__(name)
        self.factor, self.early = factor, early

    def before_step(self, index: int, optimizer: Any) -> None:
        if self.early:
            self.multiply_rates(index, self.factor)

    def before_update(self, index: int, optimizer: Any) -> None:
        if not self.early:
            self.multiply_rates(index, self.factor)


class Rates(pl.Callback):
    """Notes the rate that each update is made with, and the one after it; put before others in the list."""

    def __init__(self) -> None:
        self.inside: list[float] = []
        self.outside: list[float] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.watch(trainer.optimizers[0])

    def watch(self, optimizer: Any) -> None:
        optimizer.register_step_post_hook(lambda o, *_: self.inside.append(o.param_groups[0]["lr"]))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.outside.append(trainer.optimizers[0].param_groups[0]["lr"])


# Which steps are seen.


def test_hooks_are_called_once_a_step_in_order() -> None:
    steps = Steps()
    train([steps], Dictated(make_optimizer=adam), rows_of(DATA), accumulate_grad_batches=3)
    assert [what for what, *_ in steps.seen] == ["before_step", "before_update", "after_step"] * 4


def test_a_step_that_is_skipped_for_its_gradients_is_not_made() -> None:
    data = DATA.clone()
    data[3] = torch.nan
    steps = Steps()
    train([steps, SkipNonFinite(max_warnings=0)], Dictated(make_optimizer=adam), rows_of(data))
    assert (steps.count("before_step"), steps.count("before_update"), steps.count("after_step")) == (12, 12, 11)


def scaled(data: Tensor, *callbacks: Any) -> tuple[Any, Any]:
    schedule = lambda o: MultiplicativeLR(o, lambda _: 0.9)  # noqa: E731
    module = Dictated(("w",), adam, schedule)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    return train(list(callbacks), module, rows_of(data), plugins=[plugin]), module


def test_a_step_that_the_scaler_skips_has_gradients_and_nothing_else() -> None:
    data, steps = DATA.clone(), Steps()
    data[5] = torch.inf
    scaled(data, steps)
    assert (steps.count("before_step"), steps.count("before_update"), steps.count("after_step")) == (11, 12, 11)
    order = [what for what, *_ in steps.seen[:3]]
    assert order == ["before_update", "before_step", "after_step"]


@pytest.mark.parametrize("early", [True, False])
def test_a_skipped_step_gives_its_rate_back_before_the_scheduler_reads_it(early: bool) -> None:
    """The schedule computes each rate from the last, so one that is not given back in time is lost for good."""
    data = DATA.clone()
    data[5] = torch.inf
    without, beside = Rates(), Rates()
    scaled(data, without)
    scaled(data, beside, Times(0.1, early))
    assert beside.outside == without.outside
    assert len(set(beside.outside)) == 12
    assert beside.inside == pytest.approx([0.1 * rate for rate in without.inside])
    assert len(beside.inside) == 11


@pytest.mark.parametrize("early", [True, False])
def test_a_step_that_raises_gives_its_rate_back_at_once(early: bool) -> None:
    class Raises(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            assert optimizer.param_groups[0]["lr"] == 0.1 * RATE
            self.optimizer = optimizer
            raise KeyError("on purpose")

    raises = Raises()
    with pytest.raises(KeyError):
        train([Times(0.1, early), raises], Dictated(make_optimizer=adam), rows_of(DATA))
    assert raises.optimizer.param_groups[0]["lr"] == RATE


def test_rates_of_several_callbacks_multiply() -> None:
    rates = Rates()
    train([rates, Times(0.5), Times(0.1, early=False, name="b")], Dictated(make_optimizer=adam), rows_of(DATA))
    assert rates.inside == [RATE * 0.5 * 0.1] * 12
    assert rates.outside == [RATE] * 12


def test_a_warmup_and_another_factor_multiply() -> None:
    """Each puts back what it has multiplied; with a copy of its own, one would put back the other's rate."""
    alone, both = Rates(), Rates()
    train([alone, MomentumReset(3, warmup_steps=2)], Dictated(make_optimizer=adam), rows_of(DATA))
    for callbacks in ([MomentumReset(3, warmup_steps=2), Times(0.5)], [Times(0.5), MomentumReset(3, warmup_steps=2)]):
        both = Rates()
        train([both, *callbacks], Dictated(make_optimizer=adam), rows_of(DATA))
        assert both.inside == pytest.approx([0.5 * rate for rate in alone.inside], rel=1e-15)
        assert both.outside == [RATE] * 12


# Optimizers that are replaced.


class Swap(pl.Callback):
    """Replaces an optimizer in mid-run, as the trainer's, without a word to others."""

    def __init__(
        self, hook: str, at: int = 5, index: int = 0, make: Any = torch.optim.RAdam, share: bool = False
    ) -> None:
        self.hook, self.at, self.index, self.make, self.share = hook, at, index, make, share
        self.batches = 0
        self.old: Any = None
        setattr(self, hook, self._swap)

    def _swap(self, trainer: Any, *_: Any) -> None:
        self.batches += 1
        if self.batches == self.at:
            optimizers = list(trainer.optimizers)
            self.old = optimizers[self.index]
            groups = [{"params": group["params"], "lr": group["lr"]} for group in self.old.param_groups]
            optimizers[self.index] = self.make(groups)
            if self.share:  # whoever holds the old one shall hold the new one
                for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
                    vars(optimizers[self.index])[name] = vars(self.old)[name]
                self.old.__dict__ = optimizers[self.index].__dict__
            trainer.strategy.optimizers = optimizers


class Naive(pl.Callback):
    """Hooks the optimizers that there are when the fit begins."""

    def __init__(self) -> None:
        self.steps = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("hook", "share"),
    [
        ("on_train_batch_start", False),
        ("on_train_batch_start", True),
        ("on_train_batch_end", False),
        ("on_train_batch_end", True),
        ("on_before_zero_grad", False),  # within the step of the old one, which it still makes
    ],
)
def test_steps_are_seen_when_an_optimizer_was_replaced(hook: str, first: bool, share: bool) -> None:
    swap, steps, naive = Swap(hook, share=share), Steps(), Naive()
    callbacks = [swap, steps, naive] if first else [steps, naive, swap]
    trainer = train(callbacks, Dictated(make_optimizer=adam), rows_of(DATA))
    until = {"on_train_batch_start": 4, "on_train_batch_end": 5, "on_before_zero_grad": 5}[hook]
    made = [kind for what, _, kind in steps.seen if what == "after_step"]
    assert made == [torch.optim.Adam] * until + [torch.optim.RAdam] * (12 - until)
    assert [what for what, *_ in steps.seen] == ["before_step", "before_update", "after_step"] * 12
    assert naive.steps == (12 if share else until), "the naive way misses steps"
    for optimizer in (swap.old, *trainer.optimizers):
        assert len(optimizer._optimizer_step_pre_hooks) == 0


@pytest.mark.parametrize("index", [0, 1])
def test_of_two_optimizers_one_is_replaced_under_manual_optimization(index: int) -> None:
    swap, steps = Swap("on_train_batch_start", 3, index), Steps()
    fit([steps, swap], make_classifier(manual=True), max_epochs=2)
    for number in range(2):
        kinds = [kind for what, which, kind in steps.seen if (what, which) == ("after_step", number)]
        later = torch.optim.RAdam if number == index else torch.optim.AdamW
        assert kinds == [torch.optim.AdamW] * 2 + [later] * 10


class Raw(Dictated):
    """Steps past Lightning."""

    def __init__(self) -> None:
        super().__init__(make_optimizer=adam)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.trainer.optimizers[0]
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_steps_past_lightning_are_seen_when_an_optimizer_was_replaced() -> None:
    swap, steps = Swap("on_train_batch_end"), Steps()
    train([swap, steps], Raw(), rows_of(DATA))
    assert steps.count("after_step") == steps.count("before_step") == 12
    assert steps.count("before_update") == 0


@pytest.mark.parametrize("share", [False, True])
def test_momentum_reset_goes_on_with_the_optimizer_that_took_the_place(share: bool) -> None:
    rates, reset = Rates(), MomentumReset(every_n_steps=4, warmup_steps=2)
    swap = Swap("on_train_batch_end", share=share)
    if not share:
        watching = lambda groups: [made := torch.optim.RAdam(groups), rates.watch(made)][0]  # noqa: E731
        swap.make = watching
    train([rates, swap, reset], Dictated(make_optimizer=adam), rows_of(DATA))
    assert reset.state_dict()["steps"] == {"0": 12}
    assert reset.state_dict()["resets"] == {"0": 3}
    held = [step for step, rate in enumerate(rates.inside, 1) if rate < RATE]
    assert held == [4, 5, 8, 9, 12]
    assert rates.outside == [RATE] * 12


def test_an_optimizer_that_it_does_not_act_on_takes_the_place() -> None:
    reset = MomentumReset(every_n_steps=4, warmup_steps=2)
    train([Swap("on_train_batch_end", make=torch.optim.SGD), reset], Dictated(make_optimizer=adam), rows_of(DATA))
    assert reset.state_dict()["steps"] == {"0": 5}
    assert reset.watched == {}


def test_rates_of_an_optimizer_that_is_replaced_in_a_step_are_given_back() -> None:
    swap = Swap("on_before_zero_grad")
    train([Times(0.1), swap], Dictated(make_optimizer=adam), rows_of(DATA))
    assert swap.old.param_groups[0]["lr"] == RATE


# What it acts on.


class OnlySecond(Steps):
    def acts_on(self, index: int, optimizer: Any) -> bool:
        return index == 1


def test_optimizers_that_it_does_not_act_on_are_left_alone() -> None:
    steps = OnlySecond()
    trainer, _ = fit([steps], make_classifier(manual=True), max_epochs=1)
    assert {index for _, index, _ in steps.seen} == {1}
    assert steps.count("after_step", 1) == steps.count("before_update", 1) == 6
    assert len(trainer.optimizers) == 2


def test_what_is_logged_has_the_number_where_there_are_several() -> None:
    class Logs(Steps):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            for index in self.watched:
                self.log_scalars(pl_module, {self.quantity_of(index, "n"): float(self.count("after_step", index))})

    one, _ = fit([Logs()], max_epochs=1)
    assert {key for key in one.callback_metrics if "steps" in key} == {"steps/n"}
    two, _ = fit([Logs()], make_classifier(manual=True), max_epochs=1)
    assert {key for key in two.callback_metrics if "steps" in key} == {"steps/optimizer0/n", "steps/optimizer1/n"}


def test_moments_are_reset_and_steps_stay() -> None:
    seen: list[tuple[float, float]] = []

    class Resets(OptimizerCallback):
        namespace = "resets"

        def before_step(self, index: int, optimizer: Any) -> None:
            self.reset_moments(index)
            for state in optimizer.state.values():
                seen.append((state["exp_avg"].abs().sum().item(), state["step"].item()))

    train([Resets()], Dictated(make_optimizer=adam), rows_of(DATA[:4]))
    assert seen == [(0.0, 1.0), (0.0, 2.0), (0.0, 3.0)]


# Backward.


class CreatesGraph(OptimizerCallback):
    """Has the graph of the gradients made, and reads a second derivative off it."""

    namespace = "graph"

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self.curvatures: list[float] = []

    def run_backward(self, backward: Any, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        return backward(loss, *args, **{**kwargs, "create_graph": True})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        (weight,) = pl_module.parameters()
        (second,) = torch.autograd.grad(weight.grad.sum(), weight)
        self.curvatures.append(second[0].item())
        weight.grad = weight.grad.detach()


class Cubic(Dictated):
    manual = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.automatic_optimization = not self.manual
        loss = (1.0 + self.w).pow(3).sum()
        if not self.manual:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return None


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("manual", [False, True])
def test_backward_is_wrapped(manual: bool) -> None:
    module = Cubic(make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3))
    module.manual, module.automatic_optimization = manual, not manual
    callback = CreatesGraph()
    trainer = train([callback], module, rows_of(DATA[:3]))
    assert callback.curvatures[0] == 6.0
    assert len(callback.curvatures) == 3
    assert "backward" not in vars(trainer.strategy)
    with pytest.raises(RuntimeError, match="does not require grad"):
        train(
            [type("Plain", (CreatesGraph,), {"run_backward": OptimizerCallback.run_backward})()], module, rows_of(DATA)
        )


# Neutral, undone, copied.


def test_without_a_hook_it_changes_no_bit() -> None:
    assert_identical(state_of(*fit([Steps()])), state_of(*fit([])))
    assert_identical(state_of(*fit([Times(1.0)])), state_of(*fit([])))


class Copies(pl.Callback):
    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.copies: list[Any] = []

    def on_before_optimizer_step(self, *_: Any) -> None:
        if not self.copies:
            self.copies = [copy.deepcopy(self.callback), pickle.loads(pickle.dumps(self.callback))]


def test_it_is_copied_in_a_step_and_the_copies_work() -> None:
    callback = MomentumReset(every_n_steps=3, warmup_steps=2)
    copies = Copies(callback)
    _, module = fit([callback, copies])
    for copied in copies.copies:
        _, other = fit([copied])
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_what_is_remembered_of_an_optimizer_is_saved_and_goes_on_with_another_in_its_place(tmp_path: Any) -> None:
    class Remembers(OptimizerCallback):
        namespace = "remembers"

        def after_step(self, index: int, optimizer: Any) -> None:
            memory = self.memory(index)
            memory["steps"] = memory.get("steps", 0) + 1
            memory["sums"] = [memory.get("sums", [torch.zeros(())])[0] + optimizer.param_groups[0]["params"][0].sum()]

    callback, swap = Remembers(), Swap("on_train_batch_end", 8)
    trainer, _ = fit([callback, swap], make_classifier(manual=True), max_epochs=2)
    assert {index: memory["steps"] for index, memory in callback.state_dict()["memory"].items()} == {"0": 12, "1": 12}
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    rest, saved = Remembers(), callback.state_dict()
    fit([rest], make_classifier(manual=True), max_epochs=2, ckpt=tmp_path / "two.ckpt")
    assert_identical(rest.state_dict(), saved)
    assert "memory" not in Steps().state_dict()
    fit([callback], make_classifier(manual=True), max_epochs=1)
    assert callback.state_dict()["memory"]["0"]["steps"] == 6, "another fit begins with nothing"
