"""SAM in a fit, against loops by hand; what it moves, how often, and what it refuses.

That a second evaluation leaves no trace is tested in ``tests/core/test_step_window.py``.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_optimizer
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import SAM, NMSparsity, OptimizerSwap
from lightning_grad.testing import assert_identical, fit, make_classifier, make_trainer, state_of
from tests.core.test_step_window import DATA, Module, Plain, Saves, ascend, by_hand, run, same


def ascend_adaptively(parameters: list[Tensor], rho: float) -> list[Tensor]:
    """Move weights by ASAM, one after the other."""
    sizes = [p.abs() + 0.01 if p.ndim > 1 else torch.ones_like(p) for p in parameters]
    stretched = [p.grad * size for p, size in zip(parameters, sizes, strict=True)]
    scale = rho / torch.stack(torch._foreach_norm(stretched)).norm()
    kept = [p.detach().clone() for p in parameters]
    for parameter, gradient, size in zip(parameters, stretched, sizes, strict=True):
        parameter.add_(gradient * size * scale)
    return kept


def test_sam_is_a_loop_by_hand() -> None:
    _, module = run(SAM())
    assert same(module, by_hand(rho=0.05))
    assert not same(module, by_hand(rho=0.0))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_asam_is_a_loop_by_hand(accumulate: int) -> None:
    _, module = run(SAM(adaptive=True), accumulate_grad_batches=accumulate)
    assert same(module, by_hand(accumulate, rho=0.5, move=ascend_adaptively))
    assert not same(module, by_hand(accumulate, rho=0.5))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_between_are_plain(accumulate: int) -> None:
    _, module = run(SAM(0.1, every_n_steps=4), accumulate_grad_batches=accumulate)
    assert same(module, by_hand(accumulate, every=4))
    assert not same(module, by_hand(accumulate))


@pytest.mark.parametrize("scale", [2.0**10, 2.0**40])
def test_under_a_grad_scaler_that_overflows_at_first(scale: float) -> None:
    """In full precision 2^40 would not overflow, so the first gradients are infinite on purpose."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6))
    plugin.autocast_context_manager = torch.enable_grad
    _, module = run(SAM(0.1), plugins=[plugin])
    assert same(module, by_hand())


def test_only_chosen_parameters_move_each_by_its_own_length() -> None:
    moved: list[dict[str, float]] = []
    seen: list[dict[str, Tensor]] = []

    class Looks(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append({name: p.detach().clone() for name, p in self.named_parameters()})
            return super().training_step(batch, batch_idx)

    run(SAM({"net.0.*": 0.1, "net.4.*": 0.2}, exclude=["*.bias"]), module=Looks(), epochs=1)
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        moved.append({name: (second[name] - first[name]).norm().item() for name in first})
    assert all({name for name, move in moves.items() if move} == {"net.0.weight", "net.4.weight"} for moves in moved)
    lengths = torch.tensor([[moves["net.0.weight"] / 0.1, moves["net.4.weight"] / 0.2] for moves in moved])
    torch.testing.assert_close(lengths.norm(dim=1), torch.ones(len(moved)), rtol=1e-4, atol=0)


def test_a_param_group_may_set_its_own_length() -> None:
    class Groups(Module):
        def configure_optimizers(self) -> Any:
            first, *rest = self.parameters()
            return torch.optim.AdamW([{"params": [first], "rho": 0.0}, {"params": rest}], lr=1e-2)

    _, module = run(SAM(0.1), module=Groups())
    _, named = run(SAM({"net.0.weight": 0.0, "*": 0.1}))
    assert same(module, named)
    assert not same(module, by_hand())


def test_the_logged_sharpness_is_the_rise_of_the_loss() -> None:
    rises: list[float] = []
    losses: list[float] = []

    class Looks(Module):
        def loss(self, x: Tensor) -> Tensor:
            loss = super().loss(x)
            losses.append(loss.item())
            return loss

    class Logged(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            rises.append(trainer.callback_metrics["sam/sharpness"].item())

    run(SAM(0.1), Logged(), module=Looks(), log_every_n_steps=1, epochs=1)
    seen = torch.tensor(losses)
    torch.testing.assert_close(torch.tensor(rises), seen[1::2] - seen[::2])
    assert min(rises) > 0.0


def test_the_last_sharpness_is_logged_where_log_steps_are_plain() -> None:
    """Steps 0, 4, 8, ... are sharp, and steps 2, 5, 8, ... are logged."""
    logged: list[float] = []

    class Logged(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            logged.append(float(trainer.callback_metrics.get("sam/sharpness", 0.0)))

    run(SAM(0.1, every_n_steps=4), Logged(), log_every_n_steps=3, epochs=1)
    every: list[float] = logged.copy()
    logged.clear()
    run(SAM(0.1, every_n_steps=4), Logged(), log_every_n_steps=1, epochs=1)
    assert every[1] == 0.0
    assert every[2] == logged[0] > 0.0
    assert every[5] == logged[4] != logged[0]


def test_a_param_group_may_change_its_length_during_the_run() -> None:
    lengths: list[float] = []

    class Warms(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().param_groups[0]["rho"] = 0.1 * batch_idx
            self.before = torch.cat([p.detach().flatten() for p in self.parameters()])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            now = torch.cat([p.detach().flatten() for p in self.parameters()])
            if not torch.equal(now, self.before):
                lengths.append((now - self.before).norm().item())
            return super().training_step(batch, batch_idx)

    run(SAM(0.7), module=Warms(), epochs=1)
    assert lengths == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], rel=1e-4)


def test_an_exception_while_weights_are_moved_gives_them_back() -> None:
    class Fails(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if len(self.losses) == 3:  # the list is as it was while the step is repeated
                self.losses.append(0.0)
                raise ArithmeticError("at the moved weights")
            return super().training_step(batch, batch_idx)

    class Keeps(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.weights = [p.detach().clone() for p in pl_module.parameters()]

    module, keeps = Fails(), Keeps()
    with pytest.raises(ArithmeticError):
        run(SAM(1.0), keeps, module=module)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), keeps.weights, strict=True))


def test_sparse_weights_keep_their_mask_when_they_move() -> None:
    """The mask is that of the weights before the move, in both passes, as sparsity refreshes it after steps only."""
    seen: list[Tensor] = []
    module = make_classifier()
    module.hidden.register_forward_hook(lambda layer, *_: seen.append(layer.weight == 0) if module.training else None)
    fit([NMSparsity("2:4", recipe="ste", include=["hidden"]), SAM(0.5)], module, max_epochs=1)
    passes = [mask for mask in seen if mask.float().mean() == 0.5]
    assert len(passes) >= 12
    assert all(torch.equal(first, again) for first, again in zip(passes[-12::2], passes[-11::2], strict=True))


@pytest.mark.parametrize("sync_ascent", [True, False])
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_on_two_ranks_each_moves_along_its_own_gradient_or_all_along_the_mean(
    sync_ascent: bool, tmp_path: Path
) -> None:
    class Halves(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch[0][self.global_rank :: self.trainer.world_size])

    ranks = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    run(SAM(0.5, sync_ascent=sync_ascent), Saves(tmp_path), module=Halves(), **ranks)
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_identical(saved[0], saved[1])
    own, joint = (_on_ranks(parts).state_dict() for parts in (2, 1))
    right, wrong = (joint, own) if sync_ascent else (own, joint)
    difference = max((saved[0][key] - right[key]).abs().max().item() for key in right)
    assert difference < 1e-4
    assert max((saved[0][key] - wrong[key]).abs().max().item() for key in right) > 100 * difference


def _on_ranks(parts: int) -> Module:
    """Train on the mean of the sharp gradients of parts of each batch, each moved along its own gradient."""
    module = Plain()
    optimizer, parameters = module.configure_optimizers(), list(module.parameters())
    for _ in range(3):
        for batch in DATA.split(8):
            total = [torch.zeros_like(p) for p in parameters]
            for rank in range(parts):
                optimizer.zero_grad()
                module.loss(batch[rank::parts]).backward()
                with torch.no_grad():
                    kept = ascend(parameters, 0.5)
                optimizer.zero_grad()
                module.loss(batch[rank::parts]).backward()
                with torch.no_grad():
                    torch._foreach_copy_(parameters, kept)
                torch._foreach_add_(total, [p.grad / parts for p in parameters])
            for parameter, gradient in zip(parameters, total, strict=True):
                parameter.grad = gradient
            optimizer.step()
    return module


# What it refuses.


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (torch.optim.LBFGS, "LBFGS, which evaluates its closure many times"),
        (pytorch_optimizer.AdaHessian, "AdaHessian, which differentiates its gradients"),
        (lambda p: pytorch_optimizer.SAM(p, torch.optim.SGD, lr=0.1), "SAM, which is SAM already"),
    ],
)
def test_optimizers_that_evaluate_steps_themselves_are_refused(optimizer: Any, words: str) -> None:
    class Other(Module):
        def configure_optimizers(self) -> Any:
            return optimizer(self.parameters())

    with pytest.raises(ValueError, match=f"SAM does not work with {words}"):
        run(SAM(), module=Other())


@pytest.mark.parametrize("name", ["adahessian", "sophia"])
def test_optimizers_that_need_graphs_are_refused_when_they_are_swapped_in(name: str) -> None:
    swap = OptimizerSwap(name, lr_factor=1.0)
    for callbacks in ([SAM(), swap], [swap, SAM()]):
        with pytest.raises(ValueError, match=r"SAM does not work with (AdaHessian|Sophia), which differentiates"):
            run(*callbacks)
    run(SAM(rho=0.05), OptimizerSwap("torch.optim.RAdam"), epochs=1)  # the way out


def test_what_moves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="SAM has no parameter to move"):
        run(SAM(0.1, exclude=["net"]))
    with pytest.raises(ValueError, match=r"rho=...\): no parameter or module is named 'nett'"):
        run(SAM({"nett": 0.1}))


def test_a_static_graph_needs_a_synchronized_ascent() -> None:
    """DDP cannot run its first iteration under no_sync then."""
    for sync_ascent, raises in (
        (False, pytest.raises(ValueError, match="Set sync_ascent=True")),
        (True, nullcontext()),
    ):
        trainer = make_trainer(max_epochs=1, callbacks=[SAM(sync_ascent=sync_ascent)])
        trainer.strategy._ddp_kwargs = {"static_graph": True}
        with raises:
            trainer.fit(Module(), DataLoader(TensorDataset(DATA), 8))


def test_sparse_gradients_are_refused_unless_excluded() -> None:
    class Embeds(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 8, sparse=True)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    with pytest.raises(ValueError, match=r"SAM needs dense gradients.*exclude="):
        run(SAM(), module=Embeds())
    run(SAM(exclude=["embed"]), module=Embeds(), epochs=1)


def test_a_resumed_run_continues_the_count_of_steps(tmp_path: Path) -> None:
    """Four epochs of six steps; sharp steps are 0, 4, 8, ...: the seventh step is plain."""
    whole = fit([SAM(0.5, every_n_steps=4)], max_epochs=4)
    trainer, _ = fit([SAM(0.5, every_n_steps=4)], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = fit([SAM(0.5, every_n_steps=4)], max_epochs=4, ckpt=tmp_path / "one.ckpt")
    assert_identical(state_of(*whole), state_of(*resumed))


def test_a_length_that_grows_from_zero_within_a_step_moves_the_weights() -> None:
    """All batches of the step are kept, although the length is zero at the first one."""

    class Grows(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([{"params": list(self.parameters()), "rho": 0.0}], lr=1e-2)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().param_groups[0]["rho"] = 0.1 if batch_idx or self.current_epoch else 0.0

    _, module = run(SAM(0.0), module=Grows(), accumulate_grad_batches=2)
    assert same(module, by_hand(2, rho=0.1))
