"""The gradient of a step in the context is that of the loss with the term written by hand; its value stays."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.functional import LossCapture, squared_log_normalizers, z_loss
from lightning_grad.functional.gradients.added_terms import AddedTerms

C = 0.3
CLASSES = 5


def context() -> AddedTerms:
    return AddedTerms(lambda call: C * squared_log_normalizers(call.logits, call.dim))


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (3.0 * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()


def labels(*shape: int) -> Tensor:
    return torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(1))


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.1])
MASK = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
PLAIN = logits(6, CLASSES)
TOKENS = labels(6).index_fill(0, torch.tensor([1, 4]), -100)
SOFT = logits(6, CLASSES).detach().softmax(1)

Case = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], tuple[int, ...]]
CASES: dict[str, Case] = {
    "rows": (lambda x: F.cross_entropy(x, labels(6)), lambda x: z_loss(x, C), (6, CLASSES)),
    "module": (lambda x: nn.CrossEntropyLoss()(x, labels(6)), lambda x: z_loss(x, C), (6, CLASSES)),
    "pixels": (lambda x: F.cross_entropy(x, labels(2, 3, 4)), lambda x: z_loss(x, C, dim=1), (2, CLASSES, 3, 4)),
    "one": (lambda x: F.cross_entropy(x, labels(1)[0]), lambda x: z_loss(x, C), (CLASSES,)),
    "flat tokens": (
        lambda x: F.cross_entropy(x.flatten(0, 1), labels(6)),
        lambda x: C * x.logsumexp(2).square().mean(),
        (2, 3, CLASSES),
    ),
    "ignored": (
        lambda x: F.cross_entropy(x, TOKENS),
        lambda x: C * x[[0, 2, 3, 5]].logsumexp(1).square().mean(),
        (6, CLASSES),
    ),
    "all ignored": (
        lambda x: F.cross_entropy(x, TOKENS * 0 - 100, reduction="sum"),
        lambda x: 0.0 * x.sum(),
        (6, CLASSES),
    ),
    "weights and smoothing": (
        lambda x: F.cross_entropy(x, labels(6), WEIGHT, label_smoothing=0.2),
        lambda x: z_loss(x, C),
        (6, CLASSES),
    ),
    "probabilities": (lambda x: F.cross_entropy(x, SOFT), lambda x: z_loss(x, C), (6, CLASSES)),
    "sum": (
        lambda x: F.cross_entropy(x, TOKENS, reduction="sum"),
        lambda x: C * x[[0, 2, 3, 5]].logsumexp(1).square().sum(),
        (6, CLASSES),
    ),
    "masked by the step": (
        lambda x: (F.cross_entropy(x, labels(6), reduction="none") * MASK).sum() / MASK.sum(),
        lambda x: C * (x.logsumexp(1).square() * MASK).sum() / MASK.sum(),
        (6, CLASSES),
    ),
    "log_softmax and nll_loss": (
        lambda x: F.nll_loss(x.log_softmax(-1), labels(6)),
        lambda x: z_loss(x, C),
        (6, CLASSES),
    ),
    "two heads, one with a factor": (
        lambda x: F.cross_entropy(x, labels(6)) + 0.5 * F.cross_entropy(2 * x, labels(6)),
        lambda x: z_loss(x, C) + 0.5 * z_loss(2 * x, C),
        (6, CLASSES),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_term_by_hand(name: str) -> None:
    loss, term, shape = CASES[name]
    x = logits(*shape)
    wanted = torch.autograd.grad(loss(x) + term(x), x)[0]
    terms = context()
    with terms:
        found = loss(x)
    assert torch.equal(found, loss(x))
    torch.testing.assert_close(torch.autograd.grad(found, x)[0], wanted, rtol=1e-6, atol=1e-7)
    if name != "all ignored":
        assert (torch.autograd.grad(loss(x), x)[0] - wanted).abs().max() > 1e-3  # without the term
    assert terms.reached


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_squares_in_float32(dtype: torch.dtype) -> None:
    x = (100 * logits(6, CLASSES)).detach().to(dtype).requires_grad_()
    with context():
        loss = F.cross_entropy(x, labels(6))
    found = torch.autograd.grad(loss, x)[0]
    wide = x.detach().float().requires_grad_()
    wanted = torch.autograd.grad(F.cross_entropy(wide, labels(6)) + z_loss(wide, C), wide)[0]
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=1e-3)
    if dtype == torch.float16:
        assert x.logsumexp(1).square().isinf().any()  # what a term in the dtype of the logits would give


def test_calls_without_a_graph_get_nothing() -> None:
    x, terms = logits(6, CLASSES), context()
    with terms:
        F.cross_entropy(x.detach(), labels(6))
        with torch.no_grad():
            F.cross_entropy(x, labels(6))
    assert not terms.added
    assert not terms.refused


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda x: F.mse_loss(x, SOFT), "mse_loss"),
        (lambda x: F.nll_loss(x.log_softmax(1).reshape(6, CLASSES) * 1, labels(6)), "nll_loss"),
        (lambda x: F.nll_loss(x.log_softmax(0), labels(6)), "nll_loss"),
    ],
)
def test_other_losses_are_named(loss: Any, reason: str) -> None:
    x, terms = logits(6, CLASSES), context()
    with terms:
        loss(x).backward()
    assert terms.refused[0].startswith(reason)
    assert not terms.reached


def test_a_weight_that_torch_does_not_pass_on_is_kept() -> None:
    """F.l1_loss passes no weight to a mode, so a naive context would change its value."""
    x, weight = logits(6, CLASSES), torch.linspace(0.1, 2.0, 30).reshape(6, CLASSES)
    with context():
        found = F.l1_loss(x, SOFT, weight=weight)
    assert torch.equal(found, F.l1_loss(x, SOFT, weight=weight))
    assert not torch.equal(found, F.l1_loss(x, SOFT))


def test_a_capture_outside_reads_the_same_losses() -> None:
    x = logits(6, CLASSES)
    with LossCapture() as capture, context():
        F.cross_entropy(x, labels(6))
    torch.testing.assert_close(capture.only().losses, F.cross_entropy(x, labels(6), reduction="none").detach())


def test_the_second_derivative_has_the_term() -> None:
    x = logits(3, CLASSES, dtype=torch.float64)

    def squared_norm(x: Tensor) -> Tensor:
        with context():
            loss = F.cross_entropy(x, labels(3))
        return torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()

    assert torch.autograd.gradcheck(squared_norm, x)


compiled = pytest.mark.filterwarnings(  # torch about its own tracing
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed:UserWarning"
)


@compiled
def test_a_compiled_loss() -> None:
    torch.compiler.reset()
    x = logits(6, CLASSES)

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(2 * x, labels(6))

    wanted = torch.autograd.grad(loss(x) + z_loss(2 * x, C), x)[0]
    with context():
        found = torch.compile(loss, backend="eager")(x)
    torch.testing.assert_close(torch.autograd.grad(found, x)[0], wanted)


@compiled
def test_a_compiled_network_is_compiled_once() -> None:
    torch.compiler.reset()
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    fast, terms, x = torch.compile(lambda x: (2 * x).tanh(), backend=backend), context(), logits(6, CLASSES)
    for _ in range(3):
        with terms:
            loss = F.cross_entropy(fast(x), labels(6))
    assert len(graphs) == 1
    wanted = torch.autograd.grad(F.cross_entropy((2 * x).tanh(), labels(6)) + z_loss((2 * x).tanh(), C), x)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], wanted)
