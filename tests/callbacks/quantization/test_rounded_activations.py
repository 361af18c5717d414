"""Rounded activations: the same as in a loop by hand, measured against the plain module, and restored by one function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.regression import MeanSquaredError

from lightning_grad.callbacks import QuantizationAwareTraining
from lightning_grad.functional import fake_quantize_activation, fake_quantize_weight
from lightning_grad.testing import assert_identical, fit, make_classifier
from lightning_grad.utilities import apply_activation_quantization
from tests.callbacks.quantization.test_quantization_aware_training import Attention, qat
from tests.callbacks.sparsity.test_nm_choice import Backwards
from tests.callbacks.sparsity.test_nm_sparsity import STEPS, Alias, Regression, Tied, data, linear_net, trainer

GAP = pytest.mark.filterwarnings("ignore:.*activations that are not rounded")


def hand_written(bits: int | None, activation_bits: int, quantizer: Any, hadamard: bool, start: float) -> nn.Module:
    """Train linear_net() with rounded inputs of both layers, with nothing of the callback."""
    net = linear_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    def layer(at: int, x: Tensor, done: float) -> Tensor:
        weight = net[at].weight
        if done >= start:
            x = fake_quantize_activation(x, activation_bits, quantizer, hadamard)
            weight = weight if bits is None else fake_quantize_weight(weight, bits)
        return F.linear(x, weight, net[at].bias)

    for step, (x, y) in enumerate(data()):
        optimizer.zero_grad()
        F.mse_loss(layer(2, torch.tanh(layer(0, x, step / STEPS)), step / STEPS), y).backward()
        optimizer.step()
    return net


@pytest.mark.parametrize(
    ("bits", "activation_bits", "quantizer", "hadamard", "start"),
    [
        (4, 4, "affine", False, 0.0),
        (None, 2, "affine", False, 0.4),
        (2, 3, "quest", False, 0.0),
        (8, 2, "quest", True, 0.4),
    ],
)
@GAP
def test_a_fit_equals_a_loop_with_rounded_inputs(
    bits: Any, activation_bits: int, quantizer: Any, hadamard: bool, start: float
) -> None:
    callback = qat(
        bits, activation_bits=activation_bits, activation_quantizer=quantizer, hadamard=hadamard, start=start
    )
    module = Regression(linear_net())
    trainer(callback).fit(module, data())
    expected = hand_written(bits, activation_bits, quantizer, hadamard, start).state_dict()
    for name, value in module.net.state_dict().items():
        if "bias" in name or bits is None:
            assert torch.equal(value, expected[name]), name


class Measured(Regression):
    """Logs a loss, a metric object and values that are no numbers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.error = MeanSquaredError()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        output = self.net(batch[0])
        self.error(output, batch[1])
        self.log("error", self.error)
        self.log_dict({"val_loss": F.mse_loss(output, batch[1]), "constant": 1.0})

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])


def test_the_gap_is_that_of_the_plain_module_and_one_function_closes_it(tmp_path: Path) -> None:
    class Step(pl.Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == 0:
                outputs_of.append(pl_module.net(batch[0]))

    outputs_of: list[Tensor] = []
    saving, callback = ModelCheckpoint(tmp_path), qat(4, activation_bits=2)
    made = trainer(callback, Step(), saving, enable_checkpointing=True, num_sanity_val_steps=0)
    words = (
        r"(error|val_loss) is [\d.]+ instead of [\d.]+. To compute what was validated.*"
        r"\['QuantizationAwareTraining'\]\['activation_formats'\]"
    )
    with pytest.warns(UserWarning, match=words):
        made.fit(Measured(linear_net()), data(), data())
    checkpoint = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)
    plain = Measured(linear_net())
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    x, y = next(iter(data()))
    without = F.mse_loss(plain.net(x), y).detach()
    formats = checkpoint["callbacks"]["QuantizationAwareTraining"]["activation_formats"]
    assert formats == callback.activation_formats
    undo = apply_activation_quantization(plain, formats)
    assert torch.equal(plain.net(x), outputs_of[0])
    rounded = F.mse_loss(plain.net(x), y).detach()
    expected = 100 * abs(without - rounded) / max(1.0, float(rounded))
    assert float(made.callback_metrics["quant/plain_gap"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(expected) > 1.0
    (again,) = trainer().validate(plain, data(), verbose=False)
    assert again["val_loss"] == float(made.callback_metrics["val_loss"])
    undo()
    (alone,) = trainer().validate(plain, data(), verbose=False)
    assert alone["val_loss"] != again["val_loss"]
    for name in ("validate", "test"):  # with the callback, in this process or in another
        for other in (made, trainer(qat(4, activation_bits=2), ModelCheckpoint(tmp_path), enable_checkpointing=True)):
            (again,) = getattr(other, name)(plain, data(), ckpt_path=saving.best_model_path, verbose=False)
            assert again["val_loss"] == float(made.callback_metrics["val_loss"])
    assert torch.equal(made.predict(plain, data())[0], outputs_of[0])
    assert not torch.equal(plain.net(x), outputs_of[0])
    assert not any(layer._forward_pre_hooks for layer in plain.modules())


def test_the_gap_of_eight_bits_is_small_and_measuring_it_leaves_no_trace() -> None:
    def run(*loaders: Any) -> tuple[Any, Any]:
        module, made = Measured(linear_net()), trainer(qat(8, activation_bits=8), max_epochs=2)
        made.fit(module, data(), *loaders)
        return made.callback_metrics, module.state_dict()

    metrics, weights = run(data())
    assert 0.0 < float(metrics["quant/plain_gap"]) < 1.0
    assert_identical(weights, run()[1])
    assert float(metrics["error"]) == pytest.approx(float(metrics["val_loss"]), rel=1e-5), "batches count once"


def test_attention_is_skipped_by_name_and_convolutions_have_a_scale_for_each_sample(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    module, callback = Regression(Attention()), qat(4, activation_bits=8)
    with caplog.at_level("INFO"):
        trainer(callback).fit(module, data())
    assert "does not round the input of net.attend, because its queries" in caplog.text
    assert "does not round the input of net.attend.out_proj, because its attention never calls it" in caplog.text
    assert list(callback.activation_formats) == ["net.convolve", "net.turned"]
    convolve, seen = module.net.convolve, []
    undo = apply_activation_quantization(module, callback.activation_formats)
    convolve.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.rand(3, 16, 5) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    convolve(x)
    assert torch.equal(seen[0], fake_quantize_activation(x.flatten(1), 8).view_as(x))
    convolve(x[0])
    assert torch.equal(seen[1], seen[0][0])
    undo()


@pytest.mark.parametrize(("kind", "include"), [(Tied, ["net.a"]), (Alias, ["net.body.*"])])
@GAP
def test_layers_of_a_tied_weight_are_rounded_once_each(kind: Any, include: list[str]) -> None:
    torch.manual_seed(0)
    module, callback = Regression(kind()), qat(4, include=include, activation_bits=4)
    counts: list[int] = []

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            counts.append(sum(len(layer._forward_pre_hooks) for layer in pl_module.modules()))

    trainer(callback, Count()).fit(module, data())
    assert set(counts) == {2} == {len(callback.activation_formats)}
    assert not any(layer._forward_pre_hooks for layer in module.modules())


@GAP
def test_layers_that_round_their_input_are_not_rounded_twice() -> None:
    module, callback = Regression(linear_net()), qat(4, activation_bits=3, activation_quantizer="quest")
    made = trainer(callback)
    made.fit(module, data(), data())
    once = made.validate(module, data(), verbose=False)
    undo = apply_activation_quantization(module, callback.activation_formats)
    assert made.validate(module, data(), verbose=False) == once
    undo()
    assert not any(layer._forward_pre_hooks for layer in module.modules())


def test_the_layers_follow_the_first_batch() -> None:
    callback = QuantizationAwareTraining(4, activation_bits=8)
    trainer(callback, max_epochs=2).fit(Regression(Backwards()), data())
    assert sorted(callback.activation_formats) == [name.removesuffix(".weight") for name in sorted(callback.formats)]
    assert sorted(callback.activation_formats) == ["net.late", "net.mid"]


def test_what_cannot_hold_is_declared() -> None:
    assert qat(4).why_not_portable == ""
    assert qat(4, activation_bits=8).why_not_portable.endswith("the rounding of activations to 8 bits.")


def test_a_module_without_the_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no layer 'net.0', whose input is to be rounded"):
        apply_activation_quantization(linear_net(), {"net.0": {"bits": 8}})


@GAP
def test_a_step_that_fails_on_a_repeated_batch_is_told_and_the_run_goes_on() -> None:
    class Once(Regression):
        def __init__(self) -> None:
            super().__init__(linear_net())
            self.batches = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.sanity_checking or batch_idx or self.batches < self.trainer.current_epoch + 1:
                self.batches += batch_idx == 0
                return super().validation_step(batch, batch_idx)
            raise RuntimeError("each batch comes once")

    made = trainer(qat(4, activation_bits=4), num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="could not be measured.*each batch comes once"):
        made.fit(Once(), data(), data())
    assert made.state.finished
    assert "quant/plain_gap" not in made.callback_metrics


def test_it_works_in_a_classifier_with_sparsity() -> None:
    from lightning_grad.callbacks import NMSparsity
    from lightning_grad.functional import is_nm, read_quantized_weight

    layers = ["encoder.*", "hidden"]
    pair = [NMSparsity("2:4", "ste", include=layers, figure=False), qat(8, include=layers, activation_bits=8)]
    _, module = fit(pair, make_classifier(), max_epochs=1)
    assert is_nm(module.hidden.weight, 2, 4)
    assert read_quantized_weight(module.hidden.weight, 8).bits == 8
    assert list(pair[1].activation_formats) == ["encoder.linear1", "encoder.linear2", "hidden"]
