"""Products of many small weights in one call: bit for bit the products of each weight, and where they must not be joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_grad.callbacks import InfoBatch, NMSparsity
from lightning_grad.core.quiet import is_quiet
from lightning_grad.core.views.joint_values import JointValues
from lightning_grad.testing import assert_identical
from tests.callbacks.sparsity.test_nm_sparsity import Regression, data, trainer
from tests.functional.sparsity.test_joined_masks import Computed


class Mixed(Regression):
    """Uses one layer twice, one only in every other batch, one not at all, and one larger than those that are joined."""

    def __init__(self, step: Callable[[Mixed, Any, int], Tensor] | None = None) -> None:
        torch.manual_seed(0)
        super().__init__(nn.ModuleList(nn.Linear(16, 16) for _ in range(6)), lambda p: torch.optim.AdamW(p, lr=1e-2))
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.large, self.head = nn.Linear(16, 4096), nn.Linear(4096, 8)
        self.step = step or loss_of
        self.joint: list[int] = []  # uses of a joined value in each batch

    def forward(self, x: Tensor, batch_idx: int = 0) -> Tensor:
        for layer in (*self.net[:4], self.net[1], *self.net[4 : 4 + batch_idx % 2]):
            x = x + layer(x).tanh()
        x = self.conv(x[..., None])[..., 0]
        return self.head(self.large(x).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.joint.append(0)
        return self.step(self, batch, batch_idx)


def loss_of(module: Mixed, batch: Any, batch_idx: int) -> Tensor:
    return F.mse_loss(module(batch[0], batch_idx), batch[1])


@pytest.fixture(autouse=True)
def quiet_uses(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Count uses of joined values in the module's steps; return the values in quiet runs, which restore such counts."""
    in_quiet: list[Tensor | None] = []
    original = JointValues.take

    def take(self: JointValues, parameter: Tensor) -> Tensor | None:
        value = original(self, parameter)
        module = self._pl_module
        if is_quiet(module):
            in_quiet.append(value)
        elif isinstance(module, Mixed) and value is not None:
            module.joint[-1] += 1
        return value

    monkeypatch.setattr(JointValues, "take", take)
    return in_quiet


def fit(module: Mixed, *others: Any, batches: int = 6, accumulate: int = 1, **settings: Any) -> Mixed:
    chosen = {"recipe": "sr-ste", "sr_ste_lambda": 0.01, "include": ["net", "conv", "large"], **settings}
    run = trainer(
        NMSparsity("2:4", **chosen),
        *others,
        limit_train_batches=batches,
        limit_val_batches=0,
        accumulate_grad_batches=accumulate,
    )
    run.fit(module, data())
    module.left = {"weights": module.state_dict(), "moments": run.optimizers[0].state_dict()}
    return module


def separate(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Mixed]) -> Mixed:
    """Run without joined values."""
    with monkeypatch.context() as patch:
        patch.setattr(JointValues, "take", lambda self, parameter: None)
        return run()


def same(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Mixed]) -> Mixed:
    """Run with and without joined values, compare all that is left bit for bit, and return the first."""
    joined, expected = run(), separate(monkeypatch, run)
    assert_identical(joined.left, expected.left)
    return joined


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": 2},
        {"recipe": "mdgf-exponential", "dense_fraction": 0.3},
        {"recipe": "mdgf-linear", "gradient": "masked", "accumulate": 2},
    ],
)
def test_joined_products_change_no_bit(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    joined = same(monkeypatch, lambda: fit(Mixed(), **settings))
    assert joined.joint[-1] == max(joined.joint) == 5  # one use of each, unless the first batch did not use it
    assert joined.net[5].weight.grad is None  # no step uses it


def test_a_step_multiplies_as_often_for_many_layers_as_for_few() -> None:
    def products(layers: int) -> int:
        def step(module: Mixed, batch: Any, batch_idx: int) -> Tensor:
            with Computed() as computed:
                [layer.weight for layer in module.net[:layers]]
            counts.append(sum(n for name, n in computed.calls.items() if "mul" in str(name)))
            return loss_of(module, batch, batch_idx)

        counts: list[int] = []
        fit(Mixed(step), batches=2)
        return counts[-1]

    assert products(2) == products(5) == 1


def changed_before(module: Mixed, batch: Any, batch_idx: int) -> Tensor:
    module.net[0]._parameters["weight"].data.mul_(0.9)  # past the version counter
    return loss_of(module, batch, batch_idx)


def changed_between(module: Mixed, batch: Any, batch_idx: int) -> Tensor:
    first = module.net[0](batch[0]).mean()
    with torch.no_grad():
        module.net[1]._parameters["weight"].mul_(0.9)
    return loss_of(module, batch, batch_idx) + first


def without_gradient_first(module: Mixed, batch: Any, batch_idx: int) -> Tensor:
    with torch.no_grad():
        target = module(batch[0], 1)
    return loss_of(module, (batch[0], target), batch_idx)


def checkpointed(module: Mixed, batch: Any, batch_idx: int) -> Tensor:
    out = checkpoint(module, batch[0] * 1, batch_idx, use_reentrant=False)
    return F.mse_loss(out, batch[1])


def checkpointed_reentrant(module: Mixed, batch: Any, batch_idx: int) -> Tensor:
    x = (batch[0] + module.net[5](batch[0])).tanh()
    return F.mse_loss(checkpoint(module, x, batch_idx, use_reentrant=True), batch[1])


def swapped(module: Mixed, batch: Any, batch_idx: int) -> Tensor:
    scaled = {name: 0.9 * p for name, p in module.named_parameters()}
    return F.mse_loss(torch.func.functional_call(module, scaled, (batch[0], batch_idx)), batch[1])


def with_gradient_penalty(module: Mixed, batch: Any, batch_idx: int) -> Tensor:
    loss = loss_of(module, batch, batch_idx)
    weights = [module.net[0]._parameters["weight"], module.net[1]._parameters["weight"]]
    found = torch.autograd.grad(loss, weights, create_graph=True)
    return loss + sum(gradient.square().sum() for gradient in found)


def transformed(module: Mixed, batch: Any, batch_idx: int) -> Tensor:
    of_rows = torch.func.vmap(lambda row: module.net[0](row).square().sum())(batch[0])
    return loss_of(module, batch, batch_idx) + of_rows.mean()


STEPS = [
    (changed_before, 5),
    (changed_between, 4),
    (without_gradient_first, 5),
    (checkpointed, 0),
    (checkpointed_reentrant, 1),
    (swapped, 0),
    (with_gradient_penalty, 5),
]


@pytest.mark.filterwarnings("ignore:.*requires_grad=True. Gradients will be None.*")
@pytest.mark.parametrize(
    ("gradient", "step", "most"),
    # torch.func refuses the straight-through estimator, with and without joined values
    [*(("ste", *found) for found in STEPS), *(("masked", *found) for found in STEPS), ("masked", transformed, 5)],
)
def test_other_uses_of_weights_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, gradient: str, step: Any, most: int
) -> None:
    settings = {"recipe": "mdgf-linear", "gradient": gradient, "batches": 4}
    joined = same(monkeypatch, lambda: fit(Mixed(step), **settings))
    assert max(joined.joint) == most


def test_hooks_get_the_gradients_that_they_got() -> None:
    def step(module: Mixed, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            for layer in module.net:
                layer._parameters["weight"].register_hook(lambda g: seen.append(g.shape) or 2 * g)
        return loss_of(module, batch, batch_idx)

    seen: list[Any] = []
    module = fit(Mixed(step), batches=2)
    assert module.joint == [1, 1]  # the convolution
    assert len(seen) == 4 + 5


def test_steps_of_a_manual_loop_start_from_new_products(monkeypatch: pytest.MonkeyPatch) -> None:
    class Manual(Mixed):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.joint.append(0)
            for _ in range(2):
                self.optimizers().zero_grad()
                self.manual_backward(loss_of(self, batch, 1))
                self.optimizers().step()

    assert max(same(monkeypatch, lambda: fit(Manual(), batches=3)).joint) == 12


def test_several_processes_and_quiet_runs_join_nothing(monkeypatch: pytest.MonkeyPatch, quiet_uses: list[Any]) -> None:
    module = fit(Mixed(), InfoBatch(prune=0.3), batches=3)
    assert len(quiet_uses) > 5
    assert set(quiet_uses) == {None}
    assert module.joint[-1] == 5
    monkeypatch.setattr("lightning.pytorch.Trainer.world_size", 2)
    assert max(fit(Mixed(), batches=1).joint) == 0


def test_an_exception_leaves_no_value_behind() -> None:
    def step(module: Mixed, batch: Any, batch_idx: int) -> Tensor:
        found.extend(entry.owner for entry in module.__dict__["training_step"]._wrappers)
        module.net[0](batch[0])
        raise KeyError("stop")

    found: list[Any] = []
    module = Mixed(step)
    with pytest.raises(KeyError):
        fit(module)
    assert "training_step" not in module.__dict__
    (joint,) = found
    assert joint._values == {}
