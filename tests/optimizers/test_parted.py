"""PartedOptimizer: the same as two optimizers by hand, fresh and resumed, with schedulers, state and memory."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR

from lightning_grad.functional.torch_version import TORCH
from lightning_grad.optimizers import DCTAdamW, Frugal, GaLoreAdamW, Part, PartedOptimizer

STEPS = 8
MUON: dict[str, Any] = {"adjust_lr_fn": "match_rms_adamw"}


def make_net(sizes: tuple[int, ...] = (4, 6, 6, 2)) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def groups_of(net: nn.Sequential) -> list[dict[str, Any]]:
    """Two groups, each with a hidden matrix: with a decay, and without."""
    return [
        {"params": [*net[0].parameters(), net[1].weight], "weight_decay": 0.1, "name": "first"},
        {"params": [net[1].bias, *net[2].parameters()], "weight_decay": 0.0, "lr": 2e-2},
    ]


def matrices(net: nn.Sequential) -> list[nn.Parameter]:
    return [net[1].weight, net[2].weight]


def train(net: nn.Sequential, optimizers: list[Optimizer], before: Callable[[], Any], steps: range) -> nn.Sequential:
    for step in steps:
        before()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        net.zero_grad()
        (net(x) - x[:, :2].sin()).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    return net


def one_cycle(optimizer: Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, [1e-2, 2e-2], total_steps=STEPS + 1)


def step_lr(optimizer: Optimizer) -> LRScheduler:
    return StepLR(optimizer, 2, 0.5)


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "muon": (getattr(torch.optim, "Muon", None), MUON),
    "galore": (GaLoreAdamW, {"rank": 2, "update_gap": 3}),
    "frugal": (Frugal, {"density": 0.5, "update_gap": 3}),
    "dct": (DCTAdamW, {"rank": 2}),
    "sgd": (SGD, {"momentum": 0.9}),
}


def kind_of(name: str) -> tuple[Any, dict[str, Any]]:
    if name == "muon" and TORCH < (2, 9):
        pytest.skip("torch has no Muon")
    return KINDS[name]


def parted(
    net: nn.Sequential, kind: Any, options: dict[str, Any], schedule: Any, **more: Any
) -> tuple[PartedOptimizer, Any]:
    old = AdamW(groups_of(net), lr=1e-2, betas=(0.9, 0.95))
    optimizer = PartedOptimizer(old, [Part(matrices(net), kind, options, **more)])
    return optimizer, schedule(optimizer)


def by_hand(kind: Any, options: dict[str, Any], schedule: Any, **more: Any) -> nn.Sequential:
    """Two optimizers, whose groups follow a third one that only has rates and betas."""
    net = make_net()
    of_user = AdamW(groups_of(net), lr=1e-2, betas=(0.9, 0.95))
    scheduler, (first, second) = schedule(of_user), matrices(net)
    lr_factor, wd_factor, cycles = more.get("lr_factor", 1.0), more.get("wd_factor", 1.0), more.get("cycle_momentum")
    one = kind([{"params": [first]}, {"params": [second]}], **options)
    left = [[p for p in group["params"] if p is not first and p is not second] for group in of_user.param_groups]
    other = AdamW([{"params": params} for params in left])

    def before() -> None:
        of_user._opt_called = True  # type: ignore[attr-defined]
        scheduler.step()
        for user, mine, rest in zip(of_user.param_groups, one.param_groups, other.param_groups, strict=True):
            mine.update(lr=user["lr"] * lr_factor, weight_decay=user["weight_decay"] * wd_factor)
            if cycles:
                beta = user["betas"][0]
                mine.update({"betas": (beta, 0.999)} if "betas" in mine else {"momentum": beta})
            rest.update(lr=user["lr"], weight_decay=user["weight_decay"], betas=user["betas"])

    return train(net, [one, other], before, range(STEPS))


def difference(one: nn.Module, other: nn.Module) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters(), strict=True))


class MovesOneHalf(PartedOptimizer):
    """What some combined optimizers do: the rest keeps the rate that it began with."""

    def follow(self) -> None:
        super().follow()
        for group in self.parts[-1].param_groups:
            group["lr"] = 1e-2


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("schedule", [one_cycle, step_lr])
def test_it_is_two_optimizers_by_hand_fresh_and_resumed(name: str, schedule: Any) -> None:
    kind, options = kind_of(name)
    more = {"lr_factor": 0.5, "wd_factor": 3.0, "cycle_momentum": schedule is one_cycle}
    expected = by_hand(kind, options, schedule, **more)
    net = make_net()
    optimizer, scheduler = parted(net, kind, options, schedule, **more)
    optimizer._opt_called = True  # type: ignore[attr-defined]
    train(net, [optimizer], scheduler.step, range(5))
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    assert difference(train(net, [optimizer], scheduler.step, range(5, STEPS)), expected) == 0.0

    file.seek(0)
    weights, its_state, its_schedule = torch.load(file, weights_only=True)
    net = make_net()
    net.load_state_dict(weights)
    optimizer, scheduler = parted(net, kind, options, schedule, **more)
    optimizer.load_state_dict(its_state)
    scheduler.load_state_dict(its_schedule)
    optimizer._opt_called = True  # type: ignore[attr-defined]
    assert difference(train(net, [optimizer], scheduler.step, range(5, STEPS)), expected) == 0.0


def test_a_schedule_that_moves_one_half_only_fails_the_test() -> None:
    expected, net = by_hand(SGD, {"momentum": 0.9}, step_lr), make_net()
    optimizer = MovesOneHalf(AdamW(groups_of(net), betas=(0.9, 0.95), lr=1e-2), [Part(matrices(net), SGD)])
    optimizer._opt_called = True  # type: ignore[attr-defined]
    assert difference(train(net, [optimizer], step_lr(optimizer).step, range(STEPS)), expected) > 1e-3


def test_a_momentum_that_does_not_cycle_fails_the_test() -> None:
    kind, options = KINDS["dct"]
    expected, net = by_hand(kind, options, one_cycle, cycle_momentum=True), make_net()
    optimizer, scheduler = parted(net, kind, options, one_cycle)
    optimizer._opt_called = True  # type: ignore[attr-defined]
    assert difference(train(net, [optimizer], scheduler.step, range(STEPS)), expected) > 1e-4


def test_its_groups_are_the_very_groups() -> None:
    net = make_net()
    old = AdamW(groups_of(net), lr=1e-2)
    groups, first, second = old.param_groups, *old.param_groups
    optimizer = PartedOptimizer(old, [Part(matrices(net), SGD)])
    assert optimizer.param_groups is groups
    assert groups[0] is first
    assert groups[1] is second
    assert [len(group["params"]) for group in groups] == [3, 3]
    assert optimizer.defaults == old.defaults
    assert [type(part) for part in optimizer.parts] == [SGD, AdamW]
    assert [optimizer.group_of(optimizer.parts[1], index) for index in (0, 1)] == [0, 1]


# State


@pytest.mark.parametrize(
    ("kind", "options", "share"),
    [
        (getattr(torch.optim, "Muon", None), MUON, 0.504),
        (GaLoreAdamW, {"rank": 16}, 0.194),
        (GaLoreAdamW, {"rank": 16, "projector_bits": 4}, 0.140),
        (DCTAdamW, {"rank": 16}, 0.133),
        (Frugal, {"density": 0.25}, 0.256),
    ],
)
def test_bytes_of_state_next_to_adamw(kind: Any, options: dict[str, Any], share: float) -> None:
    if kind is None:
        pytest.skip("torch has no Muon")
    assert bytes_of(kind, options) == pytest.approx(share, abs=2e-3)


def test_bytes_show_a_library_that_ignores_the_rank() -> None:
    po = pytest.importorskip("pytorch_optimizer")
    assert bytes_of(po.GaLore, {}) == pytest.approx(1.0, abs=2e-3)


def bytes_of(kind: Any, options: dict[str, Any]) -> float:
    """Return the bytes of state with 8 matrices 128x128 and 8 vectors on AdamW, as a share of AdamW's."""
    net = nn.Sequential(*(nn.Linear(128, 128) for _ in range(8)))
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    adamw = AdamW(net.parameters())
    optimizer = PartedOptimizer(adamw, [Part([layer.weight for layer in net], kind, options)])
    optimizer.step()
    held = sum(each.nbytes for state in optimizer.state.values() for each in state.values() if isinstance(each, Tensor))
    return held / (8 * 2 * (128 * 128 + 128) * 4)


class CountsInGroups(SGD):
    """Keeps a state in its groups, as many classes do, and an option that it stores nowhere else."""

    def __init__(self, params: Any, lr: float = 0.1, growth: float = 1.0) -> None:
        super().__init__(params, lr=lr)
        self.growth = growth
        for group in self.param_groups:
            group["gain"] = 1.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["gain"] *= self.growth
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-group["lr"] * group["gain"])


@pytest.mark.parametrize("is_rest", [True, False])
def test_what_a_class_keeps_in_its_groups_lives_on_and_is_saved(is_rest: bool) -> None:
    def make(net: nn.Sequential) -> PartedOptimizer:
        if is_rest:
            return PartedOptimizer(CountsInGroups(net.parameters(), growth=2.0), [Part(matrices(net), SGD)])
        return PartedOptimizer(SGD(net.parameters(), lr=0.1), [Part(matrices(net), CountsInGroups, {"growth": 2.0})])

    net = make_net()
    optimizer = make(net)
    train(net, [optimizer], int, range(3))
    holder = optimizer if is_rest else optimizer.parts[0]
    assert holder.param_groups[0]["gain"] == 8.0
    saved = copy.deepcopy(optimizer.state_dict())
    other = make(make_net())
    other.load_state_dict(saved)
    other.param_groups[0]["lr"] = 0.05  # a scheduler
    other_net_step(other)
    assert [part.param_groups[0]["lr"] for part in other.parts] == [0.05, 0.05]
    assert (other if is_rest else other.parts[0]).param_groups[0]["gain"] == 16.0
    if is_rest:
        other.param_groups[0]["gain"] = 1.0  # by the user
        other_net_step(other)
        assert other.param_groups[0]["gain"] == 2.0


def other_net_step(optimizer: Optimizer) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def test_a_class_that_begins_with_a_state_keeps_it() -> None:
    net = make_net()
    optimizer = PartedOptimizer(Adagrad(net.parameters(), initial_accumulator_value=0.5), [Part(matrices(net), SGD)])
    assert {id(p) for p in optimizer.state} == {id(p) for p in net.parameters()} - {id(p) for p in matrices(net)}
    assert {float(state["sum"].flatten()[0]) for state in optimizer.state.values()} == {0.5}


def test_copies_and_pickles_go_on_as_the_original() -> None:
    net = make_net()
    optimizer, _ = parted(net, *KINDS["frugal"], step_lr)
    train(net, [optimizer], int, range(3))
    others = [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))]
    train(net, [optimizer], int, range(3, 6))
    for its_net, its_optimizer in others:
        assert difference(train(its_net, [its_optimizer], int, range(3, 6)), net) == 0.0


def test_groups_that_are_added_later_belong_to_the_rest() -> None:
    net, late = make_net(), nn.Linear(3, 3)
    optimizer, _ = parted(net, *KINDS["dct"], step_lr)
    train(net, [optimizer], int, range(1))
    optimizer.add_param_group({"params": [late.weight], "lr": 0.5})
    optimizer.param_groups[0]["params"].append(late.bias)
    for parameter in late.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = late.weight.detach().clone()
    optimizer.step()
    assert (before - late.weight.detach()).abs().min() == pytest.approx(0.5, rel=0.02)
    assert "exp_avg" in optimizer.state[late.bias]
    again = PartedOptimizer(AdamW(groups_of(net), lr=1e-2), [Part(matrices(net), *KINDS["dct"])])
    again.param_groups[0]["params"].append(late.bias)
    again.add_param_group({"params": [late.weight]})
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[late.weight]["exp_avg"], optimizer.state[late.weight]["exp_avg"])


def test_a_parameter_in_the_place_of_another_belongs_to_the_rest() -> None:
    net = make_net()
    optimizer, _ = parted(net, *KINDS["dct"], step_lr)
    train(net, [optimizer], int, range(1))
    new = nn.Parameter(torch.ones(2))
    optimizer.param_groups[1]["params"][-1] = new  # as many parameters as before
    new.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(new, torch.ones(2))


@pytest.mark.parametrize("kind", ["dct", "frugal"])
def test_a_compiled_step_is_the_step(kind: str) -> None:
    one, other = make_net(), make_net()
    for net, compiles in ((one, True), (other, False)):
        optimizer, _ = parted(net, *KINDS[kind], step_lr)
        if compiles:
            optimizer.step = torch.compile(optimizer.step, backend="eager")
        train(net, [optimizer], int, range(4))
    torch._dynamo.reset()
    assert difference(one, other) == 0.0


def test_a_closure_and_hooks_run_once() -> None:
    net, calls = make_net(), []
    old = AdamW(groups_of(net), lr=1e-2)
    optimizer = PartedOptimizer(old, [Part(matrices(net), SGD)])
    optimizer.register_step_pre_hook(lambda *_: calls.append("hook"))

    def closure() -> float:
        assert torch.is_grad_enabled()
        calls.append("closure")
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert calls == ["hook", "closure"]


def test_names_of_parameters_are_kept() -> None:
    net = make_net()
    old = AdamW(net.named_parameters(), lr=1e-2)
    optimizer = PartedOptimizer(old, [Part([("middle", net[1].weight)], DCTAdamW, {"rank": 2})])
    assert optimizer.parts[0].param_groups[0]["param_names"] == ["middle"]
    train(net, [optimizer], int, range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.parts[0].param_groups[0]["param_names"] == ["middle"]
    assert len(optimizer.param_groups[0]["param_names"]) == 6


def test_a_part_takes_what_a_module_returns_as_its_parameters() -> None:
    net = make_net()
    optimizer = PartedOptimizer(AdamW(net.parameters()), [Part(net[1].parameters(), SGD, {"momentum": 0.9})])
    train(net, [optimizer], int, range(1))
    assert [list(optimizer.state[parameter]) for parameter in net[1].parameters()] == [["momentum_buffer"]] * 2


def test_all_parameters_may_be_in_parts() -> None:
    net = make_net()
    first, second = net[1].weight, net[2].weight
    optimizer = PartedOptimizer(
        AdamW([first, second]), [Part([first], SGD, lr_factor=0.5), Part([second], DCTAdamW, {"rank": 2})]
    )
    assert [type(part) for part in optimizer.parts] == [SGD, DCTAdamW]
    train(net, [optimizer], int, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.parts[0].param_groups[0]["lr"] == 5e-4


# Errors


class Averages(SGD):
    def train(self) -> None: ...
    def eval(self) -> None: ...


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda n: PartedOptimizer(SGD(n.parameters()), [Part([], SGD)]), "must have parameters of the SGD; got no"),
        (
            lambda n: PartedOptimizer(SGD(n[0].parameters()), [Part(matrices(n), SGD)]),
            "got 2 parameters that no group holds",
        ),
        (
            lambda n: PartedOptimizer(SGD(n.parameters()), [Part([n[0].bias], SGD), Part([n[0].bias], SGD)]),
            "each parameter must be in one part at most; 1 are in two",
        ),
        (lambda n: Part(matrices(n), SGD, lr_factor=0.0), "lr_factor must be above 0; got 0.0"),
        (lambda n: Part(matrices(n), SGD, wd_factor=float("inf")), "wd_factor must be finite; got inf"),
        (lambda n: Part(matrices(n), SGD, weight_decay=-1.0), "weight_decay must be at least 0; got -1.0"),
        (lambda n: PartedOptimizer(Averages(n.parameters()), [Part(matrices(n), SGD)]), "Averages averages weights"),
        (lambda n: PartedOptimizer(torch.optim.LBFGS(n.parameters()), [Part(matrices(n), SGD)]), "cannot be parted"),
        (lambda n: PartedOptimizer(SGD(n.parameters()), [Part([n[0].bias], DCTAdamW)]), "takes only real matrices"),
    ],
)
def test_what_cannot_be_parted_is_refused(make: Callable[[nn.Sequential], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(make_net())


def test_the_state_of_another_optimizer_is_refused() -> None:
    net = make_net()
    optimizer, _ = parted(net, SGD, {}, step_lr)
    with pytest.raises(ValueError, match="must have parts with \\[2\\] groups; got no parts"):
        optimizer.load_state_dict(AdamW(groups_of(net)).state_dict())
    other = PartedOptimizer(AdamW(groups_of(net)), [Part([net[0].bias], SGD)])
    with pytest.raises(ValueError, match=r"with \[2\] groups; got groups \[1\]\. Load it with the same parts"):
        optimizer.load_state_dict(other.state_dict())
