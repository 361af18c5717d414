"""Loss capture in company: transforms, other modes, checkpoints, compiled code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError, checkpoint

from lightning_grad.functional import LossCapture
from tests.cases import cases
from tests.functional.gradients.spellings import (
    CHOICES,
    REWEIGHTABLE,
    SPELLINGS,
    WEIGHTS,
    B,
    C,
    classes,
    normal,
    reweighted,
    same_bits,
    uniform,
)


def test_inside_transforms_of_torch_func() -> None:
    x = normal(B, C)
    gradient = torch.func.vmap(torch.func.grad(lambda a, b: F.cross_entropy(a[None], b[None])))
    with LossCapture() as capture:
        found = gradient(x, CHOICES)
    torch.testing.assert_close(found, gradient(x, CHOICES))
    assert not capture.calls
    with pytest.raises(RuntimeError, match=r"cross_entropy \(it was called inside a transform of torch.func\)"):
        capture.only()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by torch's own import
def test_forward_mode() -> None:
    from torch.autograd import forward_ad

    x, direction = normal(B, C), normal(B, C)
    with forward_ad.dual_level():
        with LossCapture() as capture:
            value = F.cross_entropy(forward_ad.make_dual(x, direction), CHOICES)
        tangent = forward_ad.unpack_dual(value).tangent
    gradient = (x.softmax(1) - F.one_hot(CHOICES, C)) / B
    torch.testing.assert_close(tangent, (gradient * direction).sum())
    torch.testing.assert_close(capture.only().losses, F.cross_entropy(x, CHOICES, reduction="none"))


def test_meta_tensors() -> None:
    with LossCapture() as capture:
        value = F.cross_entropy(normal(B, C).to("meta"), CHOICES.to("meta"))
    assert value.is_meta
    assert capture.only().losses.shape == (B,)


def test_an_empty_batch() -> None:
    with LossCapture() as capture:
        assert F.cross_entropy(normal(0, C), classes(0)).isnan()
    assert capture.only().losses.shape == (0,)


@pytest.mark.parametrize("run", [lambda loss: loss.backward(), torch.autograd.backward])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_loss_counts_once(use_reentrant: bool, run: Callable[[Tensor], None]) -> None:
    """Also when backward, which computes it a second time, runs within the context, as in manual optimization."""
    x = normal(B, C).requires_grad_()
    with LossCapture() as capture:
        run(checkpoint(lambda a: F.cross_entropy(2 * a, CHOICES), x, use_reentrant=use_reentrant))
    assert len(capture.calls) == 1
    found = x.grad
    x.grad = None
    F.cross_entropy(2 * x, CHOICES).backward()
    torch.testing.assert_close(found, x.grad)


def test_a_checkpointed_loss_cannot_be_reweighted() -> None:
    """The recomputation runs outside the context, and torch notices that it saves something else."""
    x = normal(B, C).requires_grad_()
    with LossCapture(reweight=lambda call: torch.ones(call.samples)):
        loss = checkpoint(lambda a: F.cross_entropy(2 * a, CHOICES), x, use_reentrant=False)
    with pytest.raises(CheckpointError):
        loss.backward()


def test_captures_may_be_nested() -> None:
    x = normal(B, C).requires_grad_()
    value = F.cross_entropy(x, CHOICES)
    with LossCapture() as outer, LossCapture(keep_graph=True) as inner:
        assert same_bits(F.cross_entropy(x, CHOICES), value)
    assert len(outer.calls) == len(inner.calls) == 1
    for first, second in ((None, lambda call: WEIGHTS), (lambda call: WEIGHTS, None)):
        with LossCapture(reweight=first) as outer, LossCapture(reweight=second) as inner:
            found = F.cross_entropy(x, CHOICES)
        torch.testing.assert_close(found, reweighted(F.cross_entropy, x, CHOICES))
        assert len(outer.calls) == len(inner.calls) == 1
        torch.testing.assert_close(outer.only().losses, inner.only().losses)


def test_a_device_context_inside() -> None:
    with LossCapture() as capture, torch.device("cpu"):
        F.cross_entropy(torch.randn(B, C), CHOICES)
    assert len(capture.calls) == 1


class NoSync(TorchDispatchMode):
    """Raises where the host would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "_unique2", "masked_select"), f"the host waits in {name}"
        return func(*args, **(kwargs or {}))


@cases("reweight", [None, lambda call: torch.ones(call.samples)])
@cases("name", [name for name in REWEIGHTABLE if name != "gaussian_nll_loss, a variance each"])
def test_the_host_does_not_wait(name: str, reweight: Any) -> None:
    """Left out is a loss that waits by itself, for a look whether a variance is negative."""
    spelling = SPELLINGS[name]
    with NoSync(), LossCapture(spelling.samples, reweight):
        spelling.loss(spelling.input, spelling.target)


def test_other_functions_pass_through() -> None:
    x = normal(B, C)
    with LossCapture() as capture:
        found = torch.stack([x.relu().sum(dim=1), torch.full((B,), 2.0, dtype=torch.float32), x[:, 0]])
        inplace = x.clone().add_(1)
    assert torch.equal(found, torch.stack([x.relu().sum(1), torch.full((B,), 2.0), x[:, 0]]))
    assert torch.equal(inplace, x + 1)
    assert not capture.calls
    assert not capture.unread


compiled = pytest.mark.filterwarnings(  # torch about its own tracing
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:.*should not be instantiated:DeprecationWarning",
)


class Counter:
    """A backend that runs what it is given, and counts how often it is asked."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph


@compiled
def test_a_compiled_network_inside_the_step() -> None:
    torch._dynamo.reset()
    network, backend = nn.Sequential(nn.Linear(C, 8), nn.ReLU(), nn.Linear(8, C)), Counter()
    fast, x = torch.compile(network, backend=backend), normal(B, C)
    for _ in range(4):
        with LossCapture() as capture:
            loss = F.cross_entropy(fast(x), CHOICES)
        loss.backward()
        torch.testing.assert_close(capture.only().losses, F.cross_entropy(network(x), CHOICES, reduction="none"))
    assert backend.graphs == 1, "compiled anew by each capture"


@compiled
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_loss_inside_a_compiled_function_is_reweighted(backend: str) -> None:
    torch._dynamo.reset()
    fast = torch.compile(lambda a, t: F.cross_entropy(2 * a, t), backend=backend)
    x = normal(B, C).requires_grad_()
    expected = reweighted(F.cross_entropy, 2 * x, CHOICES)
    for _ in range(2):
        found = reweighted(fast, x, CHOICES)
        torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0])


@compiled
def test_weights_that_torch_drops_are_not_dropped_in_a_compiled_function() -> None:
    torch._dynamo.reset()
    x, t, w = normal(B, C), normal(B, C), uniform(B, C)
    fast = torch.compile(lambda a, b: F.l1_loss(a, b, weight=w), backend="eager")
    with LossCapture() as capture:
        found = fast(x, t)
    torch.testing.assert_close(found, (w * (x - t).abs()).sum() / w.sum())
    torch.testing.assert_close(capture.only().losses, (w * (x - t).abs()).sum(1) / w.sum(1))


@compiled
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_loss_inside_a_compiled_function(fullgraph: bool) -> None:
    torch._dynamo.reset()
    head, backend, x = nn.Linear(C, C), Counter(), normal(B, C)
    fast = torch.compile(lambda a, t: F.cross_entropy(head(a), t), backend=backend, fullgraph=fullgraph)
    for _ in range(4):
        with LossCapture() as capture:
            loss = fast(x, CHOICES)
        loss.backward()
        call = capture.only()
        torch.testing.assert_close(call.losses, F.cross_entropy(head(x), CHOICES, reduction="none"))
        torch.testing.assert_close(call.input, head(x))
    assert backend.graphs == 1
