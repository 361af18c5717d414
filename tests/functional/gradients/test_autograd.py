"""The parts of autograd that torch does not document are there, and are what the package takes them for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_grad.functional.gradients.autograd import (
    Node,
    apply_backward,
    is_transformed,
    kind_of,
    leaf_of,
    output_shape,
)


def doubled() -> tuple[Tensor, Node]:
    leaf = torch.ones(2, requires_grad=True)
    return leaf, leaf.mul(2.0).grad_fn


PARTS: dict[str, Callable[[Tensor, Node], bool]] = {
    "Node._input_metadata": lambda leaf, node: output_shape(node, 0) == (2,),
    "Node.name() of the form MulBackward0": lambda leaf, node: kind_of(node) == "Mul",
    "AccumulateGrad.variable": lambda leaf, node: leaf_of(node.next_functions[0][0]) is leaf,
    "Node.__call__": lambda leaf, node: (
        [float(g.sum()) for g in apply_backward(node, [torch.ones(2)]) if g is not None] == [4.0]
    ),
    "one object for one node": lambda leaf, node: node.next_functions == node.next_functions,
    "torch._C._functorch.is_functorch_wrapped_tensor": lambda leaf, node: not is_transformed(leaf),
}


@pytest.mark.parametrize("name", PARTS)
def test_torch_has_the_part(name: str) -> None:
    assert PARTS[name](*doubled())
