"""OptimizerSwap with AdaHessian and Sophia: graphs of gradients, memory, accumulation, and what is refused."""

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import OptimizerSwap
from lightning_grad.callbacks.optimizers._second_order import AdaHessian, Sophia
from lightning_grad.testing import assert_identical, make_trainer, state_of
from tests.cases import cases

NAMES = ("adahessian", "sophia")
SAMPLES = 12


class Fit(pl.LightningModule):
    """Regression on a net; it records which backward passes keep a graph."""

    def __init__(self, net: nn.Module, manual: bool = False, plain_backward: bool = False) -> None:
        super().__init__()
        self.net, self.plain_backward = net, plain_backward
        self.automatic_optimization = not manual
        self.kept: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss.backward() if self.plain_backward else self.manual_backward(loss)
            optimizer.step()
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.kept.append(kwargs.get("create_graph", False))
        super().backward(loss, *args, **kwargs)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def dense() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data(batch: int = SAMPLES, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 6, generator=generator, dtype=dtype)
    return DataLoader(TensorDataset(x, x[:, :3].sin()), batch)


def swap(name: str = "adahessian", **options: Any) -> OptimizerSwap:
    return OptimizerSwap(name, options or None, lr_factor=1.0)


def train(callbacks: list[Any], module: Any, loader: Any = None, ckpt: Any = None, **arguments: Any) -> Any:
    trainer = make_trainer(callbacks=callbacks, **{"max_epochs": 4, **arguments})
    trainer.fit(module, loader or data(), ckpt_path=ckpt)
    return trainer, module


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


ALIVE: WeakSet[Any] = WeakSet()


class Cube(torch.autograd.Function):
    """x ** 3. Its contexts are counted while a graph holds them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ALIVE.add(ctx)
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * gradient * x**2


class Cubes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)


class Alive(pl.Callback):
    """Counts graphs after each step, and after every 20th the tensors that were made since garbage was last collected."""

    def __init__(self) -> None:
        self.graphs: list[int] = []
        self.tensors: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.graphs.append(len(ALIVE))
        if len(self.graphs) % 20 == 0:
            self.tensors.append(sum(isinstance(thing, Tensor) for thing in gc.get_objects(generation=0)))


@pytest.fixture
def without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Keeps(AdaHessian):
    """What a step leaves if nothing detaches its gradients."""

    def step(self, closure: Any = None) -> Any:
        def kept() -> Any:
            loss = closure()
            self.gradients = [weight.grad for weight in self._weights()]
            return loss

        loss = super().step(kept)
        for weight, gradient in zip(self._weights(), self.gradients, strict=True):
            weight.grad = gradient
        return loss


@pytest.mark.usefixtures("without_garbage_collection")
@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_200_steps_stays_in_memory(name: str) -> None:
    counts, net = Alive(), nn.Sequential(dense(), Cubes())
    train([swap(name), counts], Fit(net), data(1), max_epochs=None, max_steps=200)
    assert counts.graphs == [0] * 200
    assert len(counts.tensors) == 10
    assert set(counts.tensors) == {counts.tensors[0]}


@pytest.mark.usefixtures("without_garbage_collection")
def test_gradients_that_are_not_detached_keep_their_graph() -> None:
    counts, net = Alive(), nn.Sequential(dense(), Cubes())
    train([OptimizerSwap(Keeps, lr_factor=1.0), counts], Fit(net), max_epochs=3)
    assert counts.graphs == [1] * 3
    ALIVE.clear()


def test_a_graph_is_kept_only_where_the_hessian_is_estimated() -> None:
    _, module = train([swap("sophia", update_period=3)], Fit(dense()), data(4), accumulate_grad_batches=2, max_epochs=3)
    steps = [[0, 0, 1], [2, 2, 3], [4, 4, 5]]  # of each batch; an epoch ends with a step
    assert module.kept == [step % 3 == 0 for epoch in steps for step in epoch]


def test_an_exception_leaves_no_graph() -> None:
    class Fails(pl.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            raise ZeroDivisionError

    module = Fit(dense())
    with pytest.raises(ZeroDivisionError):
        train([swap(), Fails()], module)
    assert not any(weight.grad.requires_grad for weight in module.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_batches_are_one_batch(name: str) -> None:
    ways = []
    for batch, accumulate in ((SAMPLES, 1), (4, 3)):
        _, module = train(
            [swap(name)],
            Fit(dense()).double(),
            data(batch, torch.float64),
            accumulate_grad_batches=accumulate,
            precision="64-true",
        )
        ways.append(weights(module))
    torch.testing.assert_close(*ways, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("name", NAMES)
def test_resumes_bitwise_and_draws_no_global_numbers(name: str, tmp_path: Path) -> None:
    trainer, module = train([swap(name)], Fit(dense()), max_epochs=12)
    first, _ = train([swap(name)], Fit(dense()), max_epochs=4)
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed = train([swap(name)], Fit(dense()), ckpt=tmp_path / "first.ckpt", max_epochs=12)
    states = [state_of(*run) for run in ((trainer, module), resumed)]
    assert_identical(*[{key: state[key] for key in ("module", "optimizers")} for state in states])
    torch.manual_seed(5)
    train([swap(name)], Fit(nn.Linear(6, 3)), max_epochs=2)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    train([], Fit(nn.Linear(6, 3)), max_epochs=2)
    assert torch.equal(torch.get_rng_state(), after)


class Attention(nn.Module):
    """Attention over the six entries of a sample, with the fused kernel or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.inner, self.outer, self.fused = nn.Linear(1, 12), nn.Linear(24, 3), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x[:, None, :, None]).chunk(3, dim=-1)
        if self.fused:
            seen = F.scaled_dot_product_attention(q, k, v)
        else:
            seen = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.outer(seen.flatten(1))


def test_fused_attention_gives_way_to_the_plain_kernel() -> None:
    ways = [weights(train([swap()], Fit(Attention(fused)))[1]) for fused in (True, False)]
    torch.testing.assert_close(*ways, rtol=1e-4, atol=1e-5)
    net, (x, y) = Attention(True), next(iter(data()))
    optimizer = AdaHessian(net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        F.mse_loss(net(x), y).backward(create_graph=True)
    with pytest.raises(RuntimeError, match=r"an operation of the module has none: .*flash_attention"):
        optimizer.step()


def test_a_kernel_shares_one_mean() -> None:
    """f = sum of h / 2 w^2, so that the diagonal is h whatever the signs are."""
    h = torch.tensor([[[1.0, 3.0]], [[-2.0, 6.0]]])
    w = nn.Parameter(torch.ones(2, 1, 2))
    optimizer = AdaHessian([w], lr=1.0, eps=0.0)
    w.grad = torch.autograd.grad((h / 2 * w**2).sum(), [w], create_graph=True)[0]
    optimizer.step()
    torch.testing.assert_close(w.detach(), 1 - h / torch.tensor([[[2.0]], [[4.0]]]))


def test_no_entry_of_sophia_moves_by_more_than_its_rate() -> None:
    w = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = Sophia([w], lr=0.1, betas=(0.0, 0.0), gamma=0.5, update_period=1)
    optimizer.gaussian = False
    w.grad = torch.autograd.grad((torch.tensor([1.0, 4.0]) / 2 * w**2).sum() + w[1] * -3, [w], create_graph=True)[0]
    optimizer.step()  # the gradient is 1 in both: 1 / (0.5 * 1) is clipped, 1 / (0.5 * 4) is not
    torch.testing.assert_close(w.detach(), torch.tensor([0.9, 0.95]))


def test_weights_without_curvature_and_without_gradients() -> None:
    used, linear, unused = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = AdaHessian([used, linear, unused], lr=0.1)
    gradients = torch.autograd.grad(used.pow(3).sum() + linear.sum(), [used, linear], create_graph=True)
    used.grad, linear.grad = gradients
    optimizer.step()
    assert torch.isfinite(used).all()
    assert torch.isfinite(linear).all()
    assert torch.equal(unused, torch.ones(3))
    assert set(optimizer.state) == {used, linear}


def test_manual_optimization_and_bf16() -> None:
    _, automatic = train([swap()], Fit(dense()))
    _, manual = train([swap()], Fit(dense(), manual=True))
    assert torch.equal(weights(manual), weights(automatic))
    _, half = train([swap()], Fit(dense()), precision="bf16-mixed")
    assert (weights(half) - weights(automatic)).abs().max() < 0.05


def test_gradients_without_a_graph_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"no gradient has a graph.*self\.manual_backward"):
        train([swap()], Fit(dense(), manual=True, plain_backward=True))


@cases("name, words", [(name, "needs second derivatives, and an fp16 GradScaler would scale them") for name in NAMES])
def test_refuses_fp16(name: str, words: str) -> None:
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=words):
        train([swap(name)], Fit(dense()), plugins=[scaled])


@cases("name", NAMES)
def test_refuses_ranks(name: str) -> None:
    answer, trainer = swap(name).works_with(), make_trainer(strategy="ddp_fork", devices=2)
    with pytest.raises(ValueError, match=r"torch cannot compute under DDP \(DDPStrategy\). Train on one device"):
        answer.refuse("OptimizerSwap", trainer, Fit(dense()))


@cases(
    ("optimizer", "words"),
    [
        ("pytorch_optimizer.AdaHessian", "Write 'adahessian'"),
        ("pytorch_optimizer.SophiaH", "Write 'sophia'"),
        (type("Adahessian", (torch.optim.SGD,), {}), "Write 'adahessian'"),  # as timm calls it
        (lambda groups: type("Adahessian", (torch.optim.SGD,), {})(groups), "Write 'adahessian'"),
    ],
)
def test_refuses_those_of_libraries(optimizer: Any, words: str) -> None:
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ValueError, match=rf"needs second derivatives, but does not say in which steps\. {words}"):
        train([OptimizerSwap(optimizer, lr_factor=1.0)], Fit(dense()))


def test_a_tuner_trains_with_graphs(tmp_path: Path) -> None:
    module = Fit(dense())
    module.lr = 1.0  # type: ignore[assignment]
    finder = LearningRateFinder(num_training_steps=3, early_stop_threshold=None, update_attr=False)
    train([finder, swap()], module, data(4), max_epochs=1, default_root_dir=tmp_path)
    assert module.kept == [True] * 6
    assert finder.optimal_lr is not None
    assert len(finder.optimal_lr.results["loss"]) == 3


def test_refuses_compiled_modules() -> None:
    module = Fit(dense())
    module.net.compile(backend="eager")
    with pytest.raises(ValueError, match="needs second derivatives, which compiled modules do not have"):
        train([swap()], module)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 0.0}, "gamma must be above 0"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"update_period": 0}, "update_period must be at least 1"),
        ({"lr": -1.0}, "lr must be at least 0"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sophia([nn.Parameter(torch.ones(1))], **options)
