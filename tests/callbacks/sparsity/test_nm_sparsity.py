"""NMSparsity beyond the contract: its mathematics in a fit, the faults of the released code, and its edge cases."""

import csv
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import AccuracyGradientLR, NMSparsity
from lightning_grad.functional import RECIPES, is_nm, nm_mask
from lightning_grad.testing import fit as fit_classifier
from lightning_grad.utilities import sparsity_report

STEPS, BATCH = 20, 8


class Regression(pl.LightningModule):
    """Fits a random linear map; any net, any optimizer."""

    def __init__(self, net: nn.Module, make_optimizer: Any = None) -> None:
        super().__init__()
        self.net = net
        self.make_optimizer = make_optimizer or (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.mse_loss(self.net(x), y))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def linear_net(**kwargs: Any) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 16, **kwargs), nn.Tanh(), nn.Linear(16, 8, **kwargs))


def data(inputs: int = 16, outputs: int = 8, shape: tuple[int, ...] = (), kind: type = DataLoader) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH, inputs, *shape, generator=generator)
    return kind(TensorDataset(x, torch.randn(len(x), outputs, generator=generator)), BATCH)


def trainer(*callbacks: Any, **arguments: Any) -> pl.Trainer:
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "log_every_n_steps": 5}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(**{**quiet, **defaults, **arguments}, callbacks=list(callbacks))


def fit(callback: NMSparsity, module: pl.LightningModule | None = None, **arguments: Any) -> pl.LightningModule:
    module = Regression(linear_net()) if module is None else module
    trainer(callback, **arguments).fit(module, data())
    return module


class Spy(pl.Callback):
    """Keeps what a function sees after every optimizer step."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(self.look(pl_module))


# The recipes, against loops written out by hand.


def hand_written(
    recipe: str, gradient: str, n: int = 1, m: int = 4, dense: float = 0.2, last: float = 0.2
) -> nn.Sequential:
    """Train linear_net() as the recipe's formulas say, with nothing of the callback."""
    net = linear_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    weights = [net[0].weight, net[2].weight]
    for step, (x, y) in enumerate(data()):
        done = step / STEPS
        factors = []
        for w in weights:
            if recipe == "sr-ste":
                factors.append(nm_mask(w, n, m))
            elif done < dense:
                factors.append(torch.ones_like(w))
            else:
                position = (done - dense) / (1 - dense - last)
                mask = nm_mask(w, n, m)
                decay = (
                    0.0 if done >= 1 - last else float(torch.exp(torch.tensor(-7.0 * position, dtype=torch.float64)))
                )
                factors.append(mask + (1 - mask) * decay)
        shown = [(w.detach() * f).requires_grad_() for w, f in zip(weights, factors, strict=True)]
        out = F.linear(torch.tanh(F.linear(x, shown[0], net[0].bias)), shown[1], net[2].bias)
        optimizer.zero_grad()
        gradients = torch.autograd.grad(F.mse_loss(out, y), [*shown, net[0].bias, net[2].bias])
        for w, f, g in zip(weights, factors, gradients[:2], strict=True):
            w.grad = g if gradient == "ste" else g * f
            if recipe == "sr-ste":
                w.grad = w.grad + 0.01 * (1 - f) * w.detach()
        net[0].bias.grad, net[2].bias.grad = gradients[2:]
        optimizer.step()
    with torch.no_grad():
        for w in weights:
            w.mul_(nm_mask(w, n, m))
    return net


@pytest.mark.parametrize(
    ("recipe", "gradient"), [("sr-ste", "ste"), ("mdgf-exponential", "masked"), ("mdgf-exponential", "ste")]
)
def test_a_fit_equals_the_formulas_written_out(recipe, gradient):
    phases = {} if recipe == "sr-ste" else {"dense_fraction": 0.2, "finetune_fraction": 0.2}
    module = fit(NMSparsity("1:4", recipe, gradient, include=["*"], sr_ste_lambda=0.01, **phases))
    expected = hand_written(recipe, gradient).state_dict()
    for name, value in module.net.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("pattern", ["2:4", "1:8", "3:8", "3:16", "1:16"])
def test_every_recipe_ends_exactly(recipe, pattern):
    module = Regression(linear_net(), lambda p: torch.optim.AdamW(p, lr=1e-3))
    fit(NMSparsity(pattern, recipe, include=["*"]), module)
    rows = sparsity_report(module, pattern, verbose=False)
    n, m = map(int, pattern.split(":"))
    assert [row.exact for row in rows] == [True, True]
    assert [row.zeros for row in rows] == [1 - n / m] * 2


# The faults of the released code.


def test_biases_stay_and_train():
    module = Regression(linear_net())
    before = module.net[0].bias.detach().clone()
    fit(NMSparsity("1:4", include=["*"]), module)
    assert not torch.equal(module.net[0].bias, before)


@pytest.mark.parametrize("recipe", ["sdgf-stepwise", "sdgf-geometric", "mdgf-linear"])
@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions_and_both_axes(recipe, axis, dimensions):
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    net = nn.Sequential(conv(8, 16, 3, padding=1), nn.ReLU(), conv(16, 8, 1), nn.Flatten(), nn.LazyLinear(8))
    net(torch.randn(1, 8, *[3] * dimensions))
    module = Regression(net)
    callback = NMSparsity("1:8", recipe, axis=axis, include=["net.0", "net.2"])
    trainer(callback).fit(module, data(8, 8, (3,) * dimensions))
    for layer in (net[0], net[2]):
        assert is_nm(layer.weight, 1, 8, axis)
        assert (layer.weight != 0).float().mean() == pytest.approx(1 / 8)


def test_patterns_by_name_do_not_overwrite_each_other():
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), nn.Flatten(), nn.Linear(64, 8))
    patterns = {"*.self_attn.*": "2:4", "*.linear*": "1:8"}
    callback = NMSparsity(patterns, "sdgf-stepwise", include=["net.0.*"])
    trainer(callback).fit(Regression(net), data(4, 8, (16,)))
    layer = net[0]
    for weight in (layer.self_attn.in_proj_weight, layer.self_attn.out_proj.weight):
        assert (weight != 0).float().mean() == 0.5
        assert is_nm(weight, 2, 4)
    for weight in (layer.linear1.weight, layer.linear2.weight):
        assert (weight != 0).float().mean() == 0.125
        assert is_nm(weight, 1, 8)


def test_the_fine_tuning_phase_begins_with_its_first_step():
    callback = NMSparsity("1:4", "mdgf-exponential", dense_fraction=0.2, finetune_fraction=0.25, include=["*"])
    spy = Spy(lambda _: callback.weights[0].phase.decay)
    trainer(spy, callback).fit(Regression(linear_net()), data())
    assert spy.seen[: STEPS // 5 - 1] == [1.0] * 3
    first_exact = 1 + spy.seen.index(0.0)
    assert first_exact == STEPS * 3 // 4, "after this many steps every later step must see D = 0"


def test_resume_inside_a_frame_stays_in_it(tmp_path):
    def patterns(callback: NMSparsity) -> Spy:
        return Spy(lambda _: str(callback.weights[0].phase.pattern))

    whole = NMSparsity("1:8", "sdgf-stepwise", include=["*"])
    whole_spy = patterns(whole)
    saving = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
    trainer(whole_spy, whole, saving, max_epochs=4, enable_checkpointing=True).fit(Regression(linear_net()), data())
    resumed = NMSparsity("1:8", "sdgf-stepwise", include=["*"])
    resumed_spy = patterns(resumed)
    path = tmp_path / f"epoch=1-step={2 * STEPS}.ckpt"
    again = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
    trainer(resumed_spy, resumed, again, max_epochs=4, enable_checkpointing=True).fit(
        Regression(linear_net()), data(), ckpt_path=path
    )
    assert resumed_spy.seen == whole_spy.seen[2 * STEPS :]
    assert set(resumed_spy.seen) == {"2:8", "1:8"}


def test_bf16_true():
    module = Regression(linear_net())
    half = DataLoader(TensorDataset(*(t.bfloat16() for t in data().dataset.tensors)), BATCH)
    trainer(NMSparsity("1:4", include=["*"]), precision="bf16-true").fit(module, half)
    assert module.net[0].weight.dtype == torch.bfloat16
    assert is_nm(module.net[0].weight, 1, 4)


def test_a_layer_whose_rows_do_not_divide_is_skipped_by_name():
    callback = NMSparsity("1:16", include=["*"])
    module = Regression(nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8)))
    fit(callback, module)
    assert (module.net[1].weight != 0).all()
    with pytest.raises(ValueError, match="dimension 1 has size 16, which is not a multiple of 32"):
        fit(NMSparsity("1:32", include=["*"]))


def test_nan_is_pruned_and_reported_once(recwarn):
    class BreakOneWeight(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == STEPS:
                with torch.no_grad():
                    pl_module.net[0]._parameters["weight"][0, 0].fill_(torch.nan)

    module = Regression(linear_net())
    trainer(BreakOneWeight(), NMSparsity("1:4", "ste", include=["*"]), log_every_n_steps=1).fit(module, data())
    assert not module.net[0].weight.isnan().any()
    assert is_nm(module.net[0].weight, 1, 4)
    assert sum("NaN in net.0.weight" in str(warning.message) for warning in recwarn.list) == 1


class KeepGradient(pl.Callback):
    """Keeps the gradient of the first layer as the optimizer will see it."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(dict(pl_module.named_parameters())["net.0.weight"].grad.clone())


@pytest.mark.parametrize(
    "arguments", [{"accumulate_grad_batches": 4}, {"accumulate_grad_batches": 8}, {"scale": 65536.0}]
)
def test_sr_ste_has_the_same_strength_under_accumulation_and_loss_scale(arguments):
    arguments = dict(arguments)
    plugins = {}
    if scale := arguments.pop("scale", None):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugins["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    seen = {}
    for strength in (0.0, 0.5):
        keep, module = KeepGradient(), Regression(linear_net())
        callback = NMSparsity("1:4", "sr-ste", sr_ste_lambda=strength, include=["*"])
        trainer(callback, keep, **arguments, **plugins, max_steps=1).fit(module, data())
        seen[strength] = keep.seen[0]
        if plugins:
            plugins["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]
    weight = linear_net()[0].weight.detach()
    expected = 0.5 * (1 - nm_mask(weight, 1, 4)) * weight
    torch.testing.assert_close(seen[0.5] - seen[0.0], expected, atol=2e-4, rtol=1e-3)


# Edge cases.


def test_by_default_the_first_and_last_layer_embeddings_and_norms_stay_dense():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    module = Regression(net)
    fit(NMSparsity("1:4"), module)
    assert [(layer.weight == 0).any().item() for layer in (net[0], net[2], net[4])] == [False, True, False]


def test_depthwise_and_rgb_convolutions_are_skipped():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    module = Regression(nn.Sequential(net, nn.Flatten(), nn.LazyLinear(8)))
    module.net(torch.randn(1, 3, 8, 8))
    trainer(NMSparsity("1:4", include=["net.0.*"])).fit(module, data(3, 8, (8, 8)))
    assert [(layer.weight == 0).any().item() for layer in net] == [False, False, True]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.tanh(self.a(x))))


def test_tied_weights_are_masked_in_every_use_when_included(tmp_path):
    torch.manual_seed(0)
    module = Regression(Tied())
    fit(NMSparsity("1:4", include=["net.a", "net.b"]), module)
    assert module.net.a.weight is module.net.b.weight
    assert is_nm(module.net.a.weight, 1, 4)


class Alias(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
        self.last = self.body[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize(("kind", "include"), [(Tied, ["net.a"]), (Alias, ["net.body.*"])])
def test_parameters_of_several_names_stay_portable_and_resume(kind, include, tmp_path):
    def run(**arguments: Any) -> tuple[Any, list[dict[str, Tensor]]]:
        torch.manual_seed(0)
        module, in_mid_fit = Regression(kind()), Spy(lambda m: {k: v.clone() for k, v in m.state_dict().items()})
        saving = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
        callback = NMSparsity("1:4", "ste", include=include)
        trainer(callback, in_mid_fit, saving, max_epochs=3, enable_checkpointing=True).fit(module, data(), **arguments)
        return module, in_mid_fit.seen

    whole, states = run()
    path = tmp_path / f"epoch=0-step={STEPS}.ckpt"
    saved = torch.load(path)["state_dict"]
    for name, value in states[STEPS - 1].items():
        assert torch.equal(value, saved[name]), name
    plain = Regression(kind())
    plain.load_state_dict(saved, strict=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, saved[name]), name
    resumed, _ = run(ckpt_path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_tied_weights_with_two_patterns_raise():
    with pytest.raises(ValueError, match="one tied parameter"):
        fit(NMSparsity({"*.a": "1:4", "*.b": "2:4"}, include=["net.a", "net.b"]), Regression(Tied()))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(8, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,oi->bo", x, self._parameters["w"])


@pytest.mark.parametrize("gradient", ["masked", "ste"])
def test_a_custom_modules_parameter_trains_like_a_linear_layers(gradient):
    custom, linear = Regression(Experts()), Regression(nn.Linear(16, 8, bias=False))
    with torch.no_grad():
        linear.net.weight.copy_(custom.net.w)
    fit(NMSparsity("1:4", gradient=gradient, include=["net.w"]), custom)
    fit(NMSparsity("1:4", gradient=gradient, include=["net"]), linear)
    torch.testing.assert_close(custom.net.w, linear.net.weight, atol=1e-6, rtol=1e-5)


def test_a_custom_parameter_must_be_spelled_to_the_end():
    with pytest.raises(ValueError, match="name parameters of others in full"):
        fit(NMSparsity("1:4", include=["net"]), Regression(Experts()))


@pytest.mark.parametrize("bake", [False, True])
def test_early_stopping_warns_and_bakes_only_if_asked(bake):
    class StopNow(EarlyStopping):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    module = Regression(linear_net())
    stop = StopNow("val_loss", check_on_train_epoch_end=True)
    callback = NMSparsity("1:4", include=["*"], bake_on_early_stop=bake)
    with pytest.warns(UserWarning, match="stopped at 40 % of its schedule"):
        trainer(callback, stop, max_epochs=5).fit(module, data())
    assert is_nm(module.net[0].weight, 1, 4) is bake


def test_a_best_checkpoint_from_the_dense_phase_is_named(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_top_k=1, monitor="sparsity/density", mode="max")
    module = Regression(linear_net())
    with pytest.warns(UserWarning, match="from before the final pattern"):
        trainer(
            NMSparsity("1:4", include=["*"], restart_monitors=False), saving, max_epochs=4, enable_checkpointing=True
        ).fit(module, data(), data())


def test_state_of_pruned_weights_is_cleared_when_asked():
    callback = NMSparsity("1:4", "ste", include=["*"], zero_pruned_state=True)

    def momentum_of_pruned(module: Any) -> float:
        weight = callback.weights[0]
        state = module.trainer.optimizers[0].state[weight.parameter]
        return (state["momentum_buffer"] * (1 - weight.mask)).abs().max().item()

    spy = Spy(momentum_of_pruned)
    trainer(spy, callback).fit(Regression(linear_net()), data())
    assert spy.seen == [0.0] * STEPS


def test_step_freezes_the_bias_corrected_variance():
    callback = NMSparsity("1:4", "step", dense_fraction=0.5, include=["*"])

    def corrected(module: Any) -> Tensor:
        state = module.trainer.optimizers[0].state[callback.weights[0].parameter]
        return (state["exp_avg_sq"] / (1 - 0.999 ** state["step"])).clone()

    spy = Spy(corrected)
    trainer(spy, callback).fit(Regression(linear_net(), lambda p: torch.optim.Adam(p, 1e-3)), data())
    frozen = spy.seen[STEPS // 2 - 1]
    for later in spy.seen[STEPS // 2 :]:
        torch.testing.assert_close(later, frozen, rtol=1e-3, atol=0.0)
    assert not torch.allclose(spy.seen[STEPS // 2 - 2], frozen, rtol=1e-3)


def test_an_explicit_decay_resumes(tmp_path):
    def run(**arguments: Any) -> dict[str, Tensor]:
        saving = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
        module = Regression(linear_net())
        callback = NMSparsity("1:4", decay=0.05, include=["*"])
        trainer(callback, saving, max_epochs=4, enable_checkpointing=True).fit(module, data(), **arguments)
        return module.state_dict()

    whole = run()
    resumed = run(ckpt_path=tmp_path / f"epoch=1-step={2 * STEPS}.ckpt")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_weights_averaged_are_exactly_sparse_in_validation_and_file(tmp_path):
    exact: list[bool] = []

    class Look(pl.Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if not trainer.sanity_checking:
                exact.append(is_nm(pl_module.net[0].weight, 1, 4))

    saving = ModelCheckpoint(tmp_path)
    callbacks = [EMAWeightAveraging(decay=0.5), NMSparsity("1:4", "ste", include=["*"]), Look(), saving]
    trainer(*callbacks, enable_checkpointing=True).fit(Regression(linear_net()), data(), data())
    assert exact
    assert all(exact)
    saved = torch.load(next(tmp_path.glob("*.ckpt")))["state_dict"]
    assert is_nm(saved["net.0.weight"], 1, 4)


def test_learning_rate_finder_leaves_no_trace():
    class WithRate(Regression):
        def __init__(self) -> None:
            super().__init__(linear_net())
            self.lr = 0.01

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module = WithRate()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    tuned = trainer(NMSparsity("1:4", include=["*"]), enable_checkpointing=True)
    Tuner(tuned).lr_find(module, data(), num_training=10, update_attr=False)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert type(module.net[0]) is nn.Linear


def test_an_optimizer_that_evaluates_its_closure_often():
    module = Regression(linear_net(), lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3))
    fit(NMSparsity("1:4", include=["*"]), module)
    assert is_nm(module.net[0].weight, 1, 4)


def test_a_step_around_lightning_is_said_once():
    class Around(Regression):
        def __init__(self) -> None:
            super().__init__(linear_net())
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    module = Around()
    with pytest.warns(UserWarning, match="without Lightning's hooks") as record:
        trainer(NMSparsity("1:4", "sr-ste", include=["*"])).fit(module, data())
    assert len([r for r in record if "without Lightning" in str(r.message)]) == 1
    assert is_nm(module.net[0].weight, 1, 4)


def test_a_load_in_mid_fit_refreshes_the_masks():
    other = {f"net.{name}": value for name, value in linear_net().state_dict().items()}
    seen: list[bool] = []

    class Load(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                pl_module.load_state_dict(other)

    class Compare(pl.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 6:
                dense = other["net.0.weight"]
                seen.append(torch.equal(pl_module.net[0].weight.detach(), dense * nm_mask(dense, 1, 4)))

    trainer(Load(), NMSparsity("1:4", "ste", include=["*"]), Compare()).fit(Regression(linear_net()), data())
    assert seen == [True]


def test_mask_every_takes_masks_only_so_often():
    callback = NMSparsity("1:4", "ste", include=["*"], mask_every_n_steps=5)
    spy = Spy(lambda _: callback.weights[0].mask.clone())
    trainer(spy, callback).fit(Regression(linear_net(), lambda p: torch.optim.SGD(p, 1.0)), data())
    changes = [i for i, (a, b) in enumerate(zip(spy.seen, spy.seen[1:], strict=False)) if not torch.equal(a, b)]
    assert changes
    assert len({change % 5 for change in changes}) == 1


def test_unquoted_yaml_is_explained():
    with pytest.raises(TypeError, match="in quotes"):
        NMSparsity(pattern=124)  # what YAML makes of 2:4
    with pytest.raises(TypeError, match="in quotes"):
        NMSparsity(pattern={"*": 68})


def test_a_fused_optimizer_under_a_loss_scale_is_refused():
    class Fused(torch.optim.SGD):
        _step_supports_amp_scaling = True

    module = Regression(linear_net(), lambda p: Fused(p, 0.1))
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="fused=False"):
        trainer(NMSparsity("1:4", "sr-ste", include=["*"]), plugins=[plugin]).fit(module, data())


class Manual(Regression):
    """Two optimizers stepped by hand; ``plan`` says which of them step in an epoch."""

    def __init__(self, net: nn.Module, plan: Any, closure: bool = False) -> None:
        super().__init__(net)
        self.automatic_optimization = False
        self.plan, self.closure = plan, closure

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for index, optimizer in enumerate(self.optimizers()):

            def close(optimizer: Any = optimizer) -> None:
                optimizer.zero_grad()
                self.manual_backward(F.mse_loss(self.net(x), y))

            if self.plan(index, self.current_epoch, batch_idx):
                if self.closure:
                    optimizer.step(closure=close)
                else:
                    close()
                    optimizer.step()

    def configure_optimizers(self) -> Any:
        layers = list(self.net.children())
        return [torch.optim.Adam(layers[0].parameters(), 1e-2), torch.optim.Adam(layers[-1].parameters(), 1e-2)]


@pytest.mark.parametrize(
    "plan",
    [
        lambda index, epoch, batch: index == 0 or epoch < 2,  # one stops early
        lambda index, epoch, batch: batch % 3 == 2,  # the last batch does not step
    ],
)
def test_a_weight_whose_optimizer_rests_still_follows_the_schedule(plan):
    module = Manual(linear_net(), plan)
    trainer(NMSparsity("1:4", finetune_fraction=0.0, include=["*"]), max_epochs=4).fit(module, data())
    assert is_nm(module.net[0].weight, 1, 4)
    assert is_nm(module.net[2].weight, 1, 4)


def test_a_chosen_weight_that_no_optimizer_moves_ends_sparse():
    module = Regression(linear_net(), lambda p: torch.optim.SGD([q for q in p if q.requires_grad], 0.1))
    module.net[0].requires_grad_(False)
    fit(NMSparsity("1:4", include=["*"]), module)
    assert is_nm(module.net[0].weight, 1, 4)


def test_a_closure_in_a_manual_step_sees_masked_custom_parameters():
    zeros: list[float] = []

    class Look(Experts):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                zeros.append((self._parameters["w"] == 0).float().mean().item())
            return super().forward(x)

    net = nn.Sequential(Look(), nn.Tanh(), nn.Linear(8, 8))
    module = Manual(net, lambda *_: True, closure=True)
    trainer(NMSparsity("1:4", "ste", include=["net.0.w"])).fit(module, data())
    assert zeros == [0.75] * 2 * STEPS


def test_a_checkpoint_from_inside_a_step_is_right_for_custom_parameters(tmp_path):
    class SaveInside(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 5:
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")
            return super().training_step(batch, batch_idx)

    class SaveBefore(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                trainer.save_checkpoint(tmp_path / "before.ckpt")

    trainer(SaveBefore(), NMSparsity("1:4", include=["net.w"])).fit(SaveInside(Experts()), data())
    inside, before = (torch.load(tmp_path / f"{name}.ckpt") for name in ("inside", "before"))
    assert torch.equal(inside["state_dict"]["net.w"], before["state_dict"]["net.w"])
    residuals = [c["callbacks"]["NMSparsity"]["residuals"]["state_dict"]["net.w"]["values"] for c in (inside, before)]
    assert torch.equal(*residuals)


def test_a_custom_parameter_unfrozen_later_gets_the_masked_gradient():
    class Unfreeze(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.net[0].w.requires_grad_(batch_idx >= 2)

    class Keep(pl.Callback):
        def __init__(self) -> None:
            self.shares: list[float] = []

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradient = pl_module.net[0].w.grad
            if gradient is not None:
                self.shares.append((gradient == 0).float().mean().item())

    module, keep = Regression(nn.Sequential(Experts(), nn.Linear(8, 8))), Keep()
    module.net[0].requires_grad_(False)
    callback = NMSparsity("1:4", [(0.0, "1:4")], "masked", include=["net.0.w"])
    trainer(Unfreeze(), callback, keep).fit(module, data())
    assert keep.shares == [0.75] * (STEPS - 2)


def test_a_module_that_renames_its_keys_resumes(tmp_path):
    class Renames(Regression):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {k.replace("net.", "old."): v for k, v in checkpoint["state_dict"].items()}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {k.replace("old.", "net."): v for k, v in checkpoint["state_dict"].items()}

    def run(**arguments: Any) -> dict[str, Tensor]:
        module, saving = Renames(linear_net()), ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
        callback = NMSparsity("1:4", "ste", include=["*"])
        trainer(callback, saving, max_epochs=3, enable_checkpointing=True).fit(module, data(), **arguments)
        return module.state_dict()

    whole, resumed = run(), run(ckpt_path=tmp_path / f"epoch=0-step={STEPS}.ckpt")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_frozen_variance_of_a_layer_that_rests_stays():
    class Rests(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.net[2].requires_grad_(batch_idx < STEPS // 2)
            return super().training_step(batch, batch_idx)

    seen: list[float] = []
    spy = Spy(
        lambda m: seen.append(m.trainer.optimizers[0].state[m.net[2]._parameters["weight"]]["exp_avg_sq"].sum().item())
    )
    callback = NMSparsity("1:4", "step", include=["net.0"], dense_fraction=0.1)
    trainer(spy, callback).fit(Rests(linear_net(), lambda p: torch.optim.Adam(p, 1e-3)), data())
    assert len(set(seen[STEPS // 2 :])) == 1


def test_step_refuses_an_optimizer_without_variance_and_leaves_others_alone():
    with pytest.raises(ValueError, match="Adamax keeps none"):
        fit(NMSparsity("1:4", "step", include=["*"]), Regression(linear_net(), torch.optim.Adamax))


@pytest.mark.parametrize("words", [{"include": "net.0"}, {"exclude": "net.0"}])
def test_a_single_name_is_not_taken_for_a_list(words):
    with pytest.raises(TypeError, match=r"must be a list of strings or None; got 'net.0'. Write \['net.0'\]"):
        NMSparsity("1:4", **words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"axis": "rows"}, "axis"),
        ({"layer_depth": 0}, "layer_depth"),
        ({"pattern": {}}, "names no"),
        ({"decay": float("nan")}, "decay must be a number"),
    ],
)
def test_more_wrong_arguments(words, message):
    with pytest.raises(ValueError, match=message):
        NMSparsity(**words)


def test_an_included_name_that_means_no_layer_is_told(caplog):
    callback = NMSparsity("1:4", include=["net.0", "net.1"])
    with caplog.at_level("INFO"):
        fit(callback, Regression(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 8))))
    assert any("net.1" in record.message and "in full" in record.message for record in caplog.records)


def test_the_head_is_the_last_layer_also_before_a_frozen_teacher():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    module = Regression(student)
    module.teacher = linear_net().requires_grad_(False)
    fit(NMSparsity("1:4"), module)
    assert [(layer.weight == 0).any().item() for layer in student[::2]] == [False, True, False]


def test_an_exception_after_the_fit_says_nothing_of_it(caplog):
    class Fails(Regression):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("in test")

    module, run = Fails(linear_net()), trainer(NMSparsity("1:4", include=["*"]))
    run.fit(module, data())
    with caplog.at_level("INFO"), pytest.raises(RuntimeError):
        run.test(module, data(), verbose=False)
    assert not any("stopped the fit" in record.message for record in caplog.records)
    assert is_nm(module.net[0].weight, 1, 4)


def test_a_fit_of_no_epochs_changes_nothing():
    module = Regression(linear_net())
    fit(NMSparsity("1:4", "ste", include=["*"]), module, max_epochs=0)
    for name, value in linear_net().state_dict().items():
        assert torch.equal(module.net.state_dict()[name], value)


# What is logged.

KEYS = {"n", "m", "decay", "density", "exact", "flips", "gradient_variance_pruned", "gradient_variance_kept"}


def test_scalars_table_and_figure_with_the_csv_logger_alone(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = NMSparsity("1:4", gradient="ste", include=["*"], save_masks=True, figure_metric="val_f1")
    run = trainer(callback, logger=logger, max_epochs=2, log_every_n_steps=2)
    with pytest.warns(UserWarning, match="figure_metric='val_f1' was not logged in validation"):
        run.fit(Regression(linear_net()), data(), data())
    folder = tmp_path / "lightning_logs" / "version_0"
    with (folder / "metrics.csv").open() as file:
        columns = set(csv.DictReader(file).fieldnames or [])
    assert {f"sparsity/{key}" for key in KEYS} <= columns
    assert {"sparsity_layers/density/net.0.weight", "sparsity/density", "sparsity/exact"} <= columns
    with (folder / "nm_sparsity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == STEPS
    assert float(rows[-1]["density"]) == 0.25
    assert any(row["divergence"] for row in rows)
    assert (folder / "nm_sparsity.png").stat().st_size > 10_000
    masks = torch.load(folder / "nm_sparsity_masks.pt")
    assert masks["net.0.weight"].float().mean() == 0.25


def test_what_other_techniques_log_is_no_accuracy_to_draw():
    callback = NMSparsity(**NMSparsity.trial)
    run, _ = fit_classifier([AccuracyGradientLR(**AccuracyGradientLR.trial), callback])
    assert "lr/accuracy_gradient" in run.callback_metrics
    rows = callback.state_dict()["record"]["validations"]["rows"]
    assert [set(row) for row in rows] == [{"step", "val_acc"}] * 4


def test_figure_and_histograms_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    trainer(NMSparsity("1:4", include=["*"]), logger=logger, log_every_n_steps=2).fit(Regression(linear_net()), data())
    events = EventAccumulator(logger.log_dir).Reload()
    assert "sparsity_layers/weights/net.0.weight" in events.Tags()["histograms"]
    assert "sparsity/figure" in events.Tags()["images"]
    assert "sparsity/decay" in events.Tags()["scalars"]


def test_masks_of_the_last_log_step_are_kept_as_bits_and_compared_as_masks() -> None:
    module = Regression(linear_net())
    callback = NMSparsity("1:4", "ste", finetune_fraction=0.0, include=["*"])
    seen: list[tuple[float, float]] = []

    class Compare(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            masks = torch.cat([(weight.mask != 0).flatten() for weight in callback.weights])
            kept = sum(mask.nbytes for mask in callback._meter._logged_masks.values())
            assert kept == sum(-(-weight.parameter.numel() // 8) for weight in callback.weights)
            if before:
                wanted = (masks != before.pop()).float().mean()
                seen.append((float(trainer.callback_metrics["sparsity/flips"]), float(wanted)))
            before.append(masks)

    before: list[Tensor] = []
    trainer(callback, Compare(), log_every_n_steps=1).fit(module, data())
    assert [flips for flips, _ in seen] == pytest.approx([wanted for _, wanted in seen])
    assert any(wanted > 0 for _, wanted in seen)


def test_logged_values_are_what_they_say():
    seen: dict[str, list[float]] = {}

    class Collect(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            for key, value in trainer.callback_metrics.items():
                seen.setdefault(key, []).append(float(value))

    callback = NMSparsity("1:4", "sdgf-stepwise", finetune_fraction=0.25, include=["*"])
    trainer(callback, Collect(), log_every_n_steps=1).fit(Regression(linear_net()), data())
    assert seen["sparsity/n"] == [3.0] * 4 + [2.0] * 5 + [1.0] * 11
    assert seen["sparsity/density"] == [n / 4 for n in seen["sparsity/n"]]
    assert seen["sparsity/exact"] == [float(n == 1.0) for n in seen["sparsity/n"]]
    assert all(0.0 <= flips <= 1.0 for flips in seen["sparsity/flips"])
    assert seen["sparsity/gradient_variance_kept"][-1] > 0.0


def test_layer_keys_are_limited():
    callback = NMSparsity("1:4", include=["*"], max_layers=1)
    run = trainer(callback, log_every_n_steps=1)
    run.fit(Regression(linear_net()), data())
    assert [key for key in run.callback_metrics if key.startswith("sparsity_layers/density/")] == [
        "sparsity_layers/density/net.0.weight"
    ]
