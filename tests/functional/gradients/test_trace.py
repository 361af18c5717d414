"""The trace beside LossCapture, precision, accumulation, checkpointing, compilation, DDP, bad input, and the naive ways."""

from __future__ import annotations

import gc
import os
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_grad.functional import InseparableLossError, LossCapture, LossTrace, Terms, per_sample_gradient_norms
from lightning_grad.functional.gradients.follow import RowTracker
from lightning_grad.functional.gradients.record import Record
from lightning_grad.functional.gradients.rows import Rows
from lightning_grad.functional.plain_tensors import plain_tensor
from tests.cases import cases
from tests.functional.gradients.catalogue import B, H, Net, V, entropies, errors, make_batch
from tests.functional.gradients.losses import CASES, one_tensor_thrice
from tests.functional.gradients.losses_of_torch import mse
from tests.functional.gradients.spellings import SPELLINGS
from tests.functional.gradients.test_losses import assert_close, gradients, setting, traced

# LossCapture.


@cases("name", SPELLINGS)
def test_losses_of_torch_are_bit_for_bit_those_of_loss_capture(name: str) -> None:
    spelling = SPELLINGS[name]
    network_output = spelling.input.clone().requires_grad_()
    samples = spelling.samples or (len(network_output) if network_output.dim() > 1 or spelling.target.dim() else 1)
    with LossCapture(spelling.samples) as capture:
        spelling.loss(network_output * 1.0, spelling.target)
    with LossTrace(samples) as trace:
        loss = spelling.loss(network_output * 1.0, spelling.target)
    expected = capture.only().losses
    assert len(trace.calls) == len(capture.calls) == 1
    torch.testing.assert_close(trace.calls[0].losses, expected, rtol=0, atol=0, equal_nan=True)
    if loss.dim() == 0 and network_output.dim() > 1:
        terms = trace.terms(loss)
        if capture.only().options["reduction"] in ("mean", "batchmean"):
            torch.testing.assert_close(terms.own, expected, rtol=0, atol=0, equal_nan=True)


# Gradients.


def test_weights_work_with_accumulation_several_backward_passes_and_removal() -> None:
    net, batch = setting()
    weights = torch.rand(B, dtype=torch.float64)
    unweighted = gradients(net, CASES["vae"].loss(net, batch))
    expected = gradients(net, (weights * CASES["vae"].shares(net, batch)).mean())
    loss, terms = traced(CASES["vae"].loss, net, batch, values=False)
    handle = terms.weight_(weights)
    (loss / 4).backward(retain_graph=True)
    (loss / 4).backward(retain_graph=True)
    for parameter, one in zip(net.parameters(), expected, strict=True):
        assert_close(torch.zeros_like(one) if parameter.grad is None else parameter.grad, one / 2)
    handle.remove()
    for found, one in zip(gradients(net, loss), unweighted, strict=True):
        assert torch.equal(found, one)


def test_the_weighted_gradient_can_be_differentiated() -> None:
    net, batch = setting()
    weights = torch.rand(B, dtype=torch.float64)

    def norm_of(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, list(net.lin.parameters()), create_graph=True)
        return sum((g**2).sum() for g in found)

    loss, terms = traced(mse, net, batch, values=False)
    terms.weight_(weights)
    expected = torch.autograd.grad(norm_of((weights * errors(net, batch)).mean()), list(net.lin.parameters()))
    for found, one in zip(torch.autograd.grad(norm_of(loss), list(net.lin.parameters())), expected, strict=True):
        assert_close(found, one)


def test_one_hot_weights_give_the_gradient_of_one_sample() -> None:
    net, batch = setting()
    for i in range(B):
        loss, terms = traced(CASES["masked_mean"].loss, net, batch, values=False)
        terms.weight_(torch.eye(B, dtype=torch.float64)[i])
        expected = gradients(net, CASES["masked_mean"].shares(net, batch)[i] / B)
        for found, one in zip(gradients(net, loss), expected, strict=True):
            assert_close(found, one)


@pytest.mark.parametrize("name", ["vae", "quantile", "masked_each", "two_heads", "elbo"])
def test_norms_of_the_gradients_of_single_samples(name: str) -> None:
    net, batch = setting()
    case = CASES[name]

    def shares() -> Tensor:
        with LossTrace(B, keep_graph=True) as trace:
            loss = case.loss(net, batch)
        return trace.terms(loss).shares

    expected = []
    for i in range(B):
        found = gradients(net, case.shares(net, batch)[i])
        expected.append(torch.stack([(g**2).sum() for g in found]).sum().sqrt())
    assert_close(per_sample_gradient_norms(net, shares), torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaled_loss(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x, y = nn.Linear(H, H), torch.randn(B, H), torch.randn(B, H)
    weights = torch.rand(B)

    def each() -> Tensor:
        with torch.autocast("cpu", dtype):
            z = net(x)
        return (z - y).abs().mean(1) + F.mse_loss(z.float(), y, reduction="none").mean(1)

    def step() -> Tensor:
        with torch.autocast("cpu", dtype):
            z = net(x)
            return (z - y).abs().mean() + F.mse_loss(z, y)

    with LossTrace(B) as trace:
        loss = step()
    terms = trace.terms(loss)
    torch.testing.assert_close(terms.shares, each().detach(), rtol=1e-5, atol=1e-5)
    terms.weight_(torch.ones(B))
    scale = 1024.0
    for found, unweighted in zip(gradients(net, loss * scale), gradients(net, step() * scale), strict=True):
        assert torch.equal(found, unweighted)
    with LossTrace(B) as trace:
        loss = step()
    trace.terms(loss).weight_(weights)
    expected = gradients(net, (weights * each()).mean() * scale)
    for found, one in zip(gradients(net, loss * scale), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=2e-2, atol=2e-2 * scale / B)


def test_bfloat16_weights_of_the_network_keep_their_dtype() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(H, H, dtype=torch.bfloat16), torch.randn(B, H, dtype=torch.bfloat16)
    with LossTrace(B) as trace:
        loss = net(x).abs().mean()
    terms = trace.terms(loss)
    assert terms.shares.dtype == torch.float32
    terms.weight_(torch.rand(B))
    assert all(g.dtype == torch.bfloat16 for g in gradients(net, loss))


def test_a_loss_in_halves_is_no_difference() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, H, dtype=torch.bfloat16, requires_grad=True)
    with LossTrace(6) as trace:
        loss = (x + 3).abs().mean().float() + (x.float() ** 2).mean()
    terms = trace.terms(loss)
    assert terms.dtype == torch.bfloat16
    expected = ((x.float() + 3).abs() + x.float() ** 2).reshape(6, -1).mean(1)
    torch.testing.assert_close(terms.shares, expected.detach(), rtol=2e-2, atol=2e-2)


def test_a_sample_without_positions_may_have_a_weight_of_nan() -> None:
    net, batch = setting()
    targets = batch.t.clone()
    targets[1] = -100
    loss, terms = traced(lambda n, b: F.cross_entropy(n.tokens(b.s).reshape(-1, V), targets.reshape(-1)), net, batch)
    assert terms.own.isnan().tolist() == [i == 1 for i in range(B)]
    terms.weight_(terms.own)
    assert all(g.isfinite().all() for g in gradients(net, loss))


def test_weights_in_a_compiled_network() -> None:
    torch._dynamo.reset()
    ran = []

    def backend(module: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            ran.append(len(args))
            return module.forward(*args)

        return run

    net, batch = setting()
    compiled = torch.compile(net.lin, backend=backend, fullgraph=True)
    weights = torch.rand(B, dtype=torch.float64)
    for _ in range(2):
        with LossTrace(B) as trace:
            loss = (compiled(batch.x) - batch.y).pow(2).mean()
        terms = trace.terms(loss)
        assert_close(terms.shares, errors(net, batch).detach())
    assert len(ran) == 2
    terms.weight_(weights)
    expected = gradients(net, (weights * errors(net, batch)).mean())
    for found, one in zip(gradients(net, loss), expected, strict=True):
        assert_close(found, one)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_loss_inside_compiled_code_is_refused() -> None:
    torch._dynamo.reset()
    net, batch = setting()
    loss_of = torch.compile(lambda z, y: ((z - y).abs() + 1).log().mean(), backend="aot_eager")
    with LossTrace(B) as trace:
        loss = loss_of(net(batch.x), batch.y)
    with pytest.raises(InseparableLossError, match="CompiledFunctionBackward"):
        trace.terms(loss)


def test_weights_with_distributed_data_parallel() -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29731")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        net, batch = setting()
        weights = torch.rand(B, dtype=torch.float64)

        class Step(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self) -> Tensor:
                with LossTrace(B) as trace:
                    loss = CASES["vae"].loss(self.net, batch)
                trace.terms(loss).weight_(weights)
                return loss

        expected = gradients(net, (weights * CASES["vae"].shares(net, batch)).mean())
        parallel = nn.parallel.DistributedDataParallel(Step(), find_unused_parameters=True)
        parallel().backward()
        for parameter, one in zip(net.parameters(), expected, strict=True):
            assert_close(torch.zeros_like(one) if parameter.grad is None else parameter.grad, one)
    finally:
        torch.distributed.destroy_process_group()


def test_a_transform_of_torch_func_inside_the_step() -> None:
    net, batch = setting()
    inner = torch.func.vmap(lambda z, y: (z - y).pow(2).mean())

    loss, terms = traced(lambda n, b: inner(n(b.x), b.y).mean(), net, batch)
    assert_close(terms.shares, errors(net, batch).detach())
    assert torch.equal(loss, inner(net(batch.x), batch.y).mean())


class Stubborn(Tensor):
    """A class that takes the functions of the step, and refuses all others."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in ("linear", "sub", "abs", "mean", "add", "mse_loss", "cat", "mul"):
            raise TypeError(f"{func.__name__} is not for this class")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_class_that_refuses_functions_is_not_asked() -> None:
    net, batch = setting()
    weights = torch.rand(B, dtype=torch.float64)
    x, y = batch.x.as_subclass(Stubborn), batch.y.as_subclass(Stubborn)
    with LossTrace(B) as trace:
        z = net(torch.cat([x, x]))
        loss = (z - torch.cat([y, y])).abs().mean() + F.mse_loss(z, torch.cat([y, y]))
    terms = trace.terms(loss)
    expected = CASES["mae"].shares(net, batch) + errors(net, batch)
    assert_close(terms.shares, expected.detach())
    terms.weight_(weights)
    for found, one in zip(gradients(net, plain_tensor(loss)), gradients(net, (weights * expected).mean()), strict=True):
        assert_close(found, one)


# Later batches, other shapes.


@cases("samples", [1, 2, 3, 8])
@cases(
    "name",
    [
        "masked_mean",
        "chunk_sums",
        "two_views_of_tokens",
        "vae",
        "time_first_inside",
        "weight_decay",
        "running_sum",
        "heads_in_a_dict",
    ],
)
def test_other_numbers_of_samples(name: str, samples: int) -> None:
    """Also where the length of a sequence is that of the batch, which without proven terms is taken for it."""
    net, batch = Net(), make_batch(4, samples, time=8)
    case = CASES[name]
    _, proven = traced(case.loss, net, make_batch())
    with LossTrace(samples) as trace:
        loss = case.loss(net, batch)
    terms = trace.terms(loss, like=proven)
    assert_close(terms.shares, case.shares(net, batch).detach())


def test_keys_do_not_depend_on_shapes() -> None:
    net = Net()
    for name in ("chunk_sums", "masked_mean", "vae", "two_heads"):
        keys = [traced(CASES[name].loss, net, make_batch(1, n, t), samples=n)[1].keys for n, t in ((6, 5), (5, 9))]
        assert keys[0] == keys[1]


# What is left behind.


def test_nothing_stays_alive_and_nothing_is_left_on_tensors() -> None:
    net, batch = setting()
    z = net(torch.cat([batch.x, batch.y]))
    with LossTrace(B) as trace:
        z = net(torch.cat([batch.x, batch.y]))
        loss = z.pow(2).mean()
    terms: Terms | None = trace.terms(loss)
    assert terms is not None
    assert not z.__dict__
    assert not batch.x.__dict__
    alive = weakref.ref(z)
    del z, loss, trace, terms
    gc.collect()
    assert alive() is None


def test_released_terms_keep_their_values_and_no_graph() -> None:
    net, batch = setting()
    with LossTrace(B) as trace:
        z = net(batch.x)
        loss = z.pow(2).mean()
    terms = trace.terms(loss)
    terms.release()
    alive, shares = weakref.ref(z), z.detach().pow(2).mean(1)
    del z, loss, trace
    gc.collect()
    assert alive() is None
    assert_close(terms.shares, shares)
    with pytest.raises(RuntimeError, match="Trace another step"):
        terms.weight_(torch.ones(B))


def test_rows_of_an_old_step_do_not_haunt_the_next() -> None:
    net, batch = setting()
    kept: list[Tensor] = []

    def step(n: Any, b: Any) -> Tensor:
        out = n(b.x[b.y[:, 0].argsort()])
        kept.append(out)
        return out.pow(2).mean()

    traced(step, net, batch)
    _, terms = traced(lambda n, b: kept[0].pow(2).mean(), net, batch)
    assert_close(terms.shares, kept[0].pow(2).mean(1).detach())  # by the shape rule: this step moved nothing


def test_the_id_of_a_tensor_that_is_gone_says_nothing_of_another() -> None:
    tracker = RowTracker(Record(B, {}))
    gone, other = torch.zeros(B, 2), torch.zeros(B, 2)
    tracker.set(gone, Rows(axis=1, length=2))
    assert tracker.may_know((1, gone), {})
    tracker.moved[id(other)] = tracker.moved.pop(id(gone))
    del gone
    assert not tracker.may_know((other,), {"out": None})
    assert not tracker.moved


def test_the_error_has_its_parts_and_survives_pickling() -> None:
    net, batch = setting()
    with pytest.raises(InseparableLossError) as caught:
        traced(lambda n, b: mse(n, b).sqrt(), net, batch)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.function, error.location) == ("sqrt", caught.value.location)
    assert str(error) == str(caught.value)
    assert caught.value.location.startswith("test_trace.py:")


# Bad input.


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (None, "got NoneType"),
        ({"logits": torch.ones(2)}, "got dict"),
        (torch.ones(()), r"got a tensor \(\) that does not require grad"),
        (torch.ones(3, requires_grad=True) * 2, r"got a tensor \(3,\)"),
    ],
)
def test_what_is_no_loss_is_refused(loss: Any, words: str) -> None:
    with LossTrace(2) as trace:
        pass
    with pytest.raises(ValueError, match=words):
        trace.terms(loss)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="samples must be at least 1; got 0"):
        LossTrace(0)
    net, batch = setting()
    _, terms = traced(mse, net, batch, values=False)
    with pytest.raises(RuntimeError, match="no values"):
        _ = terms.shares
    with pytest.raises(ValueError, match=r"shape \(6,\); got \(5,\)"):
        terms.weight_(torch.ones(5))
    with pytest.raises(ValueError, match="got list"):
        terms.weight_([1.0] * B)  # type: ignore[arg-type]


def test_a_difference_from_the_returned_loss_is_never_ignored() -> None:
    """A value that changes behind the back of autograd's version counter."""
    net, batch = setting()
    with LossTrace(B) as trace:
        each = errors(net, batch)
        loss = each.mean()
    each.data[0] += 1.0
    with pytest.raises(InseparableLossError, match=r"add up to .* but the step returned"):
        trace.terms(loss)


def test_the_value_of_the_weighted_loss() -> None:
    net, batch = setting()
    weights = torch.rand(B, dtype=torch.float64)
    _, terms = traced(CASES["weight_decay"].loss, net, batch)
    expected = (weights * CASES["weight_decay"].shares(net, batch)).mean() + CASES["weight_decay"].constant(net, batch)
    assert_close(terms.weighted_loss(weights), expected.detach())


# The naive way to weight: a hook on each tensor, instead of on each edge.


def test_hooks_on_tensors_would_weight_twice_what_feeds_two_terms() -> None:
    net, batch = setting()
    weights = torch.rand(B, dtype=torch.float64)
    expected = gradients(net, (weights * CASES["one_tensor_thrice"].shares(net, batch)).mean())
    with LossTrace(B) as trace:
        loss = one_tensor_thrice(net, batch)
    terms = trace.terms(loss)
    tensors = {
        id(seen[0]): seen[0]
        for edge, seen in trace._record.seen.items()
        if seen and edge in {c.edge for c in terms._walk.cuts}
    }
    for tensor in tensors.values():
        tensor.register_hook(lambda g: g * weights)
    naive = gradients(net, loss)
    assert max(float((a - b).abs().max()) for a, b in zip(naive, expected, strict=True)) > 1e-3


def test_a_checkpoint_under_the_trace_repeats_in_backward() -> None:
    net, batch = setting()
    weights = torch.rand(B, dtype=torch.float64)
    loss, terms = traced(lambda n, b: F.cross_entropy(checkpoint(n.lin, b.x, use_reentrant=False), b.c), net, batch)
    terms.weight_(weights)
    expected = gradients(net, (weights * entropies(net, batch)).mean())
    for found, one in zip(gradients(net, loss), expected, strict=True):
        assert_close(found, one)
