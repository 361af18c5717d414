"""Zeroth-order steps of quantization scales: constant integers, the derivative of autograd, memory, and refusals."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_grad.callbacks import (
    GradientNoise,
    Lookahead,
    NMSparsity,
    NormClipping,
    OptimizerSwap,
    ZerothOrder,
)
from lightning_grad.functional import move_along_, quantize_weight, read_quantized_weight
from lightning_grad.testing import assert_identical, make_trainer, state_of
from tests.callbacks.optimizers.test_zeroth_order import DECAY, RATE, Derivatives, ForSGD, Halves
from tests.callbacks.optimizers.test_zeroth_order_memory import LAYERS, WIDTH, evaluate, peak_of, train
from tests.core.test_step_window import DATA, Saves, run

BITS = 4


class Double(ForSGD):
    def __init__(self) -> None:
        super().__init__()
        self.double()

    def loss(self, x: Tensor) -> Tensor:
        return super().loss(x.double())


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.ndim > 1}


def integers_of(weight: Tensor, scales: Tensor) -> Tensor:
    return (weight.flatten(1).reshape(len(scales), -1) / scales).round()


class Watch(pl.Callback):
    """Keeps the integers and the scales after each step."""

    def __init__(self, technique: ZerothOrder) -> None:
        self.technique = technique
        self.integers: list[dict[str, Tensor]] = []
        self.scales: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.scales:
            self.note(*_[:2])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.note(trainer, pl_module)

    def note(self, trainer: Any, pl_module: Any) -> None:
        scales = self.technique._scales.state_dict()
        weights = {name: pl_module.get_parameter(name) for name in scales}
        self.scales.append(scales)
        self.integers.append({n: integers_of(w, scales[n]) for n, w in weights.items()})
        for name, weight in weights.items():
            assert torch.equal(weight.reshape(len(scales[name]), -1), self.integers[-1][name] * scales[name])


@pytest.mark.parametrize("group_size", [None, 2])
@pytest.mark.parametrize("module", [ForSGD, Double])
def test_integers_never_change_and_scales_do(module: Any, group_size: int | None) -> None:
    technique = ZerothOrder(bits=BITS, group_size=group_size, max_derivative=1.0)
    watch, start = Watch(technique), module()
    _, trained = run(technique, watch, module=module(), epochs=4)
    assert len(watch.integers) == 25
    assert set(watch.integers[0]) == set(weights_of(start))
    for integers in watch.integers:
        assert_identical(integers, watch.integers[0])
    assert all((a != b).all() for a, b in zip(watch.scales[0].values(), watch.scales[-1].values(), strict=True))
    for name, bias in start.named_parameters():
        if bias.ndim == 1:
            assert torch.equal(trained.get_parameter(name), bias), "only scales train"
    if group_size is None:
        for name, weight in weights_of(start).items():
            expected = quantize_weight(weight, BITS)
            assert torch.equal(watch.integers[0][name], expected.integers.to(weight.dtype))
            assert torch.equal(watch.scales[0][name].flatten(), expected.scales.flatten())


def test_it_is_a_loop_by_hand_and_the_derivative_is_that_of_autograd() -> None:
    """The step s - lr (d z + decay s), with d by autograd through k s."""
    seen, steps, module = Derivatives(), 5, Double()
    names, weights = zip(*[(n, p) for n, p in module.named_parameters() if p.ndim > 1], strict=True)
    grids = [quantize_weight(p.detach(), BITS) for p in weights]
    scales = [grid.scales.clone().requires_grad_() for grid in grids]
    derivatives = []
    for step in range(steps):
        values = {n: g.integers.double() * s for n, g, s in zip(names, grids, scales, strict=True)}
        net = dict(module.named_parameters()) | values
        loss = torch.func.functional_call(Lossy(module), {f"inner.{n}": v for n, v in net.items()}, DATA.split(8)[step])
        gradients = torch.autograd.grad(loss, scales)
        directions = [torch.zeros_like(s) for s in scales]
        move_along_(directions, [1.0] * len(scales), step)
        derivatives.append(sum((g * z).sum().item() for g, z in zip(gradients, directions, strict=True)))
        with torch.no_grad():
            for s, z in zip(scales, directions, strict=True):
                s.sub_(RATE * (derivatives[-1] * z + DECAY * s)).clamp_(min=1e-30)
    technique = ZerothOrder(epsilon=1e-5, bits=BITS)
    watch = Watch(technique)
    run(technique, seen, watch, module=Double(), max_steps=steps, log_every_n_steps=1)
    assert seen.seen == pytest.approx(derivatives, rel=1e-3)
    for name, s in zip(names, scales, strict=True):
        torch.testing.assert_close(watch.scales[-1][name], s.detach(), rtol=1e-6, atol=1e-8)


class Lossy(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.loss(x)  # type: ignore[no-any-return]


def test_it_trains() -> None:
    class Slow(ForSGD):
        rate = 1e-3

    technique = ZerothOrder(bits=3, max_derivative=10.0)
    rounded = Slow()
    with torch.no_grad():
        for weight in [p for p in rounded.parameters() if p.ndim > 1]:
            weight.copy_(quantize_weight(weight, 3).dequantize())
    _, module = run(technique, module=Slow(), epochs=60)
    assert module.loss(DATA).item() < 0.7 * rounded.loss(DATA).item()


def test_a_step_keeps_scales_positive_and_the_integers() -> None:
    class Wild(ForSGD):
        rate = 1.0

    technique = ZerothOrder(bits=BITS, max_derivative=0.1)
    watch = Watch(technique)
    run(technique, watch, module=Wild(), epochs=1)
    least = min(s.min() for scales in watch.scales for s in scales.values())
    assert 0 < least < 1e-20, "some scale would have become negative"
    for integers in watch.integers:
        assert_identical(integers, watch.integers[0])


def test_integers_of_an_earlier_rounding_stay() -> None:
    class Rounded(ForSGD):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                for weight in [p for p in self.parameters() if p.ndim > 1]:
                    weight.copy_(quantize_weight(weight, 3, scales=weight.abs().mean(1, keepdim=True)).dequantize())

    technique = ZerothOrder(bits=3)
    watch = Watch(technique)
    run(technique, watch, module=Rounded(), epochs=1)
    for name, weight in weights_of(Rounded()).items():
        assert torch.equal(watch.integers[-1][name], read_quantized_weight(weight, 3).integers.float())


@pytest.mark.parametrize("fails_in", [1, 2])
def test_an_exception_in_either_pass_keeps_the_integers(fails_in: int) -> None:
    calls: list[int] = []

    class Fails(Double):
        def loss(self, x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == fails_in:
                raise ArithmeticError("at the moved scales")
            return super().loss(x)

    module = Fails()
    with pytest.raises(ArithmeticError):
        run(ZerothOrder(epsilon=0.5, bits=BITS), module=module)
    for name, weight in weights_of(Double()).items():
        torch.testing.assert_close(module.get_parameter(name).detach(), quantize_weight(weight, BITS).dequantize())


def test_it_resumes_bitwise(tmp_path: Path) -> None:
    def train_for(epochs: int, ckpt: Any = None, bits: int = BITS) -> Any:
        trainer = make_trainer(callbacks=[ZerothOrder(bits=bits, group_size=2)], max_epochs=epochs)
        module = Gentle()
        trainer.fit(module, DataLoader(DATA, 8, collate_fn=lambda rows: [torch.stack(rows)]), ckpt_path=ckpt)
        return trainer, module

    whole, (trainer, _) = train_for(4), train_for(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt")
    assert list(Gentle().state_dict()) == list(saved["state_dict"])
    for name, scales in saved["callbacks"]["ZerothOrder"]["scales"].items():
        weight = saved["state_dict"][name].reshape(len(scales), -1)
        assert torch.equal(weight, (weight / scales).round() * scales), "plain keys hold the products"
    resumed = state_of(*train_for(4, tmp_path / "two.ckpt"))
    assert_identical({**state_of(*whole), "random": None}, {**resumed, "random": None})  # Lightning restores none
    with pytest.raises(ValueError, match=r"bits.*rounded to integers of this many bits"):
        train_for(4, tmp_path / "two.ckpt", bits=3)


class Gentle(ForSGD):
    rate = 1e-4


class GentleHalves(Halves):
    rate = 1e-4


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_two_ranks_are_one_with_both_their_batches(tmp_path: Path) -> None:
    ranks = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    run(ZerothOrder(bits=BITS), Saves(tmp_path), module=GentleHalves(), **ranks)
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_identical(saved[0], saved[1])
    _, one = run(ZerothOrder(bits=BITS), module=GentleHalves())
    assert not torch.equal(
        one.state_dict()["net.0.weight"], quantize_weight(GentleHalves().net[0].weight, BITS).dequantize()
    )
    for key, value in one.state_dict().items():
        torch.testing.assert_close(saved[0][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("samples", [1, 64])
def test_a_step_takes_the_memory_of_an_evaluation_and_of_one_weight(samples: int) -> None:
    weight, batch, scales = 4 * WIDTH * WIDTH, 4 * samples * WIDTH, 4 * WIDTH * LAYERS
    evaluation = peak_of(evaluate, samples)
    bound = max(weight + batch, evaluation + 2 * batch) + 4 * scales
    peak = peak_of(train, samples, ZerothOrder(bits=BITS))
    assert peak <= bound
    assert peak - evaluation < 2 * batch + LAYERS * weight / 2, "no second copy of the weights, not even of integers"


def test_embeddings_and_other_tensors_are_not_rounded() -> None:
    class Text(ForSGD):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.tied = nn.Linear(3, 5, bias=False)
            self.tied.weight = self.embed.weight
            self.table = nn.Parameter(torch.randn(1, 4, 3))

    technique = ZerothOrder(bits=BITS)
    run(technique, module=Text(), epochs=1)
    assert set(technique._scales) == set(weights_of(ForSGD()))


def test_groups_that_do_not_fit_are_named(caplog: Any) -> None:
    caplog.set_level("INFO")
    technique = ZerothOrder(bits=BITS, group_size=7)
    run(technique, module=ForSGD(), epochs=1)
    assert "Groups of 7 do not fit into the channels of net.0.weight" in caplog.text
    assert all(len(s) == len(ForSGD().get_parameter(n)) for n, s in technique._scales.items())


class Halved(ForSGD):
    def __init__(self) -> None:
        super().__init__()
        self.half()


class Momentum(ForSGD):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


@pytest.mark.parametrize(
    ("others", "module", "arguments", "words"),
    [
        ([], Momentum, {}, "no gradient of a weight exists for SGD with momentum.*SGD without momentum"),
        ([Lookahead()], ForSGD, {}, "for Lookahead"),
        ([GradientNoise(0.1)], ForSGD, {}, "for GradientNoise"),
        ([OptimizerSwap("lion", lr_factor=1.0)], ForSGD, {}, "for Lion"),
        ([], ForSGD, {"gradient_clip_val": 1.0}, "for gradient_clip_val"),
        ([NMSparsity(include=["*"])], ForSGD, {}, "NMSparsity shows the module other weights"),
        ([], Halved, {}, "wider range than .* of torch.float16"),
    ],
)
def test_what_needs_other_gradients_or_weights_is_refused(
    others: list[Any], module: Any, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        run(ZerothOrder(bits=BITS), *others, module=module(), **arguments)


def test_a_module_without_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"finds no weight to round.*Choose others with include="):
        run(ZerothOrder(bits=BITS, include=["*.bias"]), module=ForSGD())
    with pytest.raises(ValueError, match="NormClipping"):
        run(ZerothOrder(bits=BITS), NormClipping(1.0), module=ForSGD())
