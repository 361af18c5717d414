"""Which weights NMSparsity chooses: by what layers do, by names as users know them, and by what a batch reaches."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_grad.callbacks import NMSparsity
from lightning_grad.functional import is_nm
from lightning_grad.testing import ResumableLoader, assert_identical
from lightning_grad.utilities import sparsity_report
from tests.callbacks.sparsity.test_nm_sparsity import Regression, Tied, data, trainer


class InOut(nn.Module):
    """A linear layer of another package, with a weight (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class OutIn(InOut):
    """The same with a weight (out, in)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Distances(InOut):
    """No product."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.weight)


def chain(*layers: nn.Module) -> Regression:
    return Regression(nn.Sequential(*layers))


def layers(*kinds: Any, width: int = 16) -> Regression:
    torch.manual_seed(0)
    return chain(*(kind(width, width if number < len(kinds) - 1 else 8) for number, kind in enumerate(kinds)))


def fit(callback: NMSparsity, module: Any, *others: Any, **arguments: Any) -> Any:
    trainer(callback, *others, **arguments).fit(module, data())
    return module


def sparse_names(module: Any) -> list[str]:
    return [name for name, p in module.named_parameters() if p.ndim > 1 and (p == 0).float().mean() > 0.2]


# By what a layer does.


@pytest.mark.parametrize(("kind", "inputs"), [(InOut, 0), (OutIn, 1), (nn.Linear, 1)])
@pytest.mark.parametrize("axis", ["input", "output"])
def test_groups_lie_along_the_inputs_of_the_product(kind: Any, inputs: int, axis: str) -> None:
    callback = NMSparsity("1:4", "sr-ste", axis=axis, figure=False)
    module = fit(callback, layers(nn.Linear, kind, nn.Linear))
    weight, dim = module.net[1].weight, inputs if axis == "input" else 1 - inputs
    assert is_nm(weight, 1, 4, dim)
    assert not is_nm(weight, 1, 4, 1 - dim), "a square weight, so that the other axis would have fitted as well"
    if axis == "input":
        assert [row.pattern for row in sparsity_report(module, verbose=False)] == [None, "1:4", None]


def test_the_number_of_a_dimension_is_followed() -> None:
    module = fit(NMSparsity("1:4", axis=1, figure=False), layers(nn.Linear, InOut, nn.Linear))
    assert is_nm(module.net[1].weight, 1, 4, 1)


def test_what_is_no_product_is_named_and_can_be_spelled(caplog: Any) -> None:
    with caplog.at_level("INFO"):
        module = fit(NMSparsity("1:4", figure=False), layers(nn.Linear, Distances, nn.Linear, nn.Linear))
    assert sparse_names(module) == ["net.2.weight"]
    assert any("net.1.weight" in r.message and "computes neither x W nor x W^T" in r.message for r in caplog.records)
    module = fit(NMSparsity("1:4", include=["net.1.weight"], figure=False), layers(nn.Linear, Distances, nn.Linear))
    assert is_nm(module.net[1].weight, 1, 4, 1)


@pytest.mark.parametrize("kind", [InOut, OutIn])
def test_a_linear_like_layer_trains_like_a_linear_one(kind: Any) -> None:
    def trained(kind: Any) -> Tensor:
        module = layers(nn.Linear, nn.Linear, nn.Linear)
        if kind is not nn.Linear:
            twin = kind(16, 16)
            twin.weight.data.copy_(module.net[1].weight.t() if kind is InOut else module.net[1].weight)
            module.net[1] = twin
        else:
            module.net[1].bias = None
        weight = fit(NMSparsity("1:4", "sr-ste", figure=False), module).net[1].weight
        return weight.t() if kind is InOut else weight

    torch.testing.assert_close(trained(kind), trained(nn.Linear), rtol=1e-4, atol=1e-6)


# By name.


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.G = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh()))
        self.D = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.D(self.G(x))


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ({"include": ["net.D"]}, ["net.D.0.weight", "net.D.1.0.weight"]),
        ({"include": ["net.D.1"]}, ["net.D.1.0.weight"]),
        ({"include": ["net"], "exclude": ["net.D"]}, ["net.G.0.weight", "net.G.1.0.weight"]),
        ({"include": ["*"], "pattern": {"net.D": "1:4"}}, ["net.D.0.weight", "net.D.1.0.weight"]),
        ({"exclude": ["net.D"]}, []),
        ({}, ["net.D.0.weight", "net.G.1.0.weight"]),
    ],
    ids=str,
)
def test_the_name_of_a_module_means_all_below_it(arguments: Any, chosen: list[str]) -> None:
    callback = NMSparsity(**{"pattern": "1:4", "figure": False, **arguments})
    if not chosen:
        with pytest.raises(ValueError, match=r"net.D.0.weight: excluded"):
            fit(callback, Regression(Two()))
        return
    assert sorted(sparse_names(fit(callback, Regression(Two())))) == chosen


def test_the_first_pattern_that_matches_counts() -> None:
    patterns = {"net.D.1": "2:4", "net.D": "1:4", "*": "4:4"}
    module = fit(NMSparsity(patterns, include=["*"], figure=False), Regression(Two()))
    rows = {row.name: row.pattern for row in sparsity_report(module, verbose=False)}
    assert rows == {
        "net.G.0.weight": None,
        "net.G.1.0.weight": None,
        "net.D.0.weight": "1:4",
        "net.D.1.0.weight": "2:4",
    }


@pytest.mark.parametrize("name", ["net.a", "net.b", "net.b.weight"])
def test_a_tied_weight_is_known_by_each_of_its_names(name: str) -> None:
    module = fit(NMSparsity("1:4", include=[name], figure=False), Regression(Tied()))
    assert is_nm(module.net.a.weight, 1, 4)
    with pytest.raises(ValueError, match="excluded"):
        fit(NMSparsity("1:4", include=["net.a"], exclude=[name], figure=False), Regression(Tied()))
    module = fit(NMSparsity({name: "1:4", "*": "2:4"}, include=["net"], figure=False), Regression(Tied()))
    assert is_nm(module.net.a.weight, 1, 4)


def test_an_embedding_tied_to_the_head_is_known_by_the_heads_name() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mid, self.head = nn.Embedding(8, 16), nn.Linear(16, 16), nn.Linear(16, 8, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mid(self.table(x.abs().long().clamp(max=7)[:, 0])))

    module = fit(NMSparsity("1:4", include=["net.head"], figure=False), Regression(Language()))
    assert is_nm(module.net.table.weight, 1, 4)


def test_a_name_that_is_nearly_right_is_suggested() -> None:
    with pytest.raises(
        ValueError,
        match=r"NMSparsity\(include=...\): no parameter or module is named 'net.C'. Did you mean .*'net.D'",
    ):
        fit(NMSparsity(include=["net.C"]), Regression(Two()))


# By what the batch reaches first and last.


def test_a_layer_behind_an_embedding_is_no_first_one(caplog: Any) -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 16)
            self.body = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.table(x.abs().long().clamp(max=7)[:, 0]))

    for frozen in (False, True):
        module = Regression(Language())
        module.net.table.requires_grad_(not frozen)
        assert sparse_names(fit(NMSparsity("1:4", figure=False), module)) == ["net.body.0.weight", "net.body.1.weight"]
    assert not any("first or last" in record.message for record in caplog.records), (
        "the order of registration was right"
    )


class Backwards(nn.Module):
    """Registers its layers in another order than it uses them in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last, self.mid, self.first, self.late = (
            nn.Linear(16, 8),
            InOut(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.late(self.mid(self.first(x))))


@pytest.mark.parametrize("recipe", ["ste", "mdgf-exponential"])
def test_the_batch_decides_and_not_the_order_of_registration(recipe: Any, caplog: Any) -> None:
    with caplog.at_level("INFO"):
        module = fit(NMSparsity("1:4", recipe, figure=False), Regression(Backwards()))
    assert sparse_names(module) == ["net.mid.weight", "net.late.weight"]
    assert is_nm(module.net.mid.weight, 1, 4, 0)
    assert [r.message for r in caplog.records if "first or last" in r.message] == [
        "NMSparsity keeps net.first.weight dense and makes net.late.weight sparse, because the batch reaches "
        "net.first.weight, net.last.weight first or last."
    ]
    assert type(module.net.first) is nn.Linear
    assert not module.net.first._forward_pre_hooks


def test_what_the_batch_showed_is_kept_on_resume(tmp_path: Path) -> None:
    def run(**arguments: Any) -> Any:
        saving = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
        module = Regression(Backwards())
        callback = NMSparsity("1:4", "sr-ste", figure=False)
        trainer(callback, saving, enable_checkpointing=True, max_epochs=2).fit(module, data(), **arguments)
        return module.state_dict()

    whole = run()
    assert_identical(whole, run(ckpt_path=tmp_path / "epoch=0-step=20.ckpt"))


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint")
def test_an_exception_in_the_first_batch_resumes_exactly(where: int, tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("lost")

    def run(*others: Any, **arguments: Any) -> Any:
        callbacks = list(others)
        callbacks.insert(where, NMSparsity("1:4", "sr-ste", figure=False))
        module = Regression(Backwards())
        trainer(*callbacks, enable_checkpointing=bool(others)).fit(module, data(kind=ResumableLoader), **arguments)
        return module.state_dict()

    with pytest.raises(RuntimeError, match="lost"):
        run(Fail(), pl.callbacks.OnExceptionCheckpoint(tmp_path, "first"))
    assert_identical(run(), run(ckpt_path=tmp_path / "first.ckpt"))


class Gan(pl.LightningModule):
    """Two networks, each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.G = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
        self.D = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        for optimizer, loss in (
            (discriminator, lambda: self.D(batch[0]).mean() - self.D(self.G(batch[0]).detach()).mean()),
            (generator, lambda: self.D(self.G(batch[0])).mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=1e-3) for net in (self.G, self.D)]


class Split(Gan):
    """The same networks as one, whose parts two optimizers move."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.D(self.G(batch[0])).square().mean())
        for optimizer in self.optimizers():
            optimizer.step()


def test_two_networks_have_two_first_and_two_last_layers() -> None:
    assert sparse_names(fit(NMSparsity("1:4", figure=False), Gan())) == ["G.1.weight", "D.1.weight"]
    one = ["G.1.weight", "G.2.weight", "D.0.weight", "D.1.weight"]
    assert sparse_names(fit(NMSparsity("1:4", figure=False), Split())) == one


# Layers that do not train, and patterns that prune nothing.


def test_frozen_layers_are_chosen_by_include_and_the_message_says_so() -> None:
    class Unfreeze(pl.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[:-1])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[:-1], optimizer, lr=0.01)

    with pytest.raises(ValueError, match=r"net.0.weight: frozen; .*such as include=\['net.0.weight'\]"):
        fit(NMSparsity("1:4"), layers(nn.Linear, nn.Linear, nn.Linear), Unfreeze(), max_epochs=2)
    module = layers(nn.Linear, nn.Linear, nn.Linear)
    module.make_optimizer = lambda parameters: torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.01)
    fit(NMSparsity("1:4", include=["net.0.weight"], figure=False), module, Unfreeze(), max_epochs=2)
    assert sparse_names(module) == ["net.0.weight"]


def test_a_pattern_that_keeps_all_says_that_it_prunes_nothing(caplog: Any) -> None:
    with caplog.at_level("INFO"):
        fit(NMSparsity("4:4", include=["net.1"], figure=False), layers(nn.Linear, nn.Linear, nn.Linear))
    assert any("keeps 1 weight dense, because N = M prunes nothing" in record.message for record in caplog.records)


# Others that prune, or take a weight's place.


def pruning(package: Any, module: Any, *chosen: nn.Module) -> Any:
    chosen_pairs = [(layer, "weight") for layer in chosen] or None
    return package.callbacks.ModelPruning("l1_unstructured", parameters_to_prune=chosen_pairs, amount=0.2)


@pytest.mark.parametrize("package", [pl, pytorch_lightning])
@pytest.mark.parametrize("before", [True, False])
def test_model_pruning_of_the_same_weight_is_refused_before_the_first_batch(package: Any, before: bool) -> None:
    module = layers(nn.Linear, nn.Linear, nn.Linear)
    both = [pruning(package, module), NMSparsity("2:4", figure=False)]
    with pytest.raises(
        ValueError, match=r"NMSparsity and ModelPruning would both prune net.1.weight.*exclude=\['net.1.weight'\]"
    ):
        trainer(*(both if before else both[::-1])).fit(module, data())
    assert module.trainer.global_step == 0
    assert type(module.net[1]) is nn.Linear


@pytest.mark.parametrize("before", [True, False])
def test_model_pruning_of_other_weights_works(before: bool, tmp_path: Path) -> None:
    module = layers(nn.Linear, nn.Linear, nn.Linear)
    saving = pl.callbacks.ModelCheckpoint(tmp_path)
    both = [
        pruning(pl, module, module.net[0]),
        NMSparsity("2:4", exclude=["net.0.weight"], include=["net.1"], figure=False),
    ]
    trainer(*(both if before else both[::-1]), saving, max_epochs=2, enable_checkpointing=True).fit(module, data())
    assert is_nm(module.net[1].weight, 2, 4)
    assert (module.net[0].weight == 0).any()


class Reparametrize(pl.Callback):
    """Takes the place of a weight in some hook, as pruning callbacks do."""

    def __init__(self, how: Any, hook: str) -> None:
        self.done = 0
        setattr(self, hook, lambda trainer, pl_module, *_: self.act(how, pl_module))

    def act(self, how: Any, pl_module: Any) -> None:
        self.done += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            how(pl_module.net[1])


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


WAYS: dict[str, Any] = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "identity": lambda layer: prune.identity(layer, "weight"),
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Half()),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "new weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("kind", [nn.Linear, InOut])
@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_end"])
@pytest.mark.parametrize("how", WAYS)
def test_taking_the_place_of_a_weight_is_refused_at_once(how: str, hook: str, kind: Any) -> None:
    module, other = layers(nn.Linear, kind, nn.Linear), Reparametrize(WAYS[how], hook)
    with pytest.raises(RuntimeError, match=r"net.1.weight.*exclude="):
        fit(NMSparsity("1:4", "sr-ste", figure=False), module, other)
    assert other.done == 1
    assert module.trainer.global_step <= 1
    if kind is nn.Linear:
        assert type(module.net[1]) is nn.Linear
        assert list(dict(module.net[1].named_parameters())) == ["weight", "bias"]
        module.net(torch.ones(1, 16))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("how", WAYS)
def test_a_weight_that_something_else_replaces_before_the_fit_is_named(how: str, caplog: Any) -> None:
    module = layers(nn.Linear, nn.Linear, nn.Linear, nn.Linear)
    WAYS[how](module.net[1])
    with caplog.at_level("INFO"):
        fit(NMSparsity("1:4", figure=False), module)
    (told,) = [r.message for r in caplog.records if "net.1.weight" in r.message]
    assert "net.2.weight  16x16  1:4" in told
    assert "net.1.weight  -      dense: reparametrized by pruning" in told
    for asked in ("net.1", "net.[1]"):
        module = layers(nn.Linear, nn.Linear, nn.Linear)
        WAYS[how](module.net[1])
        with pytest.raises(
            ValueError,
            match=r"found no weight.*net.1.weight: reparametrized [^;]*computed from other parameters\. Choose",
        ):
            fit(NMSparsity("1:4", include=[asked], figure=False), module)


def test_a_layer_left_out_may_be_reparametrized_and_an_adapter_added() -> None:
    def adapt(layer: nn.Module) -> None:
        layer.register_parameter("lora_A", nn.Parameter(torch.ones(1)))
        layer.weight_scale = nn.Parameter(torch.ones(1))

    module = fit(
        NMSparsity("1:4", figure=False), layers(nn.Linear, nn.Linear, nn.Linear), Reparametrize(adapt, "on_train_start")
    )
    assert sparse_names(module) == ["net.1.weight"]
    other = Reparametrize(WAYS["prune"], "on_train_start")
    module = layers(nn.Linear, nn.Linear, nn.Linear, nn.Linear)
    fit(NMSparsity("1:4", exclude=["net.1.weight"], include=["*"], figure=False), module, other)


# Settings that change on resume.


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"pattern": "1:8"}, {"pattern": "2:4"}),
        ({"pattern": "2:4", "mask_every_n_steps": 4}, {"pattern": "1:4", "mask_every_n_steps": 4}),
        ({"axis": "output", "mask_every_n_steps": 4}, {"axis": "input", "mask_every_n_steps": 4}),
        ({"include": ["net.0"]}, {"include": ["net.1"]}),
        ({"recipe": "sdgf-stepwise"}, {"recipe": "sr-ste"}),
        ({"recipe": "sr-ste"}, {"recipe": "step", "dense_fraction": 0.7}),
        ({"recipe": "step", "dense_fraction": 0.2}, {"recipe": "mdgf-linear"}),
        ({"finetune_fraction": 0.6}, {"finetune_fraction": 0.1}),
        ({"gradient": "masked"}, {"gradient": "ste"}),
    ],
    ids=str,
)
def test_settings_that_change_on_resume_are_followed_and_said(
    first: Any, then: Any, tmp_path: Path, caplog: Any
) -> None:
    def run(arguments: Any, **more: Any) -> tuple[Any, NMSparsity]:
        module = layers(nn.Linear, nn.Linear, nn.Linear)
        module.make_optimizer = lambda p: torch.optim.AdamW(p, lr=1e-2)
        saving = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1)
        callback = NMSparsity(**{"pattern": "1:4", "include": ["net.1"], "figure": False, **arguments})
        trainer(callback, saving, max_epochs=2, enable_checkpointing=True).fit(module, data(), **more)
        return module, callback

    run(first)
    with caplog.at_level("INFO"):
        module, callback = run(then, ckpt_path=tmp_path / "epoch=0-step=20.ckpt")
    assert any("NMSparsity resumes with changed settings" in record.message for record in caplog.records)
    index = 1 if "include" not in then else int(then["include"][0][-1])
    n, m = map(int, callback.pattern.split(":"))
    assert is_nm(module.net[index].weight, n, m)
    assert sparse_names(module) == [f"net.{index}.weight"], "and what is no longer chosen is dense again"
