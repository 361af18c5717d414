"""A module has a second state: what it keeps from step to step is held twice, and neither sees the other."""

import logging
import pathlib
import random
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from lightning_grad.callbacks.adversarial._second_state import SecondState
from tests import labelled

Pair = namedtuple("Pair", "sums count")


class Meter:
    def __init__(self) -> None:
        self.total, self.values = torch.zeros(()), [1.0]

    def add(self, value: float) -> None:
        self.total += value
        self.values.append(value)


@dataclass(frozen=True)
class Kept:
    items: list[Any] = field(default_factory=list)


class Node:
    def __init__(self, parent: Any = None) -> None:
        self.parent, self.children, self.visits = parent, [], 0


def numpy_set(values: Any, number: float) -> None:
    values[0] = number


def module_with(value: Any) -> pl.LightningModule:
    module = pl.LightningModule()
    module.held = value
    return module


def set_held(module: Any, value: Any) -> None:
    module.held = value


# What is held, what a step does to it, and what is then seen of it.
KINDS: dict[str, tuple[Any, Any, Any]] = {
    "number": (lambda: 1, lambda m: set_held(m, m.held + 1), lambda v: v),
    "text": (lambda: "a", lambda m: set_held(m, m.held + "b"), lambda v: v),
    "tensor in place": (lambda: torch.zeros(2), lambda m: m.held.add_(1), lambda v: v.tolist()),
    "tensor bound anew": (lambda: torch.zeros(2), lambda m: set_held(m, m.held + 1), lambda v: v.tolist()),
    "tensor that grows": (
        lambda: torch.zeros(1),
        lambda m: set_held(m, torch.cat([m.held, m.held + 1])),
        lambda v: v.tolist(),
    ),
    "list": (list, lambda m: m.held.append(1), list),
    "cleared list": (lambda: [1], lambda m: m.held.clear(), list),
    "list of lists": (lambda: [[], []], lambda m: m.held[1].append(1), str),
    "list bound anew": (list, lambda m: set_held(m, [*m.held, 1]), list),
    "dictionary": (dict, lambda m: m.held.update({len(m.held): 1}), dict),
    "dictionary of lists": (lambda: defaultdict(list), lambda m: m.held["x"].append(1), str),
    "ordered": (OrderedDict, lambda m: m.held.setdefault("x", []).append(1), str),
    "set": (set, lambda m: m.held.add(len(m.held)), sorted),
    "deque": (lambda: deque(maxlen=2), lambda m: m.held.append(1), str),
    "tuple": (lambda: (torch.zeros(()), [0]), lambda m: m.held[1].append(1), str),
    "named tuple": (lambda: Pair([0], 0), lambda m: m.held.sums.append(1), str),
    "numpy": (lambda: np.zeros(2), lambda m: numpy_set(m.held, m.held[0] + 1), lambda v: v.tolist()),
    "meter": (Meter, lambda m: m.held.add(2.0), lambda v: (float(v.total), v.values)),
    "frozen record": (Kept, lambda m: m.held.items.append(1), str),
    "meters in a list": (lambda: [Meter()], lambda m: m.held[0].add(2.0), lambda v: float(v[0].total)),
    "metric in a list": (lambda: [MeanMetric()], lambda m: m.held[0].update(2.0), lambda v: float(v[0].weight)),
    "metric in a dictionary": (
        lambda: {"x": MeanMetric()},
        lambda m: m.held["x"].update(2.0),
        lambda v: float(v["x"].weight),
    ),
    "torch generator": (torch.Generator, lambda m: torch.rand(2, generator=m.held), lambda v: v.get_state().tolist()),
    "numpy generator": (np.random.default_rng, lambda m: m.held.random(), lambda v: str(v.bit_generator.state)),
    "python generator": (random.Random, lambda m: m.held.random(), lambda v: v.getstate()),
    "metric": (MeanMetric, lambda m: m.held.update(2.0), lambda v: float(v.weight)),
    "metric made anew": (
        MeanMetric,
        lambda m: set_held(m, MeanMetric()) or m.held.update(2.0),
        lambda v: (id(v), float(v.weight)),
    ),
    "module of metrics": (
        lambda: nn.ModuleDict({"x": MeanMetric()}),
        lambda m: m.held["x"].update(2.0),
        lambda v: float(v["x"].weight),
    ),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_neither_sees_what_the_other_does(kind: str, inference: bool) -> None:
    make, change, look = KINDS[kind]
    with torch.inference_mode(inference):
        module = module_with(make())
        start, order = look(module.held), list(vars(module))
        second = SecondState(module)
        change(module)
        once, held = look(module.held), module.held
        assert once != start
        for _ in range(2):
            with second.used():
                change(module)
            assert module.held is held
            assert look(module.held) == once
        with second.used():
            twice = look(module.held)
        change(module)
        assert list(vars(module)) == order
        # Numbers that are drawn are the same in both, too.
        if kind != "metric made anew":
            assert look(module.held) == twice


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("later", None)
        self.seen = 0


def in_place(module: Any) -> None:
    module.count.add_(1)
    module.seen += 1


def anew(module: Any) -> None:
    module.count = module.count + 1
    module.seen += 1


def grown(module: Any) -> None:
    module.count = torch.cat([module.count, module.count + 1])


def filled(module: Any) -> None:
    module.later = torch.ones(1) if module.later is None else module.later + 1


def registered(module: Any) -> None:
    module.register_buffer(f"new{len(module._buffers)}", torch.ones(1))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", [in_place, anew, grown, filled, registered])
def test_buffers(change: Any, inference: bool) -> None:
    def look() -> dict[str, Any]:
        return {name: None if b is None else b.tolist() for name, b in inner._buffers.items()}

    with torch.inference_mode(inference):
        inner = Counting()
        module = module_with(inner)
        second, start = SecondState(module), look()
        change(inner)
        once, objects = look(), list(inner._buffers.values())
        with second.used():
            assert look() == start
            change(inner)
            assert look() == once
            change(inner)
        assert look() == once
        assert all(b is was for b, was in zip(inner._buffers.values(), objects, strict=True))
        change(inner)
        with second.used():
            twice = look()
        assert look() == twice


def test_buffers_stay_the_same_objects_in_the_second_state() -> None:
    inner = Counting()
    module = module_with(inner)
    module.known = [inner.count]
    second, count = SecondState(module), inner.count
    in_place(inner)
    with second.used():
        assert inner.count is count, "compiled code looks at it"
        assert module.known[0] is count
        assert count == 0
    assert count == 1


def test_buffers_made_in_inference_serve_where_gradients_are() -> None:
    inner = Counting()
    with torch.inference_mode():
        inner.count = inner.count + 3
    second = SecondState(module_with(inner))
    with second.used():
        x = torch.ones(1, requires_grad=True)
        (x * inner.count).backward()
        assert x.grad == 3
    assert inner.count.is_inference()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", [in_place, anew])
def test_modules_and_buffers_known_twice(change: Any, inference: bool) -> None:
    with torch.inference_mode(inference):
        module = pl.LightningModule()
        module.inner, module.tied = Counting(), Counting()
        module.net = nn.Sequential(nn.Sequential(module.inner), nn.ReLU())
        module.tied._buffers["count"] = module.inner.count
        second = SecondState(module)
        for _ in range(3):
            change(module.inner)
        for times in range(2):
            with second.used():
                assert (module.inner.count, module.inner.seen) == (times, times)
                change(module.inner)
                assert module.net[0][0].count == times + 1
            assert (module.inner.count, module.inner.seen) == (3, 3)
        if change is in_place:
            assert module.tied.count is module.inner.count


def test_buffers_can_be_taken_later() -> None:
    inner = Counting()
    second = SecondState(module_with(inner))
    inner.count += 5
    inner.seen = 5
    second.take_buffers()
    inner.count += 1
    with second.used():
        assert (inner.count, inner.seen) == (5, 0)


# Sharing.


def test_what_is_known_twice_stays_one_thing() -> None:
    module = pl.LightningModule()
    accuracy = MulticlassAccuracy(3)
    module.metric, module.metrics = accuracy, nn.ModuleList([accuracy])
    module.by_name, module.plain, shared = {"acc": accuracy}, [accuracy], [1]
    module.one, module.other, module.deep = shared, shared, {"x": (shared,)}
    with SecondState(module).used():
        assert module.metric is not accuracy
        assert module.metric is module.metrics[0] is module.by_name["acc"] is module.plain[0]
        assert module.one is not shared
        assert module.one is module.other is module.deep["x"][0]
    assert module.metric is module.metrics[0] is module.by_name["acc"] is module.plain[0] is accuracy
    assert module.one is module.other is module.deep["x"][0] is shared


def test_compute_groups_stay_groups() -> None:
    x, y = torch.eye(3), torch.tensor([0, 1, 1])
    module = module_with(MetricCollection([MulticlassPrecision(3), MulticlassRecall(3)]))
    module.held.update(x, y)
    module.held.compute()
    second = SecondState(module)
    module.held.update(x, y)
    with second.used():
        module.held.update(x, x.argmax(1))
        assert len(module.held.compute_groups) == 1
        expected = MetricCollection([MulticlassPrecision(3), MulticlassRecall(3)], compute_groups=False)
        expected.update(x, y)
        expected.update(x, x.argmax(1))
        assert module.held.compute() == expected.compute()
    assert module.held["MulticlassRecall"]._update_count == 2


class Singular:
    """There is one only."""

    _one: Any = None

    def __new__(cls) -> Any:
        cls._one = cls._one or super().__new__(cls)
        return cls._one

    def __init__(self) -> None:
        self.values = [1]


def test_what_is_no_plain_state_is_shared() -> None:
    module, layer = pl.LightningModule(), nn.Linear(2, 2)
    data = TensorDataset(torch.zeros(3))
    held = [
        data,
        pathlib.Path(),
        layer,
        logging.getLogger("tests.second.state"),
        print,
        nn.Parameter(torch.zeros(1)),
        Singular(),
    ]
    module.held, module.path, module.data, module.hidden = held, held[1], data, {"teacher": layer}
    module.log_of_mine, module.singular = held[3], Singular()
    manager, values = held[3].manager, held[6].values
    with SecondState(module).used():
        assert all(one is other for one, other in zip(module.held, held, strict=True))
        assert module.path is held[1]
        assert module.data is data
        assert module.hidden["teacher"] is layer
        assert module.log_of_mine is held[3]
        assert module.singular is held[6]
    assert held[3].manager is manager is logging.Logger.manager
    assert held[6].values is values


def test_weights_are_no_state_wherever_they_are_known() -> None:
    class Distance(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.BatchNorm1d(2)
            self.add_state("total", torch.zeros(()), "sum")

        def update(self) -> None:
            self.total += 1

        def compute(self) -> Any:
            return self.total

    module = pl.LightningModule()
    module.lstm, module.distance = nn.LSTM(2, 3), Distance()
    weights = list(module.lstm._flat_weights)
    x, networks = torch.rand(4, 2), list(module.distance.net.parameters())
    buffer = module.distance.net.running_mean
    with SecondState(module).used():
        with torch.no_grad():
            weights[0].zero_()
        assert all(one is other for one, other in zip(module.lstm._flat_weights, weights, strict=True))
        inside = module.lstm(x)[0]
        module.distance.update()
        assert all(one is other for one, other in zip(module.distance.net.parameters(), networks, strict=True))
        assert module.distance.net.running_mean is not buffer
    assert module.distance.total == 0
    assert torch.equal(module.lstm(x)[0], inside)


def test_metrics_that_remember_a_graph() -> None:
    module = pl.LightningModule()
    module.train_loss = MeanMetric()
    module.collection = MetricCollection({"a": MeanMetric(), "b": MeanMetric()})
    loss = (torch.ones(2, requires_grad=True) * 2).mean()
    module.train_loss(loss)
    module.collection(loss)
    cache = module.train_loss._forward_cache
    assert cache.grad_fn is not None
    second = SecondState(module)
    with second.used():
        assert module.train_loss._forward_cache == 2
        assert module.train_loss.compute() == 2
        assert module.collection.compute() == {"a": 2, "b": 2}
    assert module.train_loss._forward_cache is cache


@pytest.mark.parametrize("kind", ["metric", "metric in a list", "tensor in place", "meter"])
def test_what_inference_made_can_be_counted_on_outside_of_it(kind: str) -> None:
    make, change, look = KINDS[kind]
    with torch.inference_mode():
        module = module_with(make())
        change(module)
        second = SecondState(module)
    once = look(module.held)
    with second.used():
        change(module)
        assert look(module.held) != once
    assert look(module.held) == once


def test_containers_that_hold_themselves() -> None:
    root = Node()
    root.children.append(Node(root))
    around: list[Any] = [1]
    around.append(around)
    module = module_with(root)
    module.around = around
    with SecondState(module).used():
        assert module.held is not root
        assert module.held.children[0].parent is module.held
        module.held.children[0].visits += 1
        assert module.around[1] is module.around is not around
    assert root.children[0].visits == 0


def test_what_one_state_makes_or_deletes_is_not_in_the_other() -> None:
    module = pl.LightningModule()
    module.deleted, module.kept = 1, 2
    second = SecondState(module)
    module.clean = [1]
    module.clean_metric = MeanMetric()
    with second.used():
        assert not hasattr(module, "clean")
        assert not hasattr(module, "clean_metric")
        module.attacked, module.clean_metric, module.attacked_metric = 3, MeanMetric(), MeanMetric()
        del module.deleted
        module.clean_metric.update(5.0)
    assert (module.deleted, module.kept, module.clean) == (1, 2, [1])
    assert not hasattr(module, "attacked")
    assert list(module._modules) == ["clean_metric"]
    assert module.clean_metric.weight == 0
    with second.used():
        assert module.attacked == 3
        assert module.clean_metric.weight == 1
        assert not hasattr(module, "deleted")


def test_an_exception_gives_the_state_back() -> None:
    module = module_with([])
    module.inner = Counting()

    def fail() -> None:
        with SecondState(module).used():
            module.held.append(1)
            in_place(module.inner)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (module.held, module.inner.count, module.inner.seen) == ([], 0, 0)


def test_what_stays_as_it_is() -> None:
    module = pl.LightningModule()
    module.save_hyperparameters({"a": [1]})
    module.step = step = lambda: None  # a method on the instance
    module.net = nn.Linear(2, 2)
    views = module.net.__dict__["_lightning_grad_views"] = {"weight": Meter()}
    meter, hparams = views["weight"], module.hparams
    before = {name: id(value) for name, value in vars(module).items()}
    with SecondState(module).used():
        assert {name: id(value) for name, value in vars(module).items()} == before
        assert module.step is step
        assert module.hparams is hparams
        assert module.net.__dict__["_lightning_grad_views"]["weight"] is meter


class Slotted:
    """A meter without a dictionary, that can be called."""

    __slots__ = ("count", "device")

    def __init__(self) -> None:
        self.count, self.device = 0, torch.device("cpu")

    def __call__(self) -> None:
        self.count += 1


def test_an_object_with_a_foreign_part_has_a_state_of_its_own() -> None:
    module = pl.LightningModule()
    module.meter, module.space = Slotted(), SimpleNamespace(metric=SumMetric(), logger=logging.getLogger("tests"))
    meter, metric = module.meter, module.space.metric
    second = SecondState(module)
    with second.used():
        module.meter()
        module.space.metric.update(3.0)
        assert module.space.logger is logging.getLogger("tests")
    assert (module.meter, module.space.metric) == (meter, metric)
    assert meter.count == 0
    assert metric.sum_value == 0.0
    with second.used():
        assert module.meter.count == 1
        assert module.space.metric.compute() == 3.0


@pytest.mark.parametrize("kind", labelled.KINDS)
def test_tensors_of_a_class_of_their_own_keep_it_and_their_attributes(kind: str) -> None:
    module = pl.LightningModule()
    module.grid, module.kept = labelled.labelled(kind, torch.zeros(2, 3)), [labelled.labelled(kind, torch.zeros(2, 3))]
    grid = module.grid
    second = SecondState(module)
    with second.used():
        for own in (module.grid, module.kept[0]):
            assert type(own) is labelled.KINDS[kind]
            assert own.labels == ["c0", "c1", "c2"]
            Tensor.as_subclass(own, Tensor).add_(1)
        assert module.grid is not grid
    assert module.grid is grid
    assert Tensor.as_subclass(grid, Tensor).sum() == Tensor.as_subclass(module.kept[0], Tensor).sum() == 0
