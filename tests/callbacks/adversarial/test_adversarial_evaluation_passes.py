"""How often AdversarialEvaluation runs the steps and the hooks of a module, among them hooks put on the instance."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_grad.callbacks.adversarial._second_state import SecondState
from lightning_grad.testing import assert_identical
from tests.callbacks.adversarial.attacked import Tape
from tests.callbacks.adversarial.test_adversarial_evaluation import Net, evaluator, validate

STEPS = 3


class Counted(Net):
    """Remembers its steps."""

    shows_loss = True

    def build(self) -> None:
        self.tape = Tape()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.tape(("validation", batch_idx))
        if self.shows_loss:
            return super().validation_step(batch, batch_idx)
        return self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.tape(("training", batch_idx))
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_a_batch_is_run_once_clean_once_attacked_and_once_a_step() -> None:
    module = Counted()
    validate([evaluator(steps=STEPS)], module)
    counts = Counter(module.tape.seen)
    assert len(counts) > 1
    assert set(counts.values()) == {1 + STEPS + 1}, "the first batch, too"


def test_only_where_the_first_step_shows_no_loss_another_is_searched() -> None:
    module = Counted()
    module.shows_loss = False
    validate([evaluator(steps=STEPS)], module)
    counts = Counter(module.tape.seen)
    assert counts["validation", 0] == 2 + 2, "a first attack that fails, and the search"
    assert counts["validation", 1] == 2
    assert counts["training", 0] == STEPS + 1
    assert counts["training", 1] == STEPS


# Hooks.


class Prepared(Net):
    """Its step needs what a hook before the batch sets, and its hooks log."""

    def before(self, batch: Any, *args: Any) -> None:
        self.shift = batch[0].mean()

    def after(self, outputs: Any, batch: Any, *args: Any) -> None:
        self.log("mean", batch[0].mean())

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return super().validation_step((batch[0] - self.shift, batch[1]), batch_idx)


class WithHooks(Prepared):
    on_validation_batch_start = Prepared.before
    on_validation_batch_end = Prepared.after


def as_it_is(module: Net, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def named_as_lightnings(module: Net, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(getattr(module, name))(lambda *args: function(*args))


@pytest.mark.parametrize("made", [as_it_is, named_as_lightnings])
def test_hooks_on_the_instance_are_hooks(made: Callable[..., Any]) -> None:
    module = Prepared()
    module.on_validation_batch_start = made(module, "on_validation_batch_start", module.before)
    module.on_validation_batch_end = made(module, "on_validation_batch_end", module.after)
    found = validate([evaluator()], module)
    assert not torch.equal(found["mean"], found["adversarial/mean"])
    assert_identical(found, validate([evaluator()], WithHooks()))


def entered(module: Net, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how often a module gets its second state in a validation."""
    count, used = Tape(), SecondState.used
    with monkeypatch.context() as patch:
        patch.setattr(SecondState, "used", lambda self: (count(1), used(self))[1])
        validate([evaluator()], module)
    return len(count.seen)


def test_no_second_state_is_entered_for_hooks_that_a_module_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ends(Net):
        def on_validation_batch_end(self, *args: Any) -> None:
            pass

    module = Counted()
    without = entered(module, monkeypatch)
    batches = len(set(module.tape.seen))
    assert without == 1 + 2 * batches, "the attack and the attacked step of each batch"
    assert entered(Ends(), monkeypatch) == without + batches


def test_the_state_of_an_attack_is_the_same_in_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(Net):
        def build(self) -> None:
            self.steps, self.losses, self.tape = 0, [], Tape()

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.tape((self.steps, len(self.losses), torch.is_inference_mode_enabled()))
            self.steps += 1
            self.losses.append(super().training_step(batch, batch_idx).detach())

    module = Counts()
    validate([evaluator(steps=1)], module)
    attacks = [(steps, losses) for steps, losses, is_inferred in module.tape.seen if not is_inferred]
    assert len(attacks) > 1
    assert set(attacks) == {(0, 0)}
