"""Modules see the derived weight; everyone else sees the dense one, and nothing stays behind."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_grad.core.views.weight_view import InPlaceView, InPlaceWindow, attach_view, has_view, viewed_class
from lightning_grad.functional import nm_mask, prune_weight, scale_weight


class Scaled:
    """A view that multiplies by a factor, and stores exact zeros."""

    def __init__(self, factor: Tensor, straight_through: bool = False) -> None:
        self.factor = factor
        self.straight_through = straight_through

    def value(self, dense: Tensor) -> Tensor:
        return scale_weight(dense, self.factor, self.straight_through)

    def stored(self, dense: Tensor) -> Tensor:
        return prune_weight(dense, self.factor)


class Own(nn.Linear):
    """A user's own layer, with an argument more and an attribute of its own."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.note = ["mine"]


def factor_of(weight: Tensor) -> Tensor:
    return nm_mask(weight, 2, 4).clamp_(min=0.25)


def view_of(module: nn.Module, attribute: str = "weight") -> Scaled:
    return Scaled(factor_of(module._parameters[attribute]))


def viewed(module: nn.Module, *attributes: str) -> tuple[nn.Module, nn.Module]:
    """Attach views, and return the module with a plain one that computes what it must compute."""
    attributes = attributes or ("weight",)
    plain = copy.deepcopy(module)
    for attribute in attributes:
        view = view_of(module, attribute)
        with torch.no_grad():
            plain._parameters[attribute].mul_(view.factor)
        attach_view(module, attribute, view)
    return module, plain


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module, tmp_path: Any = None) -> nn.Module:
    import io

    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


LAYERS = {
    "Linear": lambda: (nn.Linear(8, 8), torch.randn(3, 8)),
    "Conv1d": lambda: (nn.Conv1d(8, 4, 3, padding=1), torch.randn(2, 8, 5)),
    "Conv2d": lambda: (nn.Conv2d(8, 4, 3), torch.randn(2, 8, 5, 5)),
    "Conv3d": lambda: (nn.Conv3d(4, 4, 2, bias=False), torch.randn(1, 4, 3, 3, 3)),
    "Own": lambda: (Own(8), torch.randn(3, 8)),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# The class swap.


@pytest.mark.parametrize("layer", LAYERS)
def test_module_computes_with_the_view(layer: str) -> None:
    module, x = LAYERS[layer]()
    module, plain = viewed(module)
    assert torch.equal(module(x), plain(x))
    assert torch.equal(module.weight, plain.weight)


@pytest.mark.parametrize("straight_through", [False, True])
def test_gradient_passes_through_the_view(straight_through: bool) -> None:
    layer, x = nn.Linear(8, 4), torch.randn(5, 8)
    factor = factor_of(layer.weight)
    attach_view(layer, "weight", Scaled(factor, straight_through))
    layer(x).square().sum().backward()
    dense = dict(layer.named_parameters())["weight"]
    output = torch.nn.functional.linear(x, dense * factor, layer.bias)
    upstream = 2 * output.detach().T @ x
    torch.testing.assert_close(dense.grad, upstream if straight_through else upstream * factor)


def test_optimizer_moves_the_dense_weight() -> None:
    layer = nn.Linear(8, 4)
    dense, before = layer.weight, layer.weight.detach().clone()
    attach_view(layer, "weight", Scaled(torch.zeros_like(before), straight_through=True))
    layer(torch.ones(1, 8)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert torch.equal(dense, before - 1)
    assert torch.equal(layer.weight, torch.zeros_like(before))


def test_parameters_keep_names_order_and_identity() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    parameters, keys = list(module.named_parameters()), list(module.state_dict())
    for index in (0, 2):
        attach_view(module[index], "weight", view_of(module[index]))
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in parameters]
    assert all(new is old for (_, new), (_, old) in zip(module.named_parameters(), parameters, strict=True))
    assert list(module.state_dict()) == keys


def test_state_dict_holds_the_stored_weight_and_loads_strictly_into_a_plain_module() -> None:
    module, plain = viewed(nn.Linear(8, 8))
    state = module.state_dict()
    assert torch.equal(state["weight"], plain.weight)
    assert not state["weight"].requires_grad
    fresh = nn.Linear(8, 8)
    fresh.load_state_dict(state, strict=True)
    x = torch.randn(2, 8)
    assert torch.equal(fresh(x), module(x))


def test_state_dict_has_its_prefix_and_leaves_other_keys_alone() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    attach_view(module[1], "weight", Scaled(torch.zeros(8, 8)))
    after = module.state_dict(prefix="net.")
    assert list(after) == [f"net.{key}" for key in before]
    changed = [key for key in before if not torch.equal(after[f"net.{key}"], before[key])]
    assert changed == ["1.weight"]


def test_loading_goes_into_the_dense_weight_in_place() -> None:
    layer = nn.Linear(8, 8)
    dense = layer.weight
    attach_view(layer, "weight", Scaled(torch.full((8, 8), 0.5)))
    layer.load_state_dict({"weight": torch.full((8, 8), 4.0), "bias": torch.zeros(8)}, strict=True)
    assert layer._parameters["weight"] is dense
    assert torch.equal(dense, torch.full((8, 8), 4.0))
    assert torch.equal(layer.weight, torch.full((8, 8), 2.0))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("duplicate", [through_pickle, through_torch_save, copy.deepcopy, copy.copy])
def test_duplicate_is_a_plain_module_that_computes_the_same(
    duplicate: Callable[[nn.Module], nn.Module], layer: str
) -> None:
    module, x = LAYERS[layer]()
    own_class = type(module)
    module._parameters["weight"].requires_grad_(layer != "Conv1d")
    module, plain = viewed(module)
    twin = duplicate(module)
    assert type(twin) is own_class
    assert torch.equal(twin(x), plain(x))
    assert isinstance(twin.weight, nn.Parameter)
    assert twin.weight.requires_grad == (layer != "Conv1d")
    assert list(dict(twin.named_parameters())) == list(dict(module.named_parameters()))
    assert not any("lightning_grad" in key for key in twin.__dict__)
    assert not has_view(twin, "weight")


def test_duplicate_shares_nothing_with_the_viewed_module() -> None:
    module, _ = viewed(Own(8))
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.weight.zero_()
        twin.bias.zero_()
    twin.note.append("twin's")
    assert module._parameters["weight"].count_nonzero() == 64
    assert module.bias.count_nonzero() == 8
    assert module.note == ["mine"]
    assert has_view(module, "weight")


def test_duplicate_of_a_tree_keeps_shared_modules_shared() -> None:
    layer, _ = viewed(nn.Linear(8, 8))
    for twin in (copy.deepcopy(nn.ModuleList([layer, layer])), through_pickle(nn.ModuleList([layer, layer]))):
        assert twin[0] is twin[1]


def test_repr_class_name_signature_and_isinstance_are_unchanged() -> None:
    layer = Own(8)
    shown, signature = repr(layer), inspect.signature(type(layer))
    attach_view(layer, "weight", view_of(layer))
    assert repr(layer) == shown
    assert isinstance(layer, Own)
    assert isinstance(layer, nn.Linear)
    assert (type(layer).__name__, type(layer).__module__, type(layer).__doc__) == ("Own", __name__, Own.__doc__)
    assert inspect.signature(type(layer)) == signature
    assert viewed_class(layer) is Own
    assert viewed_class(nn.Linear(1, 1)) is nn.Linear


def test_undo_leaves_dict_class_and_weight_as_before() -> None:
    layer = Own(8)
    before, dense, values = dict(layer.__dict__), layer.weight, layer.weight.detach().clone()
    undo = attach_view(layer, "weight", view_of(layer))
    layer(torch.ones(1, 8)).sum().backward()
    layer.state_dict()
    undo()
    assert layer.__dict__ == before
    assert list(layer.__dict__) == list(before)
    assert type(layer) is Own
    assert layer.weight is dense
    assert torch.equal(dense, values)


def test_undo_may_be_called_again_and_does_not_touch_a_later_view() -> None:
    layer = nn.Linear(8, 8)
    first = attach_view(layer, "weight", view_of(layer))
    first()
    first()
    second = attach_view(layer, "weight", Scaled(torch.zeros(8, 8)))
    first()
    assert layer.weight.count_nonzero() == 0
    second()
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("last", ["weight", "bias"])
def test_views_of_two_parameters_go_in_any_order(last: str) -> None:
    layer = nn.Linear(8, 8)
    undo = {
        "weight": attach_view(layer, "weight", Scaled(torch.zeros(8, 8))),
        "bias": attach_view(layer, "bias", Scaled(torch.full((8,), 2.0))),
    }
    assert torch.equal(layer(torch.ones(1, 8))[0], 2 * dict(layer.named_parameters())["bias"])
    assert viewed_class(layer) is nn.Linear
    first = "bias" if last == "weight" else "weight"
    undo[first]()
    assert (has_view(layer, first), has_view(layer, last)) == (False, True)
    assert getattr(layer, first) is layer._parameters[first]
    undo[last]()
    assert type(layer) is nn.Linear


def test_views_of_one_module_do_not_reach_another() -> None:
    one, other = nn.Linear(8, 8), nn.Linear(8, 8)
    undo = attach_view(one, "weight", Scaled(torch.zeros(8, 8)))
    attach_view(other, "weight", Scaled(torch.ones(8, 8)))
    assert one.weight.count_nonzero() == 0
    assert other.weight.count_nonzero() == 64
    assert not has_view(nn.Linear(8, 8), "weight")
    undo()
    assert has_view(other, "weight")


# Attention.


def attention_with(views: dict[str, Scaled], **arguments: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **arguments)
    plain = copy.deepcopy(attention)
    for name in views:
        owner = attention.out_proj if name == "out_proj" else attention
        attribute = "weight" if name == "out_proj" else name
        view = view_of(owner, attribute)
        with torch.no_grad():
            (plain.out_proj if name == "out_proj" else plain)._parameters[attribute].mul_(view.factor)
        attach_view(owner, attribute, view)
    return attention, plain


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        (["in_proj_weight"], {}),
        (["out_proj"], {}),
        (["in_proj_weight", "out_proj"], {}),
        (["q_proj_weight", "k_proj_weight", "v_proj_weight"], {"kdim": 4, "vdim": 12}),
    ],
)
def test_attention_projections_are_seen_through_their_views(
    names: list[str], arguments: dict[str, Any], training: bool
) -> None:
    attention, plain = attention_with(dict.fromkeys(names), **arguments)
    query = torch.randn(2, 5, 8)
    key, value = torch.randn(2, 5, arguments.get("kdim", 8)), torch.randn(2, 5, arguments.get("vdim", 8))
    results = []
    for module in (attention, plain):
        with torch.set_grad_enabled(training):
            results.append(module.train(training)(query, key, value)[0])
    # Without gradients torch may multiply a tensor that is no Parameter in another order: equal up to rounding.
    torch.testing.assert_close(*results, rtol=0, atol=0 if training else 1e-6)
    with torch.set_grad_enabled(training):
        assert torch.equal(through_pickle(attention)(query, key, value)[0], results[1])
    assert list(attention.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in attention.state_dict().items())


@pytest.mark.parametrize("target", ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"])
def test_transformer_fast_path_reads_the_view(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    plain = copy.deepcopy(encoder)
    path, _, attribute = f"layers.1.{target}".rpartition(".")
    view = Scaled(nm_mask(encoder.get_submodule(path)._parameters[attribute], 1, 8))
    attach_view(encoder.get_submodule(path), attribute, view)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        dense_output = plain(x)
        plain.get_submodule(path)._parameters[attribute].mul_(view.factor)
        calls = []
        fast = torch._transformer_encoder_layer_fwd
        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or fast(*a))
        expected, found = plain(x), encoder(x)
    assert len(calls) == 4, "neither module took the fast path"
    assert torch.equal(found, expected)
    assert not torch.allclose(found, dense_output)


# Compilation.


def test_view_compiles_to_one_graph_and_a_changing_factor_does_not_recompile() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    views = [view_of(module[0]), view_of(module[2])]
    for layer, view in zip((module[0], module[2]), views, strict=True):
        attach_view(layer, "weight", view)
    compiled, x = torch.compile(module, backend=backend, fullgraph=True), torch.randn(3, 8)
    try:
        for step in range(4):
            found = compiled(x)
            assert torch.equal(found, module(x)), step
            found.sum().backward()
            for view in views:
                if step % 2:
                    view.factor.mul_(0.5)
                else:
                    view.factor = view.factor * 0.5
        assert len(graphs) == 1
        with torch.no_grad():
            views[0].factor.zero_()
        expected = module[2](torch.relu(module[0].bias)).expand(3, 4)
        torch.testing.assert_close(compiled(x), expected)
        assert len(graphs) == 1
    finally:
        torch._dynamo.reset()


# In place.


class Mix(nn.Module):
    """Gets at its parameter past any property."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self._parameters["w"].T


def test_exposed_parameter_holds_the_value_and_restored_the_dense_weight() -> None:
    mix, x = Mix(), torch.randn(3, 8)
    dense = mix.w.detach().clone()
    view = view_of(mix, "w")
    in_place = InPlaceView(mix, "w", view)
    parameter = mix.w
    assert torch.equal(mix.w, dense)
    in_place.expose()
    assert mix.w is parameter
    assert torch.equal(mix.w, dense * view.factor)
    assert torch.equal(mix(x), x @ (dense * view.factor).T)
    in_place.restore()
    assert torch.equal(mix.w, dense)


def test_exposing_and_restoring_twice_loses_nothing() -> None:
    mix = Mix()
    dense = mix.w.detach().clone()
    view = view_of(mix, "w")
    in_place = InPlaceView(mix, "w", view)
    in_place.restore()
    in_place.expose()
    in_place.expose()
    assert torch.equal(mix.w, dense * view.factor)
    in_place.restore()
    in_place.restore()
    assert torch.equal(mix.w, dense)


@pytest.mark.parametrize("straight_through", [False, True])
def test_gradient_of_an_exposed_parameter_passes_through_the_view(straight_through: bool) -> None:
    mix, x = Mix(), torch.randn(3, 8)
    dense, factor = mix.w.detach().clone().requires_grad_(), factor_of(mix.w)
    in_place = InPlaceView(mix, "w", Scaled(factor, straight_through))
    in_place.expose()
    mix(x).square().sum().backward()
    in_place.restore()
    (x @ scale_weight(dense, factor, straight_through).T).square().sum().backward()
    torch.testing.assert_close(mix.w.grad, dense.grad)


class Trusted:
    """A view that computes its mask from the value: what is small passes no gradient."""

    def value(self, dense: Tensor) -> Tensor:
        return torch.where(dense.abs() > 0.5, dense, dense.detach())

    def stored(self, dense: Tensor) -> Tensor:
        return dense


def test_an_exposed_parameter_is_differentiated_at_its_dense_value() -> None:
    mix, x = Mix(), torch.randn(3, 8)
    dense = mix.w.detach().clone().requires_grad_()
    in_place = InPlaceView(mix, "w", Trusted())
    in_place.expose()
    mix(x).square().sum().backward()
    in_place.restore()
    (x @ Trusted().value(dense).T).square().sum().backward()
    torch.testing.assert_close(mix.w.grad, dense.grad)
    assert 0 < (mix.w.grad == 0).float().mean() < 1


def test_frozen_parameter_may_be_exposed() -> None:
    mix = Mix().requires_grad_(False)
    view = view_of(mix, "w")
    in_place = InPlaceView(mix, "w", view)
    in_place.expose()
    assert torch.equal(mix.w == 0, view.factor == 0)
    in_place.detach()
    assert mix.w.grad is None


def test_state_dict_of_an_in_place_view_holds_the_stored_weight() -> None:
    module = nn.Sequential(Mix(), Mix())
    dense = module[0].w.detach().clone()
    view = Scaled(nm_mask(dense, 2, 4))
    in_place = InPlaceView(module[0], "w", view)
    state = module.state_dict(prefix="net.")
    assert torch.equal(state["net.0.w"], dense * view.factor)
    assert torch.equal(state["net.1.w"], module[1].w)
    in_place.expose()
    assert torch.equal(module.state_dict()["0.w"], dense * view.factor)
    in_place.detach()
    assert torch.equal(module.state_dict()["0.w"], dense)


@pytest.mark.parametrize("duplicate", [through_pickle, through_torch_save, copy.deepcopy])
def test_a_duplicate_is_plain_and_holds_the_stored_weight(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    mix = Mix()
    in_place = InPlaceView(mix, "w", Scaled(torch.full((8, 8), 0.5)))
    twin = duplicate(mix)
    assert torch.equal(twin.state_dict()["w"], 0.5 * mix.w)
    assert torch.equal(twin.state_dict()["w"], twin.w)
    twin(torch.ones(1, 8)).sum().backward()
    assert torch.equal(twin.w.grad, torch.ones(8, 8))
    assert not has_view(twin, "w")
    assert has_view(mix, "w")
    in_place.detach()
    assert torch.equal(twin.w, 0.5 * mix.w)
    assert duplicate(mix).w.equal(mix.w)


def test_detach_leaves_nothing_behind() -> None:
    mix = Mix()
    dense, plain = mix.w.detach().clone(), Mix()
    in_place = InPlaceView(mix, "w", Scaled(torch.zeros(8, 8)))
    in_place.expose()
    in_place.detach()
    in_place.detach()
    assert torch.equal(mix.w, dense)
    assert mix.w.__dict__ == plain.w.__dict__
    assert not mix.w._backward_hooks
    assert not mix._state_dict_hooks
    assert mix.__dict__.keys() == plain.__dict__.keys()
    mix(torch.ones(1, 8)).sum().backward()
    assert torch.equal(mix.w.grad, torch.ones(8, 8))


def test_shared_parameter_is_masked_in_every_use() -> None:
    embedding, head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
    head.weight = embedding.weight
    view = view_of(embedding)
    in_place = InPlaceView(embedding, "weight", view)
    in_place.expose()
    assert torch.equal(head.weight, embedding.weight)
    assert torch.equal(embedding(torch.arange(8)), head.weight)
    assert has_view(head, "weight")
    in_place.restore()


# The window of a LightningModule's step.


class Stepping(pl.LightningModule):
    """Writes down what its step computes with."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.mix = Mix()
        self.automatic_optimization = not manual
        self.seen: list[Tensor] = []
        self.between: Callable[[], None] = lambda: None

    def training_step(self, batch: Tensor) -> Tensor:
        self.seen.append(self.mix.w.detach().clone())
        self.between()
        self.seen.append(self.mix.w.detach().clone())
        return self.mix(batch).sum()

    def validation_step(self, batch: Tensor) -> Tensor:
        return self.mix(batch)


def windowed(manual: bool = False) -> tuple[Stepping, InPlaceWindow, Tensor, Tensor]:
    module = Stepping(manual)
    view = view_of(module.mix, "w")
    dense = module.mix.w.detach().clone()
    return module, InPlaceWindow(module, [InPlaceView(module.mix, "w", view)]), dense, dense * view.factor


def test_window_stays_open_for_backward_under_automatic_optimization() -> None:
    module, window, dense, shown = windowed()
    loss = module.training_step(torch.ones(1, 8))
    assert torch.equal(module.seen[0], shown)
    assert torch.equal(module.mix.w, shown)
    loss.backward()
    window.close()
    assert torch.equal(module.mix.w, dense)
    torch.testing.assert_close(module.mix.w.grad, factor_of(dense))


def test_window_closes_with_a_manual_step_and_reopens_after_an_optimizer() -> None:
    module, window, dense, shown = windowed(manual=True)
    during = []

    def optimizer_step() -> None:
        window.close()
        during.append(module.mix.w.detach().clone())
        window.reopen()

    module.between = optimizer_step
    module.training_step(torch.ones(1, 8))
    assert [torch.equal(weight, shown) for weight in module.seen] == [True, True]
    assert torch.equal(during[0], dense)
    assert torch.equal(module.mix.w, dense)
    window.reopen()
    assert torch.equal(module.mix.w, dense)


def test_window_does_not_reopen_under_automatic_optimization() -> None:
    module, window, dense, _ = windowed()
    module.between = lambda: (window.close(), window.reopen())
    module.training_step(torch.ones(1, 8))
    assert torch.equal(module.seen[1], dense)


def test_validation_computes_with_the_view_and_gives_the_dense_weight_back() -> None:
    module, _, dense, shown = windowed()
    x = torch.randn(2, 8)
    assert torch.equal(module.validation_step(x), x @ shown.T)
    assert torch.equal(module.mix.w, dense)


def test_manual_step_that_fails_gives_the_dense_weight_back() -> None:
    module, window, dense, _ = windowed(manual=True)
    module.between = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        module.training_step(torch.ones(1, 8))
    assert torch.equal(module.mix.w, dense)
    window.reopen()
    assert torch.equal(module.mix.w, dense)


def test_removed_window_leaves_nothing_behind() -> None:
    module, window, dense, _ = windowed()
    module.training_step(torch.ones(1, 8))
    window.remove()
    assert torch.equal(module.mix.w, dense)
    assert not {"training_step", "validation_step"} & module.__dict__.keys()
    assert not has_view(module.mix, "w")
    assert pickle.loads(pickle.dumps(module.mix)).__dict__.keys() == module.mix.__dict__.keys()
