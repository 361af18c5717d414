"""A snapshot puts back everything, also after the module has changed since the last one."""

import gc
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_grad.core import module_state
from lightning_grad.core.module_state import Snapshot, put_back
from lightning_grad.core.quiet import aside, quiet
from lightning_grad.testing import make_classifier, make_trainer
from tests.core.test_quiet import Meter, assert_same, everything_in


class Part(nn.Module):
    """A layer with a bit of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("seen", torch.zeros(2))
        self.count, self.sizes, self.cache, self.late = 0, [1, 2], {}, None
        self.tensor, self.meter = torch.zeros(2), Meter()


def build() -> nn.Module:
    module = nn.Sequential(Part(), nn.Sequential(Part(), nn.ReLU()), MulticlassAccuracy(3))
    module[2](torch.tensor([0, 1]), torch.tensor([0, 2]))
    return module


def spoil(module: nn.Module) -> None:
    """Change whatever a step could change in any module."""
    for part in list(module.modules()):
        part.training = not part.training
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                buffer.copy_(buffer + 1)
                part._buffers[name] = torch.ones(3)
        part._buffers["added"] = torch.zeros(1)
        own = vars(part)
        names = [name for name in own if name not in ("_parameters", "_buffers", "_modules")]
        for name in names:
            spoil_value(own[name])
            own[name] = object()
        own["new"] = [1]
        del own[names[-1]]


def spoil_value(value: Any) -> None:
    if isinstance(value, Tensor):
        value.copy_(value + 1)
    elif isinstance(value, Meter):
        value.update(1.0)
    elif isinstance(value, list):
        value.append([0.0])
    elif isinstance(value, dict):
        for item in value.values():
            spoil_value(item)
        value["new"] = 1


def double_buffers(module: nn.Module) -> None:
    for part in module.modules():
        part._buffers.update({name: buffer.double() for name, buffer in part._buffers.items()})


CHANGES: dict[str, Callable[[Any], object]] = {
    "a submodule is added": lambda m: m.append(Part()),
    "a submodule is removed": lambda m: m.pop(0),
    "a submodule is replaced by one of its class": lambda m: m.__setitem__(0, Part()),
    "two submodules change places": lambda m: m.insert(2, m.pop(0)),
    "a buffer is added": lambda m: m[0].register_buffer("other", torch.ones(1)),
    "a first buffer is added": lambda m: m[1][1].register_buffer("other", torch.ones(1)),
    "a buffer is removed": lambda m: m[0].__delattr__("seen"),
    "a buffer is replaced": lambda m: setattr(m[0], "seen", torch.full((4,), 5.0)),
    "a buffer becomes none": lambda m: setattr(m[0], "seen", None),
    "buffers change in place": lambda m: m[0].seen.add_(3),
    "buffers change their type": double_buffers,
    "training flags change": lambda m: m[1].eval(),
    "an attribute is added": lambda m: setattr(m[0], "more", [3]),
    "an attribute is removed": lambda m: m[0].__delattr__("sizes"),
    "an attribute is renamed": lambda m: setattr(m[0], "lengths", m[0].__dict__.pop("sizes")),
    "a number becomes a list": lambda m: setattr(m[0], "count", [7]),
    "nothing becomes a tensor": lambda m: setattr(m[1][0], "late", torch.ones(2)),
    "nothing becomes a meter": lambda m: setattr(m[1][0], "late", Meter()),
    "a tensor becomes a number": lambda m: setattr(m[0], "tensor", 2),
    "a number changes": lambda m: setattr(m[0], "count", 2),
    "an empty dictionary is filled": lambda m: m[0].cache.update(a=[1.0], b=torch.zeros(1)),
    "a list is emptied": lambda m: m[0].sizes.clear(),
    "a list holds a tensor": lambda m: m[0].sizes.append(torch.zeros(1)),
    "a hook is added": lambda m: m[0].register_forward_hook(print),
    "a tuple gets a list": lambda m: setattr(m[0].conv, "padding", ([0], 0)),
    "a list holds a module": lambda m: m[0].sizes.append(Part()),
    "a container changes its class": lambda m: setattr(m[0], "cache", OrderedDict(a=[1])),
}


def is_put_back(module: nn.Module) -> bool:
    """Compare with a copy of everything that all modules hold."""
    before = contents(module)
    snapshot = Snapshot(list(module.modules()))
    spoil(module)
    try:
        snapshot.restore()
        assert_same(before, contents(module))
    except (AssertionError, RuntimeError, IndexError, TypeError):
        return False
    return True


def contents(module: nn.Module) -> Any:
    buffers = {name: (id(buffer), str(buffer.dtype)) for name, buffer in module.named_buffers()}
    return in_order({**everything_in(module), "buffers": buffers})


def in_order(value: Any) -> Any:
    """Sort dictionaries, because a deleted entry comes back at another position, and open objects."""
    if isinstance(value, nn.Module):
        return in_order({name: vars(part) for name, part in value.named_modules()})
    if isinstance(value, Meter):
        return in_order(vars(value))
    if isinstance(value, dict):
        return {name: in_order(value[name]) for name in sorted(value)}
    return type(value)(map(in_order, value)) if type(value) in (list, tuple) else value


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_module_is_put_back(change: Callable[[Any], object]) -> None:
    module = build()
    assert is_put_back(module)
    change(module)
    assert is_put_back(module)
    assert is_put_back(module)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_old_snapshot_does_not_put_a_changed_module_back(
    change: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build()
    old = Snapshot(list(module.modules()))
    change(module)
    monkeypatch.setattr(sys.modules[__name__], "Snapshot", lambda modules: old)
    assert not is_put_back(module)


OF_THE_PLAN = [
    "a submodule is added",
    "an attribute is added",
    "a number becomes a list",
    "nothing becomes a tensor",
    "nothing becomes a meter",
]


@pytest.mark.parametrize("name", OF_THE_PLAN)
def test_a_plan_that_is_never_compared_does_not_suffice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    assert is_put_back(module)
    CHANGES[name](module)
    monkeypatch.setattr(module_state._Plan, "fits", lambda *_: True)
    assert not is_put_back(module)


def test_a_plan_is_made_once_for_a_module_that_stays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    init = module_state._Plan.__init__

    def counted(self: Any, names: list[str], kinds: list[Any]) -> None:
        made.append(len(names))
        init(self, names, kinds)

    monkeypatch.setattr(module_state._Plan, "__init__", counted)
    module, trainer = make_classifier(), make_trainer()
    for number in range(3):
        with quiet(trainer, module, evaluate=number == 1):
            module.number = 1
    assert len(made) == 1
    module.number = 2
    with quiet(trainer, module):
        pass
    assert len(made) == 2


def test_a_plan_keeps_no_object_alive() -> None:
    module, kept = build(), torch.zeros(3)
    module[0].late, module[0].cache["tensor"] = kept, kept
    assert is_put_back(module)
    module[0].late, module[0].cache = None, {}
    parts = [weakref.ref(kept), weakref.ref(module[0]), weakref.ref(module)]
    del kept
    assert parts[0]() is None
    del module
    gc.collect()
    assert [part() for part in parts] == [None] * 3


def test_a_part_that_cannot_be_put_back_does_not_stop_the_others() -> None:
    module = build()
    snapshot = Snapshot(list(module.modules()))
    norm = module[1][0].norm
    module[0].seen.resize_(3)
    norm.running_mean.add_(1)
    module[0].tensor.add_(1)
    module[0].sizes.append(3)
    with pytest.raises(RuntimeError, match="size"):
        snapshot.restore()
    assert not norm.running_mean.any()
    assert not module[0].tensor.any()
    assert module[0].sizes == [1, 2]


class Labelled(Tensor):
    """A tensor subclass that forbids changes in place."""

    def copy_(self, *args: Any) -> Any:
        raise AssertionError("refused")


def test_tensors_of_all_kinds_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        inferred = torch.ones(2)
    graph = torch.ones(2, requires_grad=True) * 2
    tensors = [torch.ones(2), torch.ones(3, dtype=torch.int64), nn.Parameter(torch.ones(2)), graph, inferred]
    tensors += [torch.ones(2).as_subclass(Labelled), torch.ones(4)[::2], torch.ones(2, dtype=torch.bfloat16)]
    calls: list[int] = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda a, b: (calls.append(len(a)), copy(a, b)))
    values = [torch.full(tensor.shape, 7, dtype=tensor.dtype) for tensor in tensors]
    put_back(list(zip(tensors, values, strict=True)))
    assert [tensor.tolist() for tensor in tensors] == [value.tolist() for value in values]
    assert calls == [6]
    with torch.inference_mode():
        put_back([(tensors[0], values[0] + 1), (inferred, values[4] + 1)])
    assert tensors[0].tolist() == inferred.tolist() == [8.0, 8.0]


def test_aside_restores_buffers_that_a_graph_uses() -> None:
    norm, x = nn.BatchNorm1d(3).eval(), torch.randn(4, 3, requires_grad=True)
    loss = norm(x).sum()
    with aside(norm):
        norm.train()(x)
        assert norm.running_mean.any()
    assert not norm.running_mean.any()
    assert norm.num_batches_tracked == 0
    loss.backward()  # raises if autograd has seen the buffers change in eval mode's graph
