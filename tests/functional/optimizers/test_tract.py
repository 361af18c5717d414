"""TrAct's gradient: its equation in both systems, the published package's values, and every kind of convolution."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_grad.functional import precondition, train_activations
from lightning_grad.functional.optimizers.tract import rows_of
from tests.cases import cases

# Printed by the published package, torch_tract 1.0.0, for the seeded examples in its file.
LINEAR = """
 0.0741  0.0949 -0.0559 -0.0398 -0.1364  0.0013  0.1603 -0.0468
-0.0994 -0.1061 -0.1781  0.1479  0.1114 -0.0374  0.0324 -0.1329
 0.0303  0.0484  0.1385 -0.1675  0.0778 -0.0854 -0.0592  0.0526
-0.0726  0.1049  0.0998  0.0420 -0.1409 -0.0031 -0.0432 -0.1150
 0.1438 -0.0729 -0.0261 -0.1015 -0.0902  0.1821 -0.1520  0.0950
"""
CONVOLUTION = """
-0.0501 -0.0166  0.0214 -0.0230  0.0324  0.0655  0.0010  0.0600  0.0290
-0.0144  0.0254  0.0484  0.0741 -0.0920  0.0260 -0.0109 -0.0480 -0.0420
 0.0408  0.0736 -0.0403  0.0959  0.0447  0.0549  0.0449  0.0744 -0.0351
-0.0344 -0.0557  0.0050  0.0286 -0.0264  0.0241  0.0068 -0.0687  0.0100
 0.0583 -0.0044 -0.0171  0.0665 -0.0569 -0.0228 -0.0463  0.0894 -0.0777
-0.0105 -0.0507  0.0191  0.0222  0.0361  0.0910  0.0371 -0.0148  0.0335
 0.0478  0.0064  0.0882 -0.0615  0.0065 -0.0027  0.0335 -0.0021  0.0069
-0.0405 -0.0451 -0.0285  0.0239  0.0784  0.0748  0.0436 -0.0527 -0.0703
-0.0896  0.0370 -0.0823 -0.0971 -0.0723 -0.0460  0.0048 -0.0286 -0.0452
 0.0912 -0.0151  0.0588 -0.0053 -0.0359 -0.0247 -0.0263 -0.0650  0.0599
"""


def call(layer: Any, inputs: Tensor, weight: Tensor) -> Tensor:
    return torch.func.functional_call(layer, {"weight": weight}, inputs)


def numbers(text: str) -> Tensor:
    return torch.tensor([float(number) for number in text.split()])


@pytest.mark.parametrize(
    ("build", "inputs", "outputs", "published"),
    [
        (lambda: nn.Linear(8, 5), (30, 8), (30, 5), LINEAR),
        (lambda: nn.Conv2d(2, 5, 3), (30, 2, 6, 4), (30, 5, 4, 2), CONVOLUTION),
    ],
    ids=["linear", "convolution"],
)
def test_it_is_the_published_gradient(build: Any, inputs: Any, outputs: Any, published: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(inputs), torch.randn(outputs)
    layer = build()
    (y - call(layer, x, train_activations(layer.weight, x, layer))).pow(2).mean().backward()
    torch.testing.assert_close(layer.weight.grad.flatten(), numbers(published), rtol=0, atol=6e-5)
    plain = build()
    plain.load_state_dict(layer.state_dict())
    (y - plain(x)).pow(2).mean().backward()
    assert not torch.allclose(plain.weight.grad.flatten(), numbers(published), rtol=0, atol=6e-5)
    assert torch.equal(layer.bias.grad, plain.bias.grad), "only the weight's gradient changes"


@pytest.mark.parametrize("rows", [3, 9, 40])
@pytest.mark.parametrize("groups", [1, 2])
def test_both_systems_solve_the_equation(rows: int, groups: int) -> None:
    x, g = torch.randn(groups, rows, 9).double(), torch.randn(groups, 4, 9).double()
    matrix = x.mT @ x / rows + 0.3 * torch.eye(9).double()
    torch.testing.assert_close(precondition(g, x, 0.3), g @ torch.linalg.inv(matrix), rtol=1e-10, atol=1e-12)


def test_half_precision_is_solved_in_float32() -> None:
    x, g = torch.randn(40, 9), torch.randn(4, 9)
    low = precondition(g.bfloat16(), x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(
        low.float(), precondition(g.bfloat16().float(), x.bfloat16().float()), rtol=1e-2, atol=1e-2
    )


@cases(
    "groups, stride, dilation, padding, mode",
    itertools.product((1, 2), (1, 2), (1, 2), (0, 1, "same"), ("zeros", "reflect", "circular", "replicate")),
)
def test_rows_are_those_that_a_convolution_multiplies(
    groups: int, stride: int, dilation: int, padding: Any, mode: str
) -> None:
    if padding == "same" and stride > 1:
        return
    for kind, dims in ((nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)):
        layer = kind(4, 6, 3, stride, padding, dilation, groups, padding_mode=mode).double()
        x = torch.randn(2, 4, *[7] * dims).double()
        expected = layer(x)
        weight = layer.weight.reshape(groups, 6 // groups, -1)
        outputs = torch.einsum("gbf,gof->bgo", rows_of(layer, x), weight).reshape(2, *expected.shape[2:], 6)
        torch.testing.assert_close(outputs.movedim(-1, 1) + layer.bias.reshape(-1, *[1] * dims), expected)


def test_one_image_without_a_batch() -> None:
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(2, 5, 5)
    assert torch.equal(rows_of(layer, x), rows_of(layer, x.unsqueeze(0)))


def test_each_call_has_its_own_inputs() -> None:
    """A siamese layer: the gradient is the sum of those of two layers that see one input each."""
    layer, (a, b) = nn.Linear(6, 3), torch.randn(2, 10, 6)
    loss = sum(call(layer, x, train_activations(layer.weight, x, layer)).square().mean() for x in (a, b * 5))
    loss.backward()
    parts = []
    for x in (a, b * 5):
        twin = nn.Linear(6, 3)
        twin.load_state_dict(layer.state_dict())
        F.linear(x, train_activations(twin.weight, x, twin), twin.bias).square().mean().backward()
        parts.append(twin.weight.grad)
    torch.testing.assert_close(layer.weight.grad, parts[0] + parts[1])
