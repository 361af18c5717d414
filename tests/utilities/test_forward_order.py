"""What is used first in the forward pass comes first, and no hook is left where it was learnt."""

import pytest
import torch
from torch import Tensor, nn

from lightning_grad.utilities.forward_order import ForwardOrder


class Backwards(nn.Module):
    """Registers its layers in the reverse of the order in which it uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(2, 2)
        self.middle = nn.Sequential(nn.Tanh(), nn.Linear(2, 2))
        self.first = nn.Linear(2, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x))) * self.scale


NAMES = ["last.weight", "last.bias", "middle.1.weight", "unused.weight", "first.weight"]


def hooks(module: nn.Module) -> list[str]:
    """Return the names of the children that carry a hook."""
    return [name for name, child in module.named_modules() if child._forward_pre_hooks or child._forward_hooks]


def learn(module: nn.Module, calls: int = 1) -> ForwardOrder:
    order = ForwardOrder(module)
    order.watch()
    for _ in range(calls):
        module(torch.ones(1, 2))
    order.stop()
    return order


def test_the_order_is_that_of_the_calls() -> None:
    expected = ["first.weight", "middle.1.weight", "last.weight", "last.bias", "unused.weight"]
    assert learn(Backwards()).sort(NAMES) == expected


def test_before_a_forward_pass_the_order_is_the_one_given() -> None:
    order = ForwardOrder(Backwards())
    assert order.sort(NAMES) == NAMES
    order.watch()
    order.stop()
    assert order.sort(NAMES) == NAMES


def test_a_layer_called_twice_counts_from_its_first_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.second(self.first(x)))

    assert learn(Twice()).sort(["second.weight", "first.weight"]) == ["first.weight", "second.weight"]
    assert learn(Twice(), calls=3).sort(["second.weight", "first.weight"]) == ["first.weight", "second.weight"]


def test_hooks_are_there_while_it_learns_and_gone_after() -> None:
    module = Backwards()
    order = ForwardOrder(module)
    order.watch()
    assert hooks(module) == ["last", "middle.1", "first", "unused"], "where parameters are, and not on the root"
    order.stop()
    assert hooks(module) == []
    order.stop()
    assert hooks(module) == [], "stopping twice is no error"


def test_other_hooks_stay() -> None:
    module = Backwards()
    module.first.register_forward_pre_hook(lambda *_: None)
    learn(module)
    assert hooks(module) == ["first"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch about its own tracing
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("how", ["module.compile()", "torch.compile(module)"])
def test_a_compiled_child_is_not_looked_into(how: str) -> None:
    module = Backwards()
    torch._dynamo.reset()
    if how == "module.compile()":
        module.middle.compile(backend="eager")
    else:
        module.middle = torch.compile(module.middle, backend="eager")
    order = ForwardOrder(module)
    order.watch()
    assert hooks(module) == ["last", "first", "unused"]
    module(torch.ones(1, 2))
    order.stop()
    # What was not seen comes after what was, in the order given.
    names = ["middle.1.weight", "last.weight", "first.weight"]
    assert order.sort(names) == ["first.weight", "last.weight", "middle.1.weight"]


def test_a_compiled_root_is_not_looked_into() -> None:
    module = Backwards()
    module.compile(backend="eager")
    order = ForwardOrder(module)
    order.watch()
    assert hooks(module) == []
    order.stop()


def test_a_child_inside_a_compiled_one_that_is_itself_compiled() -> None:
    module = Backwards()
    module.middle[1].compile(backend="eager")
    order = ForwardOrder(module)
    order.watch()
    assert hooks(module) == ["last", "first", "unused"]
    order.stop()
