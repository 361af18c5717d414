"""Each optimizer with a short name makes the update of its paper, in float64, to the last digits.

The problem is noisy least squares in a matrix and a vector. Both sides compute gradients at their
own weights. The error is the distance of the two ends, relative to the way from the start.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_grad.callbacks.optimizers._names import NAMES, find_class
from lightning_grad.callbacks.optimizers._refusals import refuse_new
from lightning_grad.functional.shuffling import hashed_seed
from lightning_grad.functional.torch_version import TORCH
from tests.callbacks.optimizers import references
from tests.callbacks.optimizers.references import each

STEPS, SHAPES = 40, ((6, 8), (8,))
EXACT = 1e-12
COMMON: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
PLAIN = {key: COMMON[key] for key in ("lr", "weight_decay")}
OF_TORCH = ("adamw", "adam", "sgd")  # as users have always had them
OF_THIS_PACKAGE = ("galore-adamw", "q-galore", "frugal", "dct-adamw")  # tests/optimizers compares these


@dataclass(frozen=True)
class Case:
    """An optimizer with options that differ from its defaults, and its reference.

    Args:
        options: Arguments of the constructor.
        reference: The same in the words of the reference.
        paper: What differs in the paper's own equation, if the library deviates from it.
        deviation: The largest error against that, which the card states.
        other: A reference that the optimizer must not agree with.
    """

    options: dict[str, Any]
    reference: Callable[..., list[Tensor]]
    other: Callable[..., list[Tensor]]
    paper: dict[str, Any] | None = None
    deviation: float = 0.0
    shapes: tuple[tuple[int, ...], ...] = SHAPES


def of(update: Callable[..., Tensor], **options: Any) -> Callable[..., list[Tensor]]:
    def updated(*args: Any, **changes: Any) -> list[Tensor]:
        return each(functools.partial(update, **{**options, **changes}))(*args)

    return updated


ADAMW = of(references.adamw, eps=1e-8, **COMMON)
_PROJECTED: dict[str, Any] = {"delta": 2.0, "wd_ratio": 0.2, "eps": 1e-8}
_SPAM: dict[str, Any] = {"eps": 1e-6, **COMMON}
_CAME: dict[str, Any] = {**COMMON, "betas": (0.8, 0.95, 0.99), "eps1": 1e-20, "eps2": 1e-12}
_SOAP: dict[str, Any] = {**COMMON, "shampoo_beta": 0.9, "eps": 1e-8}
_PRODIGY: dict[str, Any] = {**COMMON, "lr": 0.5, "eps": 1e-8, "d0": 1e-3, "d_coef": 0.8}
_MUON: dict[str, Any] = {**PLAIN, "momentum": 0.9}
_FREE: dict[str, Any] = {**PLAIN, "eps": 1e-8}

CASES: dict[str, Case] = {
    "lion": Case(COMMON, of(references.lion, **COMMON), ADAMW),
    "adabelief": Case({**COMMON, "eps": 1e-8}, of(references.adabelief, eps=1e-8, **COMMON), ADAMW),
    # AdamP, diffGrad and SPAM add eps to the root before its bias correction.
    "adamp": Case(
        {**COMMON, **_PROJECTED},
        of(references.adamp, late_eps=True, **COMMON, **_PROJECTED),
        of(references.adamp, late_eps=True, **COMMON, **{**_PROJECTED, "delta": 0.0}),
        {"late_eps": False},
        1e-5,
    ),
    "sgdp": Case(
        {**PLAIN, **_PROJECTED, "momentum": 0.8},
        of(references.sgdp, momentum=0.8, **PLAIN, **_PROJECTED),
        of(references.sgdp, momentum=0.8, **PLAIN, **{**_PROJECTED, "delta": 0.0}),
    ),
    "diffgrad": Case(
        {**COMMON, "eps": 1e-8},
        of(references.diffgrad, eps=1e-8, late_eps=True, inner_eps=1e-15, **COMMON),
        ADAMW,
        {"late_eps": False, "inner_eps": 0.0},
        1e-6,
    ),
    "spam": Case(
        {**_SPAM, "update_proj_gap": 15, "warmup_epoch": 6, "grad_accu_steps": 4, "threshold": 3},
        of(references.spam, interval=15, warmup=6, quiet=4, threshold=3, late_eps=True, **_SPAM),
        of(references.spam, interval=15, warmup=6, quiet=4, threshold=1e9, late_eps=True, **_SPAM),
        {"late_eps": False},
        1e-5,
    ),
    # torch bounds the variance where the paper adds eps to the squared gradients, which differs
    # only for squared gradients of that size.
    "adafactor": Case(
        {**PLAIN, "beta2_decay": -0.7, "d": 1.2, "eps": (1e-15, 1e-2)},
        of(references.adafactor, beta2_decay=-0.7, d=1.2, eps=(1e-30, 1e-2), **PLAIN),
        of(references.adafactor, beta2_decay=-0.7, d=1e9, eps=(1e-30, 1e-2), **PLAIN),
    ),
    "came": Case({**_CAME, "clip_threshold": 0.8}, of(references.came, d=0.8, **_CAME), ADAMW),
    # The released code orders eigenvectors by eigenvalue, and decomposes in float32. A square
    # matrix, because eigenvectors of a singular one are not unique.
    "soap": Case(
        {**_SOAP, "precondition_frequency": 4},
        of(references.soap, frequency=4, sort=True, qr_dtype=torch.float32, **_SOAP),
        ADAMW,
        {"sort": True, "qr_dtype": torch.float64},
        1e-5,
        ((6, 6), (8,)),
    ),
    # The released code multiplies eps by the new estimate of the distance. The library keeps the
    # two sums of the estimate in float32.
    "prodigy": Case(
        _PRODIGY,
        functools.partial(references.prodigy, new_distance=True, sum_dtype=torch.float32, **_PRODIGY),
        ADAMW,
        {"new_distance": False, "sum_dtype": torch.float64},
        1e-6,
    ),
    # torch orthogonalizes in bfloat16.
    "muon": Case(
        _MUON,
        of(references.muon, match_rms=True, dtype=torch.bfloat16, **_MUON),
        of(references.muon, match_rms=False, dtype=torch.bfloat16, **_MUON),
        {"dtype": torch.float64},
        1e-2,
        ((6, 8), (8, 6)),
    ),
    "schedulefree-adamw": Case(
        {**_FREE, "betas": (0.8, 0.95), "warmup_steps": 5},
        of(references.schedulefree, beta=0.8, beta2=0.95, warmup=5, **_FREE),
        of(references.schedulefree, beta=0.8, beta2=0.95, warmup=1, **_FREE),
    ),
    "adahessian": Case(
        {**COMMON, "eps": 1e-4},
        of(references.adahessian, eps=1e-4, **COMMON),
        of(references.adamw, eps=1e-4, **COMMON),
    ),
    "sophia": Case(
        {**COMMON, "gamma": 0.05, "eps": 1e-6, "update_period": 3},
        of(references.sophia, gamma=0.05, eps=1e-6, period=3, **COMMON),
        of(references.sophia, gamma=0.05, eps=1e-6, period=4, **COMMON),
    ),
}


def problem(shapes: tuple[tuple[int, ...], ...]) -> tuple[list[Tensor], Callable[[list[Tensor], int], Tensor]]:
    """Return start weights and a loss of weights and step."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start = [draw(*shape) for shape in shapes]
    factors = [draw(shape[0], shape[0]) / 3 for shape in shapes]
    noise = [[0.3 * draw(*shape) for shape in shapes] for _ in range(STEPS)]

    def loss(weights: list[Tensor], step: int) -> Tensor:
        rows = zip(weights, factors, noise[step], strict=True)
        return sum(((a @ w).square() / 2).sum() + (w * n).sum() for w, a, n in rows)  # type: ignore[return-value]

    return start, loss


def draws(name: str, weights: list[Tensor], step: int) -> list[Tensor]:
    """Return the random vectors of a step of AdaHessian or Sophia."""
    generator = torch.Generator().manual_seed(hashed_seed(0, step))
    if name == "sophia":
        return [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    return [torch.randint(0, 2, w.shape, generator=generator, dtype=w.dtype) * 2 - 1 for w in weights]


@functools.cache
def way_of_library(name: str) -> list[Tensor]:
    case = CASES[name]
    start, loss = problem(case.shapes)
    weights = [torch.nn.Parameter(weight.clone()) for weight in start]
    optimizer: Any = find_class(name)(weights, **{**NAMES[name].options, **case.options})
    for step in range(STEPS):
        if hasattr(optimizer, "train"):
            optimizer.train()
        optimizer.zero_grad()
        value = loss(weights, step)
        gradients = torch.autograd.grad(value, weights, create_graph=getattr(optimizer, "needs_graph", False))
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return [weight.detach() for weight in weights]


def way_of_reference(name: str, update: Callable[..., list[Tensor]], **changes: Any) -> list[Tensor]:
    start, loss = problem(CASES[name].shapes)
    weights, states = start, [{} for _ in start]  # type: ignore[var-annotated]
    for step in range(STEPS):
        leaves = [weight.clone().requires_grad_() for weight in weights]
        gradients = torch.autograd.grad(loss(leaves, step), leaves, create_graph=True)
        if name in ("adahessian", "sophia"):
            vectors = draws(name, leaves, step)
            products = torch.autograd.grad(gradients, leaves, vectors)
            for state, product, vector in zip(states, products, vectors, strict=True):
                state["hessian"] = product * vector
        weights = update(weights, [gradient.detach() for gradient in gradients], states, step + 1, **changes)
    return [state.get("x", weight) for state, weight in zip(states, weights, strict=True)]


def error(name: str, update: Callable[..., list[Tensor]], **changes: Any) -> float:
    start, _ = problem(CASES[name].shapes)
    rows = zip(way_of_library(name), way_of_reference(name, update, **changes), start, strict=True)
    return max(float((a - b).norm() / (b - from_).norm()) for a, b, from_ in rows)


def skip_if_missing(name: str) -> None:
    pytest.importorskip(NAMES[name].path.partition(".")[0])
    if name == "muon" and TORCH < (2, 9):
        pytest.skip("torch has no Muon")


def test_every_short_name_has_a_reference() -> None:
    assert {*CASES, *OF_TORCH, *OF_THIS_PACKAGE} == set(NAMES)


@pytest.mark.parametrize("name", CASES)
def test_update_is_that_of_the_reference(name: str) -> None:
    skip_if_missing(name)
    case = CASES[name]
    assert error(name, case.reference) <= EXACT
    assert error(name, case.other) > 10 * max(EXACT, case.deviation), "another update would pass too"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.paper])
def test_deviation_from_the_paper_is_small(name: str) -> None:
    skip_if_missing(name)
    case = CASES[name]
    assert EXACT < error(name, case.reference, **(case.paper or {})) <= case.deviation


def test_prodigy_takes_one_rate() -> None:
    """The library moves every group by the rate of the first one, without a word."""
    skip_if_missing("prodigy")
    library: Any = find_class("prodigy")
    ways = []
    for rate in (1.0, 0.1):
        weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        optimizer = library([{"params": weights[:1], "lr": 1.0}, {"params": weights[1:], "lr": rate}])
        for weight in weights:
            weight.grad = torch.ones(3)
        optimizer.step()
        ways.append(weights[1].detach())
    assert torch.equal(*ways)
    groups = [{"params": [torch.zeros(1)], "lr": rate} for rate in (1e-3, 1e-4)]
    with pytest.raises(ValueError, match=r"for groups with learning rates 0\.001, 0\.0001\. Give all groups one"):
        refuse_new("OptimizerSwap", library, torch.optim.AdamW(groups))


@pytest.mark.parametrize("name", [name for name, entry in NAMES.items() if entry.takes_complex])
def test_a_complex_entry_is_two_real_ones(name: str) -> None:
    skip_if_missing(name)
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(6, 3, dtype=torch.complex128, generator=generator)
    ends = []
    for view in (torch.clone, lambda numbers: torch.view_as_real(numbers).flatten()):
        weight = torch.nn.Parameter(view(numbers[0]))
        optimizer: Any = find_class(name)([weight], lr=0.1)
        for gradient in numbers[1:]:
            weight.grad = view(gradient)
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(torch.view_as_real(ends[0]).flatten(), ends[1])
