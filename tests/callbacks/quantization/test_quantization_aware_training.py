"""QuantizationAwareTraining beyond the contract: its mathematics in a fit, its phases, and its edge cases."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.callbacks import QuantizationAwareTraining, ZerothOrder
from lightning_grad.callbacks.sharpness import SAM
from lightning_grad.functional import (
    fake_quantize_weight,
    hadamard_block,
    hadamard_transform,
    near_boundary,
    quantize_weight,
    read_quantized_weight,
)
from lightning_grad.functional.quantization.grids import Quantizer
from lightning_grad.testing import StopAfter, make_classifier
from lightning_grad.testing import fit as fit_classifier
from tests.callbacks.sparsity.test_nm_choice import InOut
from tests.callbacks.sparsity.test_nm_sparsity import (
    STEPS,
    Alias,
    Regression,
    Spy,
    Tied,
    data,
    linear_net,
    trainer,
)


def qat(bits: int | None = 4, **arguments: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(bits, **{"include": ["*"], **arguments})


def dense_of(module: Any, layer: int = 0) -> Tensor:
    """Return a copy of the dense weight of a layer of linear_net()."""
    return dict(module.named_parameters())[f"net.{layer}.weight"].detach().clone()


def fit(callback: Any, module: Any = None, *others: Any, **arguments: Any) -> Any:
    module = Regression(linear_net()) if module is None else module
    trainer(callback, *others, **arguments).fit(module, data())
    return module


# The mathematics.


def hand_written(bits: int, quantizer: Quantizer, hadamard: bool, start: float = 0.0) -> nn.Sequential:
    """Train linear_net() with rounded weights, with nothing of the callback."""
    net = linear_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    def rounded(layer: nn.Linear, done: float) -> Tensor:
        return fake_quantize_weight(layer.weight, bits, quantizer, hadamard=hadamard) if done >= start else layer.weight

    for step, (x, y) in enumerate(data()):
        done = step / STEPS
        hidden = torch.tanh(F.linear(x, rounded(net[0], done), net[0].bias))
        optimizer.zero_grad()
        F.mse_loss(F.linear(hidden, rounded(net[2], done), net[2].bias), y).backward()
        optimizer.step()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.copy_(rounded(layer, 1.0))
    return net


@pytest.mark.parametrize(
    ("bits", "quantizer", "hadamard", "start"),
    [
        (8, "ste", False, 0.0),
        (2, "ste", False, 0.4),
        (1, "statsq", False, 0.0),
        (3, "quest", False, 0.0),
        (2, "quest", True, 0.4),
    ],
)
def test_a_fit_equals_a_loop_with_rounded_weights(bits: int, quantizer: Any, hadamard: bool, start: float) -> None:
    module = fit(qat(bits, quantizer=quantizer, hadamard=hadamard, start=start))
    expected = hand_written(bits, quantizer, hadamard, start).state_dict()
    for name, value in module.net.state_dict().items():
        assert torch.equal(value, expected[name]), name
    dense = fit(qat(None)).net.state_dict()
    assert not torch.allclose(dense["0.bias"], expected["0.bias"])


GRIDS: list[Any] = [(4, "ste", 15), (2, "ste", 3), (1, "statsq", 2), (3, "statsq", 8), (2, "quest", 4)]


@pytest.mark.parametrize(("bits", "quantizer", "levels"), GRIDS)
def test_the_file_holds_the_grid_and_the_state_says_which(
    bits: int, quantizer: Any, levels: int, tmp_path: Path
) -> None:
    callback = qat(bits, quantizer=quantizer, hadamard=False)
    module = fit(callback, None, ModelCheckpoint(tmp_path), enable_checkpointing=True)
    checkpoint = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)
    formats = checkpoint["callbacks"]["QuantizationAwareTraining"]["formats"]
    assert formats == callback.formats
    assert set(formats) == {"net.0.weight", "net.2.weight"}
    for name, form in formats.items():
        weight = checkpoint["state_dict"][name]
        assert torch.equal(weight, module.state_dict()[name])
        quantized = read_quantized_weight(weight, form["bits"], form["quantizer"], form["dim"])
        assert torch.equal(quantized.dequantize(), weight)
        assert levels / 2 < max(len(row.unique()) for row in weight) <= levels


def test_a_hadamard_basis_holds_the_grid_and_the_layer_does_not() -> None:
    weight = fit(qat(2, quantizer="quest")).net[0].weight.detach()
    rows = hadamard_transform(weight, hadamard_block(16))
    assert {len((row / row.abs().max()).round(decimals=4).unique()) for row in rows} == {4}
    with pytest.raises(ValueError, match="on no grid of 2 bits"):
        read_quantized_weight(weight, 2, "quest")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.other = nn.MultiheadAttention(16, 2, batch_first=True, kdim=16, vdim=16)
        self.convolve = nn.Conv1d(16, 8, 3, padding=1)
        self.widen = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.turned = InOut(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        x = self.other(*[self.attend(x, x, x)[0]] * 3)[0]
        return self.turned(self.widen(self.convolve(x.transpose(1, 2))).mean(2))


def test_attention_convolutions_and_other_layouts_have_a_scale_for_each_output() -> None:
    torch.manual_seed(0)
    callback = qat(3, include=["net.attend", "net.other", "net.convolve", "net.widen.weight", "net.turned"])
    module = fit(callback, Regression(Attention()))
    outputs = {name: form["dim"] for name, form in callback.formats.items()}
    assert outputs == {
        "net.attend.in_proj_weight": 0,
        "net.attend.out_proj.weight": 0,
        "net.other.in_proj_weight": 0,
        "net.other.out_proj.weight": 0,
        "net.convolve.weight": 0,
        "net.widen.weight": 1,
        "net.turned.weight": 1,
    }
    for name, dim in outputs.items():
        weight = module.get_parameter(name).detach()
        assert read_quantized_weight(weight, 3, dim=dim).scales.numel() == weight.shape[dim]
        assert len(weight.unique()) > 7, "one scale for the whole weight would give 7 values"


@pytest.mark.parametrize(("kind", "include"), [(Tied, ["net.a"]), (Alias, ["net.body.*"])])
def test_tied_weights_are_rounded_in_every_use_and_resume(kind: Any, include: list[str], tmp_path: Path) -> None:
    def run(**arguments: Any) -> Any:
        torch.manual_seed(0)
        module = Regression(kind())
        saving = ModelCheckpoint(tmp_path, save_top_k=-1)
        made = trainer(qat(include=include), saving, max_epochs=2, enable_checkpointing=True)
        made.fit(module, data(), data(), **arguments)
        return made.callback_metrics["val_loss"], module

    value, module = run()
    plain = Regression(kind())
    plain.load_state_dict(torch.load(tmp_path / f"epoch=1-step={2 * STEPS}.ckpt", weights_only=True)["state_dict"])
    (again,) = trainer().validate(plain, data(), verbose=False)
    assert again["val_loss"] == float(value)
    _, resumed = run(ckpt_path=tmp_path / f"epoch=0-step={STEPS}.ckpt")
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_bf16_true_keeps_the_number_of_levels() -> None:
    module = fit(qat(4), precision="bf16-true")
    weight = module.net[0].weight
    assert weight.dtype == torch.bfloat16
    assert max(len(row.unique()) for row in weight) <= 15


def test_the_average_of_the_weights_is_rounded_in_validation_and_file(tmp_path: Path) -> None:
    class Averages(pl.Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(pl_module.net[0].weight.clone())

    seen: list[Tensor] = []
    ema, saving = EMAWeightAveraging(decay=0.9), ModelCheckpoint(tmp_path)
    made = trainer(qat(3), ema, Averages(), saving, enable_checkpointing=True, num_sanity_val_steps=0)
    made.fit(Regression(linear_net()), data(), data())
    saved = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)["state_dict"]["net.0.weight"]
    assert torch.equal(saved, seen[-1])
    assert torch.equal(read_quantized_weight(saved, 3).dequantize(), saved)


# Phases of a run.


class Fall(Regression):
    """Validates worse and worse, so the first checkpoint is the best."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", -float(self.global_step))


def test_the_best_checkpoint_is_quantized_although_the_dense_phase_was_better(tmp_path: Path) -> None:
    def run(**arguments: Any) -> tuple[Any, Any]:
        saving = ModelCheckpoint(tmp_path / str(len(arguments)), monitor="score", mode="max")
        stopping = EarlyStopping("score", mode="max", patience=1)
        made = trainer(qat(4, start=0.6, **arguments), saving, stopping, max_epochs=5, enable_checkpointing=True)
        made.fit(Fall(linear_net()), data(), data())
        return made, torch.load(saving.best_model_path, weights_only=True)["state_dict"]["net.0.weight"]

    made, best = run()
    assert made.current_epoch == 4, "early stopping starts to wait when the weights are quantized"
    assert read_quantized_weight(best, 4).bits == 4
    with pytest.warns(UserWarning, match=r"stopped at 40 % of its length, before start=0.6, so nothing is quantized"):
        made, best = run(restart_monitors=False)
    with pytest.raises(ValueError, match="on no grid"):
        read_quantized_weight(best, 4)


def test_weights_that_are_not_quantized_are_named_when_tested(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_top_k=-1)
    made = trainer(qat(4, start=0.6), saving, max_epochs=2, enable_checkpointing=True, log_every_n_steps=1)
    module = Regression(linear_net())
    made.fit(module, data(), data())
    assert made.callback_metrics["quant/active"] == 1.0
    made.validate(module, data(), verbose=False)
    early = tmp_path / f"epoch=0-step={STEPS}.ckpt"
    last, used = tmp_path / f"epoch=1-step={2 * STEPS}.ckpt", qat(8)
    trainer(used).fit(Regression(linear_net()), data())
    saver = ModelCheckpoint(tmp_path, save_top_k=-1)
    trainer(used, saver, enable_checkpointing=True).validate(module, data(), ckpt_path=last, verbose=False)
    assert {form["bits"] for form in used.formats.values()} == {4}, "of the file, not of its own fit"
    other = trainer(qat(4, start=0.6), ModelCheckpoint(tmp_path, save_top_k=-1), enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"2 of its 2 weights are not quantized in the checkpoint .*net.0.weight"):
        other.validate(Regression(linear_net()), data(), ckpt_path=early, verbose=False)


def test_active_says_which_steps_are_quantized() -> None:
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics["quant/active"]))

    seen: list[float] = []
    fit(qat(start=0.25), None, Look(), log_every_n_steps=1)
    assert seen == [0.0] * 4 + [1.0] * 16


def test_logged_values_are_what_they_say() -> None:
    callback = qat(3)
    levels: list[Tensor] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            dense = [dense_of(pl_module, i) for i in (0, 2)]
            levels.append(torch.cat([quantize_weight(w, 3).integers.flatten() for w in dense]))
            metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})
            squares = [(quantize_weight(w, 3).dequantize() - w).square().sum() for w in dense]
            errors.append(float((sum(squares) / sum(w.square().sum() for w in dense)).sqrt()))

    metrics: list[dict[str, float]] = []
    errors: list[float] = []
    trainer(callback, Look(), log_every_n_steps=1).fit(
        Regression(linear_net(), lambda p: torch.optim.SGD(p, lr=0.5)), data()
    )
    assert [found["quant/error"] for found in metrics] == pytest.approx(errors, rel=1e-5)
    flips = [float((a != b).float().mean()) for a, b in pairwise(levels)]
    assert [found["quant/flips"] for found in metrics[1:]] == pytest.approx(flips, rel=1e-5)
    assert max(flips) > 0.0


# Annealing.


def test_confident_weights_stay_bit_for_bit_and_the_others_train() -> None:
    def run(width: float) -> list[Tensor]:
        spy = Spy(dense_of)
        adam = Regression(linear_net(), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))
        callback = qat(2, quantizer="statsq", annealing_start=0.5, annealing_width=width)
        trainer(callback, spy, log_every_n_steps=1).fit(adam, data())
        return spy.seen

    def moved(seen: list[Tensor], step: int) -> Tensor:
        return seen[step] != seen[step - 1]

    seen = run(0.1)
    assert moved(seen, 9).all(), "without annealing, Adam moves every weight"
    for step in range(10, STEPS):
        free = near_boundary(seen[step - 1], 2, width=0.1)
        assert 0 < int(free.sum()) < free.numel() / 2
        assert torch.equal(moved(seen, step), free)


def test_zeroed_gradients_alone_would_not_hold_weights() -> None:
    class Zero(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step >= 10:
                pl_module.net[0].weight.grad.zero_()

    spy = Spy(dense_of)
    adam = Regression(linear_net(), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))
    trainer(Zero(), spy).fit(adam, data())
    assert (spy.seen[12] != spy.seen[11]).all()


def test_annealing_of_a_step_that_a_grad_scaler_skips() -> None:
    class Overflow(pl.Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 12:
                dict(pl_module.named_parameters())["net.0.weight"].grad.fill_(torch.inf)

    spy = Spy(dense_of)
    scaling = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    callback = qat(2, quantizer="statsq", annealing_start=0.5, annealing_width=0.1)
    fit(callback, None, Overflow(), spy, plugins=[scaling])
    assert torch.equal(spy.seen[12], spy.seen[11])
    for step in (11, 13, 14):
        free = near_boundary(spy.seen[step - 1], 2, width=0.1)
        assert torch.equal(spy.seen[step] != spy.seen[step - 1], free)
    assert spy.seen[-1].isfinite().all()


def test_a_step_around_lightning_is_said_once() -> None:
    class Around(Regression):
        def __init__(self) -> None:
            super().__init__(linear_net())
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    with pytest.warns(UserWarning, match="annealing held no weight fixed") as record:
        module = fit(qat(2, annealing_start=0.5), Around())
    assert len([r for r in record if "annealing held" in str(r.message)]) == 1
    assert read_quantized_weight(module.net[0].weight, 2).bits == 2


class Embedded(nn.Module):
    """An embedding whose rows are few enough to get gradients in each step."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(10, 16, sparse=sparse), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table((x[:, :2].abs() * 3).long().clamp(max=9)).sum(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "arguments", [{"quantizer": "statsq", "annealing_start": 0.3, "annealing_width": 0.1}, {"quantizer": "quest"}]
)
def test_sparse_gradients_train_as_dense_ones(arguments: dict[str, Any]) -> None:
    def trained(sparse: bool) -> Any:
        module = Regression(Embedded(sparse), lambda p: torch.optim.SGD(p, lr=0.1))
        return fit(qat(2, include=["net.table.weight"], **arguments), module).state_dict()

    expected = trained(False)
    for name, value in trained(True).items():
        torch.testing.assert_close(value, expected[name])


# Batch norms.


def test_batch_norms_freeze_and_thaw() -> None:
    seen = Spy(lambda m: (m.norm.training, m.norm.running_mean.clone()))
    _, module = fit_classifier([QuantizationAwareTraining(freeze_batchnorm_at=0.5), seen], make_classifier())
    modes, means = zip(*seen.seen, strict=True)
    assert modes == (True,) * 12 + (False,) * 12
    assert torch.equal(means[11], means[-1])
    assert not torch.equal(means[10], means[11])
    assert module.norm.training
    module = make_classifier()
    with pytest.raises(RuntimeError):
        fit_classifier([QuantizationAwareTraining(freeze_batchnorm_at=0.5), StopAfter(20)], module)
    assert module.norm.training


# What is refused, and what is said.


@pytest.mark.parametrize(
    ("others", "optimizer", "words"),
    [
        ([SAM()], torch.optim.SGD, "SAM moves them within a step.*without SAM"),
        ([ZerothOrder()], torch.optim.SGD, "ZerothOrder moves them within a step"),
        ([], torch.optim.LBFGS, "LBFGS moves them within a step.*such as SGD or AdamW"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_weights_that_move_within_a_step_are_refused(others: Any, optimizer: Any, words: str, first: bool) -> None:
    module = Regression(linear_net(), lambda p: optimizer(p, lr=0.01))
    callbacks = [qat(), *others] if first else [*others, qat()]
    with pytest.raises(ValueError, match=words):
        trainer(*callbacks).fit(module, data())
    trainer(*[qat(None), *others], max_steps=1).fit(module, data())


def test_two_of_one_weight_are_refused_and_of_others_work() -> None:
    with pytest.raises(ValueError, match=r"\[b\] and another technique both choose hidden.weight .*Separate them"):
        fit_classifier([qat(include=["hidden"]), qat(8, include=["hidden"], name="b")])
    two = [qat(3, include=["hidden"]), qat(8, include=["head"], name="b")]
    _, module = fit_classifier(two, max_epochs=1)
    assert (read_quantized_weight(module.hidden.weight, 3).bits, two[1].formats["head.weight"]["bits"]) == (3, 8)


def test_a_load_in_mid_fit_is_rounded_again() -> None:
    other = {f"net.{name}": value for name, value in linear_net().state_dict().items()}
    seen: list[bool] = []

    class Load(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                pl_module.load_state_dict(other)

        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 6:
                expected = quantize_weight(other["net.0.weight"], 4).dequantize()
                seen.append(torch.equal(pl_module.net[0].weight.detach(), expected))

    fit(qat(), None, Load())
    assert seen == [True]


def test_a_run_without_an_end_needs_one_only_for_shares() -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 5

    endless = {"max_epochs": -1, "max_steps": -1}
    fit(qat(), None, Stop(), **endless)
    with pytest.raises(ValueError, match=r"no known end. Set total_steps="):
        fit(qat(start=0.5), None, Stop(), **endless)
    module = fit(qat(start=0.5, total_steps=4), None, Stop(), **endless)
    assert read_quantized_weight(module.net[0].weight, 4).bits == 4


def test_a_fit_of_no_epochs_changes_nothing() -> None:
    module, before = Regression(linear_net()), linear_net().state_dict()
    fit(qat(2), module, max_epochs=0)
    for name, value in module.net.state_dict().items():
        assert torch.equal(value, before[name])


def test_no_weight_is_quantized_without_bits_and_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit_classifier([QuantizationAwareTraining(None)], max_epochs=1)
        fit_classifier([QuantizationAwareTraining(4)], max_epochs=1)
    assert "quantizes none of" in caplog.text
    assert "4-bit ste" in caplog.text
