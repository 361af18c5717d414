"""Lookahead in a fit, against loops by hand and a library; which weights are shown; with other techniques; refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_grad.callbacks import SAM, Lookahead, NMSparsity, NormClipping, OptimizerSwap, ZerothOrder
from lightning_grad.testing import assert_identical, fit, make_classifier, state_of
from tests.callbacks.optimizers.swapped import searched
from tests.core.test_step_window import DATA, Manual, Module, Plain, run, same

K, ALPHA, STEPS = 5, 0.5, 18
SHORT: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 3}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


def follow(optimizer: Optimizer, k: int = K) -> Callable[[], None]:
    """Do what Lookahead does, by hand and from now on; return a function that puts the slow weights in place."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    slow, steps = [p.detach().clone() for p in weights], [0]

    def after(*_: Any) -> None:
        steps[0] += 1
        if steps[0] % k == 0:
            with torch.no_grad():
                for each, weight in zip(slow, weights, strict=True):
                    each.lerp_(weight, ALPHA)
                    weight.copy_(each)

    def end() -> None:
        with torch.no_grad():
            torch._foreach_copy_(weights, slow)

    optimizer.register_step_post_hook(after)
    return end


class ByHand(Module):
    """Follows its optimizer by hand, and ends with the slow weights."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        self.end = follow(optimizer)
        return optimizer

    def on_fit_end(self) -> None:
        self.end()


def by_hand(accumulate: int = 1, skipped: int | None = None, kind: Any = Module, wrap: Any = None) -> Any:
    """Train in a loop of our own, and end with the slow weights."""
    module = kind()
    optimizer = module.configure_optimizers()
    end = follow(optimizer) if wrap is None else (optimizer := wrap(optimizer)).backup_and_load_cache
    for step in range(STEPS):
        epoch, index = divmod(step, 6)
        if index % accumulate == 0:
            optimizer.zero_grad()
        torch.manual_seed(100 * epoch + index)
        (module.loss(DATA.split(8)[index]) / accumulate).backward()
        if (index + 1) % accumulate == 0 and step != skipped:
            optimizer.step()
    end()
    return module


@pytest.fixture(scope="module")
def expected() -> Any:
    return by_hand()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_is_a_loop_by_hand(accumulate: int) -> None:
    _, module = run(Lookahead(), accumulate_grad_batches=accumulate)
    assert same(module, by_hand(accumulate))
    _, other = run(Lookahead(k=4), accumulate_grad_batches=accumulate)
    assert not same(module, other)


def test_it_is_that_of_a_library() -> None:
    """Without BatchNorm, before which gradients of a bias are noise that AdamW makes large."""
    library = pytest.importorskip("pytorch_optimizer")
    found = by_hand(kind=Plain, wrap=lambda optimizer: library.Lookahead(optimizer, k=K, alpha=ALPHA))

    def distance(*callbacks: Any) -> float:
        pairs = zip(found.parameters(), run(*callbacks, module=Plain())[1].parameters(), strict=True)
        return max((a - b).abs().max().item() for a, b in pairs)

    assert distance(Lookahead()) < 1e-6
    assert distance() > 1e-3


class CountsBatches(Lookahead):
    """The naive way: counts batches, not the steps of the optimizer."""

    def after_step(self, index: int, optimizer: Optimizer) -> None:
        pass

    def on_train_batch_end(self, *_: Any) -> None:
        super().after_step(0, self.watched[0])


def test_a_step_that_the_grad_scaler_skips_does_not_count() -> None:
    class Overflows(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if self.trainer.fit_loop.total_batch_idx == 2 else loss

    def scaled(callback: Lookahead) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        plugin.autocast_context_manager = torch.enable_grad  # in full precision: what is tested is the scaler
        return run(callback, module=Overflows(), plugins=[plugin])[1]

    assert same(scaled(Lookahead()), by_hand(skipped=2))
    assert not same(scaled(CountsBatches()), by_hand(skipped=2))


class Two(Manual):
    """Steps its second optimizer half as often, and follows both by hand if it has to."""

    def __init__(self, follows: bool) -> None:
        super().__init__(with_closure=False)
        self.follows = follows

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        both = [AdamW(parameters[:2], lr=1e-2), SGD(parameters[2:], lr=1e-2)]
        self.ends = [follow(each) for each in both] if self.follows else []
        return both

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers()[: 1 + batch_idx % 2]:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch[0]))
            optimizer.step()

    def on_fit_end(self) -> None:
        for end in self.ends:
            end()


def test_each_optimizer_has_its_own_weights_and_counts() -> None:
    callback = Lookahead()
    _, module = run(callback, module=Two(follows=False))
    assert same(module, run(module=Two(follows=True))[1])
    assert [callback.memory(index)["steps"] for index in (0, 1)] == [STEPS, STEPS // 2]


@pytest.mark.parametrize("others", [[SAM(0.1)], [NormClipping(0.1)], [SAM(0.1), NormClipping(0.1)]])
def test_next_to_techniques_that_change_gradients(others: list[Any], expected: Any) -> None:
    _, module = run(Lookahead(), *others)
    assert same(module, run(*others, module=ByHand())[1])
    assert not same(module, expected)


def test_next_to_another_optimizer() -> None:
    def train(*callbacks: Any, module: Any = None) -> Any:
        swap = OptimizerSwap("torch.optim.RAdam")
        return run(swap, *callbacks, module=module)[1]

    assert same(train(Lookahead()), train(module=ByHand()))  # its hook is that of the new optimizer
    assert not same(train(Lookahead()), train())


def test_next_to_steps_without_gradients() -> None:
    class ForSGD(Plain):
        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=1e-2)

    callback = Lookahead()
    _, module = run(ZerothOrder(), callback, module=ForSGD())
    assert callback.memory(0)["steps"] == STEPS, "steps without gradients are not counted"
    assert not same(module, run(ZerothOrder(), module=ForSGD())[1])


@pytest.mark.parametrize("manual", [True, False])
def test_sparse_weights_see_the_result_of_the_step_in_any_order(
    manual: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One layer is of another class, and the weight of the other is covered in place while a step runs."""

    def train(first: bool, ckpt: Any = None) -> Any:
        both: list[Any] = [Lookahead(4), NMSparsity("2:4", include=["hidden", "mix.w"], figure=False)]
        file = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, monitor="val_loss")
        return fit([*both[:: 1 if first else -1], file], make_classifier(manual=manual), max_epochs=2, ckpt=ckpt)

    (trainer, module), other = train(True), train(False)
    left = state_of(trainer, module)
    assert_identical(left, state_of(*other))
    assert ((module.mix.w == 0).float().mean(), (module.hidden.weight == 0).float().mean()) == (0.5, 0.5)
    resumed = train(False, sorted(tmp_path.iterdir(), key=lambda path: len(path.name))[0])
    assert_identical(left["optimizers"], state_of(*resumed)["optimizers"])
    assert same_weights(module, resumed[1])
    monkeypatch.setattr(Lookahead, "moves_weights", False)
    is_same = same_weights(module, train(False)[1])
    assert is_same is not manual, "behind the hook that covers the weight again, it would average covered weights"


def same_weights(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# Which weights are shown.


class Seen(pl.Callback):
    """Copies the weights after each step, and in each validation."""

    def __init__(self) -> None:
        self.trained: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.trained.append(copies(pl_module))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not trainer.sanity_checking and trainer.val_dataloaders is not None:
            self.validated.append(copies(pl_module))


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def train_and_look(folder: Path, weights: Any) -> tuple[Any, Any, Seen]:
    seen, file = Seen(), ModelCheckpoint(folder, "{step}", save_top_k=-1, monitor="val_loss")
    trainer, module = fit([seen, Lookahead(4, eval_weights=weights), file], limit_val_batches=1, **SHORT)
    return trainer, module, seen


def test_validation_and_checkpoints_have_the_chosen_weights(tmp_path: Path) -> None:
    """Validations follow steps 3, 6, 9 and 12; the slow weights move at steps 4, 8 and 12."""
    _, slow_module, slow = train_and_look(tmp_path / "slow", "slow")
    trainer, fast_module, fast = train_and_look(tmp_path / "fast", "fast")
    assert_identical(slow.trained, fast.trained)
    assert_identical(fast.validated, fast.trained[2::3])
    assert_identical(slow.validated[1:], [slow.trained[3], slow.trained[7], slow.trained[11]])
    assert_identical(slow.validated[0], copies(make_classifier()))
    for weights, seen, module in (("slow", slow, slow_module), ("fast", fast, fast_module)):
        for step, validated in zip((3, 6, 9, 12), seen.validated, strict=True):
            saved = torch.load(tmp_path / weights / f"step={step}.ckpt", weights_only=True)
            assert_identical({name: saved["state_dict"][name] for name in validated}, validated)
        assert_identical(copies(module), seen.validated[-1])
    for before, after in (("slow", "fast"), ("fast", "slow"), ("slow", "slow")):
        resumed = fit([Lookahead(4, eval_weights=after)], ckpt=tmp_path / before / "step=6.ckpt", **SHORT)
        assert_identical(state_of(trainer, fast_module)["optimizers"], state_of(*resumed)["optimizers"])
        assert_identical(copies(fast_module), copies(resumed[1]))
        kept = resumed[0].callbacks[0].state_dict()
        assert ("training_weights" in kept) == (after == "slow"), (
            "weights of the other setting would replace the new ones"
        )


class Fails(pl.Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.trainer = trainer
        if trainer.global_step == 10:
            raise ZeroDivisionError


def test_a_file_saved_by_hand_after_an_exception_resumes_bitwise(tmp_path: Path) -> None:
    trainer, module = fit([Lookahead(4)], max_epochs=2, resumable=True)
    fails, seen = Fails(), Seen()
    with pytest.raises(ZeroDivisionError):
        fit([seen, fails, Lookahead(4)], max_epochs=2, resumable=True)
    assert_identical(copies(fails.trainer.lightning_module), seen.trained[7])
    fails.trainer.save_checkpoint(tmp_path / "by_hand.ckpt")
    resumed = fit([Lookahead(4)], max_epochs=2, resumable=True, ckpt=tmp_path / "by_hand.ckpt")
    assert_identical(state_of(trainer, module)["optimizers"], state_of(*resumed)["optimizers"])
    assert same_weights(module, resumed[1])


def test_weights_that_are_added_later_start_as_they_are_then() -> None:
    before_moves: list[Tensor] = []

    class Unfreezes(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
            if epoch == 1:  # after 6 steps; the slow weights move after 5, 10, 15
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, initial_denom_lr=1.0)

    SGD([torch.zeros(1)])  # from now on the step of SGD has hooks, so that a step of Records has them twice

    class Records(SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            before_moves.append(module.net[0].weight.detach().clone())
            return loss

    class Chosen(Module):
        def configure_optimizers(self) -> Any:
            return Records([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module, seen = Chosen(), Seen()
    start = module.net[0].weight.detach().clone()
    run(Unfreezes(), seen, Lookahead(), module=module, epochs=2)
    after = [weights["net.0.weight"] for weights in seen.trained]
    assert torch.equal(after[5], start)
    assert torch.equal(after[9], torch.lerp(start, before_moves[9], ALPHA))
    assert not torch.equal(after[9], before_moves[9])


def test_a_search_for_a_learning_rate_leaves_no_trace(tmp_path: Path) -> None:
    assert_identical(searched(Lookahead(), tmp_path), searched(Lookahead(), tmp_path, searches=False))


def test_a_checkpoint_from_before_the_first_step_can_be_restored_in_the_fit(tmp_path: Path) -> None:
    """As a search for a learning rate does, if a callback starts it after the first step."""
    callback = Lookahead(4)

    class Rewinds(pl.Callback):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "start.ckpt")

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                saved = torch.load(tmp_path / "start.ckpt", weights_only=True)
                callback.load_state_dict(saved["callbacks"]["Lookahead"])
                pl_module.load_state_dict(saved["state_dict"])

    seen = Seen()
    fit([Rewinds(), callback, seen], max_epochs=1)
    assert callback.memory(0)["steps"] == 4
    assert_identical(callback.memory(0)["slow"], list(seen.trained[5].values()))


def test_an_average_of_fast_weights_is_possible() -> None:
    trainer, _ = fit([Lookahead(4, eval_weights="fast"), EMAWeightAveraging(decay=0.9)], max_epochs=1)
    assert trainer.callbacks[0].memory(0)["steps"] == 6


# What it refuses.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: torch.optim.LBFGS, "LBFGS, which compares gradients of successive steps"),
        (lambda po: lambda p: po.Lookahead(AdamW(p)), "Lookahead, which is Lookahead already"),
        (lambda po: po.Ranger, "Ranger, which contains Lookahead"),
    ],
)
def test_optimizers_that_jump_or_compare_steps_are_refused(make: Any, words: str) -> None:
    kind = make(pytest.importorskip("pytorch_optimizer"))

    class Other(Module):
        def configure_optimizers(self) -> Any:
            return kind(self.parameters())

    with pytest.raises(ValueError, match=f"Lookahead does not work with {words}.*Train with a plain optimizer"):
        run(Lookahead(), module=Other())


@pytest.mark.parametrize("weights", ["slow", "fast"])
def test_two_that_average_are_refused(weights: Any) -> None:
    pytest.importorskip("schedulefree")
    both = [OptimizerSwap("schedulefree-adamw", lr_factor=1.0), Lookahead(eval_weights=weights)]
    for callbacks in (both, both[::-1]):
        with pytest.raises(ValueError, match=r"AdamWScheduleFree, which averages the weights itself\. Train with"):
            run(*callbacks)


def test_a_second_one_is_refused() -> None:
    with pytest.raises(ValueError, match="Use only one Lookahead per Trainer"):
        run(Lookahead(), Lookahead(name="b"))
