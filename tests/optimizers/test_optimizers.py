"""Optimizers of matrices, as those of torch: references in float64, resuming, memory, and what they refuse."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_grad.optimizers import DCTAdamW, Frugal, GaLoreAdamW, MatrixOptimizer
from lightning_grad.testing.syncs import NoSync

SHAPES, STEPS = ((6, 4), (4, 9), (3, 4)), 12
COMMON: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
Make = Callable[..., torch.optim.Optimizer]

MAKES: dict[str, Make] = {
    "frugal": lambda weights: Frugal(weights, density=0.4, update_gap=3, **COMMON),
    "frugal-ascending": lambda weights: Frugal(weights, density=0.4, update_gap=2, order="ascending", **COMMON),
    "dct": lambda weights: DCTAdamW(weights, rank=2, update_gap=3, **COMMON),
    "dct-feedback": lambda weights: DCTAdamW(weights, rank=2, error_feedback=True, **COMMON),
    "galore": lambda weights: GaLoreAdamW(weights, rank=2, update_gap=5, **COMMON),
    "q-galore": lambda weights: GaLoreAdamW(
        weights, rank=2, update_gap=1, lazy=True, queue=2, cosine_threshold=0.3, projector_bits=4, **COMMON
    ),
}


def start(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def walk(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    for step in steps:
        for weight, gradient in zip(weights, gradients(step, weights[0].dtype), strict=True):
            weight.grad = gradient
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


def after(make: Make, steps: int = STEPS) -> list[Tensor]:
    weights = start()
    return walk(weights, make(weights), range(steps))


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_close(one: list[Tensor], other: list[Tensor]) -> None:
    assert max((a - b).abs().max().item() for a, b in zip(one, other, strict=True)) < 1e-12


def state_entries(optimizer: torch.optim.Optimizer, *keys: str) -> int:
    return sum(state[key].numel() for state in optimizer.state.values() for key in keys if key in state)


# References


def test_density_1_is_adamw_bit_for_bit() -> None:
    """A block that never changes never loses its moments, although it is chosen again every other step."""
    frugal = after(lambda weights: Frugal(weights, density=1.0, update_gap=2, **COMMON))
    assert_equal(frugal, after(lambda weights: torch.optim.AdamW(weights, foreach=False, **COMMON)))


def test_density_0_is_sign_sgd() -> None:
    optimizer = Frugal(start(), density=0.0, inactive_lr_scale=0.5, **COMMON)
    found = walk(optimizer.param_groups[0]["params"], optimizer, range(STEPS))
    expected = [weight.detach() for weight in start()]
    for step in range(STEPS):
        expected = [w * (1 - 0.005) - 0.025 * g.sign() for w, g in zip(expected, gradients(step), strict=True)]
    assert_close(found, expected)
    assert not optimizer.state


def test_frugal_takes_the_steps_of_its_equation() -> None:
    """A line of all entries, whose block walks on every second step; each entry has its own count since it entered."""
    weights = start()
    optimizer = Frugal(weights, density=0.4, update_gap=2, order="ascending", **COMMON)
    line = torch.cat([weight.detach().flatten() for weight in weights])
    rows = [
        (at, row, columns) for at, (count, columns) in enumerate(SHAPES) for row in range(count) for _ in range(columns)
    ]
    room, pointer, block, before = int(0.4 * len(line)), 0, {}, {}
    moments: dict[int, Any] = {}
    for step in range(STEPS):
        if step % 2 == 0:
            before, block, spent = block, {}, 0
            while spent + rows[pointer % len(line)][2] <= room:
                at, row, columns = rows[pointer % len(line)]
                block.setdefault(at, []).append(row)
                pointer, spent = pointer + columns, spent + columns
            for at in range(len(SHAPES)):
                if step == 0 or block.get(at) != before.get(at):
                    moments[at] = [torch.zeros(SHAPES[at], dtype=torch.float64)] * 2 + [0]
        flat, moved = torch.cat([g.flatten() for g in gradients(step)]), []
        parts = line.split([a * b for a, b in SHAPES]), flat.split([a * b for a, b in SHAPES])
        for at, (w, g) in enumerate(zip(*parts, strict=True)):
            w, g = w.reshape(SHAPES[at]), g.reshape(SHAPES[at])
            m, v, count = moments[at]
            m, v, count = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g, count + 1
            moments[at] = [m, v, count]
            adam = (m / (1 - 0.8**count)) / ((v / (1 - 0.9**count)).sqrt() + 1e-6)
            chosen = torch.zeros(SHAPES[at][0], 1, dtype=torch.bool)
            chosen[block.get(at, [])] = True
            moved.append((w * (1 - 0.005) - 0.05 * torch.where(chosen, adam, g.sign())).flatten())
        line = torch.cat(moved)
    found = torch.cat([weight.flatten() for weight in walk(weights, optimizer, range(STEPS))])
    assert (found - line).abs().max() < 1e-12
    assert pointer > len(line)  # the block went around


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("gap", [1, 3])
def test_dct_adamw_takes_the_steps_of_its_equation(feedback: bool, gap: int) -> None:
    """With moments of full size that are projected into the new subspace, as matrices."""
    found = after(lambda weights: DCTAdamW(weights, rank=2, update_gap=gap, error_feedback=feedback, **COMMON))
    for at, weight in enumerate(start()):
        w, tall = weight.detach(), SHAPES[at][0] >= SHAPES[at][1]
        size = min(SHAPES[at])
        j, k = torch.meshgrid(torch.arange(size).double(), torch.arange(size).double(), indexing="ij")
        q = torch.cos(torch.pi * (j + 0.5) * k / size) * ((2 - (k == 0).double()) / size).sqrt()
        error, coordinates = torch.zeros(SHAPES[at], dtype=torch.float64), torch.zeros(max(SHAPES[at]), size).double()
        m, v = coordinates.clone(), coordinates.clone()
        for step in range(STEPS):
            g = gradients(step)[at] + (error if feedback else 0.0)
            s = (g if tall else g.T) @ q
            if step % gap == 0:
                keep = torch.zeros(size, dtype=torch.bool)
                keep[s.abs().sum(0).sort(descending=True).indices[:2]] = True
            s = s * keep
            m, v = (0.8 * m + 0.2 * s) * keep, (0.9 * v + 0.1 * s * s) * keep
            root = (v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-6
            move, kept = m / (1 - 0.8 ** (step + 1)) / root @ q.T, s @ q.T
            w = w * (1 - 0.005) - 0.05 * (move if tall else move.T)
            error = g - (kept if tall else kept.T)
        assert (found[at] - w).abs().max() < 1e-12


def test_a_rank_of_the_whole_side_is_adamw_in_the_frequencies() -> None:
    weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.float64))
    optimizer = DCTAdamW([weight], rank=4, lr=0.1)
    weight.grad = torch.randn(8, 4, dtype=torch.float64)
    optimizer.step()
    assert torch.linalg.matrix_rank(weight.detach()) == 4


def test_the_rank_of_an_update_is_the_one_asked_for() -> None:
    weight = nn.Parameter(torch.zeros(16, 12))
    optimizer = DCTAdamW([weight], rank=3)
    weight.grad = torch.randn(16, 12)
    optimizer.step()
    assert torch.linalg.matrix_rank(weight.detach()) == 3


# Memory


def test_frugal_keeps_moments_of_its_share_only() -> None:
    weights = start()
    optimizer = Frugal(weights, density=0.4, update_gap=1)
    entries = sum(weight.numel() for weight in weights)
    for step in range(20):
        walk(weights, optimizer, range(step, step + 1))
        assert 0.4 * entries - 9 < state_entries(optimizer, "exp_avg") <= 0.4 * entries
    assert state_entries(optimizer, "exp_avg_sq") == state_entries(optimizer, "exp_avg")


def test_dct_adamw_keeps_moments_of_its_rank() -> None:
    weights = start()
    optimizer = DCTAdamW(weights, rank=2)
    walk(weights, optimizer, range(2))
    assert [tuple(optimizer.state[weight]["exp_avg"].shape) for weight in weights] == [(6, 2), (9, 2), (4, 2)]
    assert {key for state in optimizer.state.values() for key in state} == {"step", "exp_avg", "exp_avg_sq", "columns"}


# Resuming


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("stop", [4, 6])
def test_a_resumed_run_is_the_run(name: str, dtype: torch.dtype, stop: int) -> None:
    make, weights = MAKES[name], start(dtype)
    whole = walk(weights, make(weights), range(STEPS))
    weights = start(dtype)
    optimizer, file = make(weights), io.BytesIO()
    walk(weights, optimizer, range(stop))
    torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    weights = [nn.Parameter(weight.detach()) for weight in loaded["weights"]]
    optimizer = make(weights)
    optimizer.load_state_dict(loaded["optimizer"])
    assert_equal(walk(weights, optimizer, range(stop, STEPS)), whole)
    fresh = make(other := [nn.Parameter(weight.detach()) for weight in loaded["weights"]])
    assert not torch.equal(walk(other, fresh, range(stop, STEPS))[0], whole[0])  # so the state counts


@pytest.mark.parametrize("name", MAKES)
def test_copies_and_pickles_go_on_as_the_original(name: str) -> None:
    weights = start()
    optimizer = MAKES[name](weights)
    walk(weights, optimizer, range(5))
    others = [copy.deepcopy((weights, optimizer)), pickle.loads(pickle.dumps((weights, optimizer)))]
    whole = walk(weights, optimizer, range(5, STEPS))
    for its_weights, other in others:
        assert_equal(walk(its_weights, other, range(5, STEPS)), whole)


def test_seeds_choose_blocks_and_leave_the_global_stream_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (
        after(lambda weights, seed=seed: Frugal(weights, update_gap=1, density=0.4, seed=seed)) for seed in (0, 0, 1)
    )
    assert_equal(first, again)
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


# Steps


@pytest.mark.parametrize("name", MAKES)
def test_a_compiled_step_is_the_step(name: str) -> None:
    weights = start()
    optimizer = MAKES[name](weights)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    try:
        assert_close(walk(weights, optimizer, range(5)), after(MAKES[name], 5))
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("name", [name for name in MAKES if name != "q-galore"])  # compares directions on the host
def test_a_step_never_waits_for_the_device(name: str) -> None:
    weights = start()
    optimizer = MAKES[name](weights)
    walk(weights, optimizer, range(1))
    with NoSync():
        walk(weights, optimizer, range(1, 8))


@pytest.mark.parametrize("name", MAKES)
def test_a_weight_without_gradient_stays_and_a_closure_is_run(name: str) -> None:
    weights = start()
    optimizer = MAKES[name](weights)

    def closure() -> float:
        assert torch.is_grad_enabled()
        weights[1].grad, weights[2].grad = gradients(0)[1:]
        return 3.0

    assert optimizer.step(closure) == 3.0
    moved = [not torch.equal(a, b) for a, b in zip(weights, start(), strict=True)]
    assert moved == [False, True, True]


@pytest.mark.parametrize("name", MAKES)
def test_a_group_may_be_empty(name: str) -> None:
    weights = start()
    walk(weights, MAKES[name]([{"params": []}, {"params": weights}]), range(STEPS))
    assert_equal([weight.detach() for weight in weights], after(MAKES[name]))


@pytest.mark.parametrize("name", MAKES)
def test_steps_without_any_gradient_do_not_count(name: str) -> None:
    """A callback that skips a step sets all gradients to None, and AdamW does not count such a step."""
    weights = start()
    optimizer = MAKES[name](weights)
    for step in range(STEPS):
        walk(weights, optimizer, range(step, step + 1))
        optimizer.zero_grad()
        optimizer.step()
    assert_equal([weight.detach() for weight in weights], after(MAKES[name]))


@pytest.mark.parametrize("name", MAKES)
def test_rates_of_a_scheduler_and_of_groups_count(name: str) -> None:
    weights = start()
    optimizer = MAKES[name]([{"params": weights[:1], "lr": 0.0}, {"params": weights[1:]}])
    walk(weights, optimizer, range(2))
    assert torch.equal(weights[0], start()[0])
    moved = weights[1].detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    walk(weights, optimizer, range(2, 4))
    assert torch.equal(weights[1], moved)


# Errors


@pytest.mark.parametrize("kind", [Frugal, DCTAdamW, GaLoreAdamW])
@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.zeros(8), r"takes only real matrices; parameter 0 of a group has shape \(8,\)\. Give other"),
        (torch.zeros(2, 3, 3, 3), r"has shape \(2, 3, 3, 3\)\."),
        (torch.zeros(0, 5), r"parameter 0 of a group has shape \(0, 5\)\."),
        (torch.zeros(2, 2, dtype=torch.complex64), r"has shape \(2, 2\) and type torch.complex64"),
    ],
)
def test_what_is_no_matrix_is_refused(kind: type[MatrixOptimizer], weight: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind([nn.Parameter(weight)])
    optimizer = kind([nn.Parameter(torch.zeros(9, 9))], **({} if kind is Frugal else {"rank": 4}))
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [nn.Parameter(weight)]})
    assert len(optimizer.param_groups) == 1


def test_the_name_of_a_parameter_is_used_if_it_is_known() -> None:
    with pytest.raises(ValueError, match="matrices; bias has shape"):
        Frugal(nn.Linear(4, 4).named_parameters())


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Frugal, {"lr": -1.0}, "lr must be at least 0"),
        (Frugal, {"betas": (0.9, 1.0)}, "betas must be two numbers, each at least 0 and below 1"),
        (Frugal, {"eps": float("nan")}, "eps must be at least 0"),
        (Frugal, {"density": 1.5}, "density must be from 0 to 1; got 1.5"),
        (Frugal, {"density": 0.1}, r"density=0.1 of 64 entries has no room for a row of 8. Use at least 0.12, or 0"),
        (Frugal, {"update_gap": 0}, "update_gap must be at least 1"),
        (Frugal, {"inactive_lr_scale": -0.1}, "inactive_lr_scale must be at least 0"),
        (Frugal, {"order": "ascend"}, "order must be .* Did you mean 'ascending'"),
        (DCTAdamW, {"rank": 0}, "rank must be at least 1"),
        (DCTAdamW, {"update_gap": 0, "rank": 2}, "update_gap must be at least 1"),
        (DCTAdamW, {"weight_decay": -1.0}, "weight_decay must be at least 0"),
        (GaLoreAdamW, {"rank": 0}, "rank must be at least 1"),
        (GaLoreAdamW, {"rank": 2, "update_gap": 0}, "update_gap must be at least 1"),
        (GaLoreAdamW, {"rank": 2, "scale": float("inf")}, "scale must be finite"),
        (GaLoreAdamW, {"rank": 2, "queue": 0}, "queue must be at least 1"),
        (GaLoreAdamW, {"rank": 2, "cosine_threshold": 1.5}, "cosine_threshold must be from 0 to 1"),
        (GaLoreAdamW, {"rank": 2, "projector_bits": 8}, "projector_bits must be 4 or None; got 8"),
    ],
)
def test_bad_options_raise(kind: type[MatrixOptimizer], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind([nn.Parameter(torch.zeros(8, 8))], **options)


def test_a_rank_above_the_shape_is_lowered_and_named() -> None:
    layer = nn.ParameterDict({"wide": torch.zeros(2, 8), "square": torch.zeros(8, 8)})
    with pytest.warns(UserWarning, match=r"lowers rank=4 to the smaller side of wide \(2, 8\)\.$"):
        optimizer = DCTAdamW(layer.named_parameters(), rank=4)
    layer["wide"].grad = torch.ones(2, 8)
    optimizer.step()
    assert optimizer.state[layer["wide"]]["exp_avg"].shape == (8, 2)
    with warnings.catch_warnings(action="error"):
        DCTAdamW([layer["square"]], rank=4)


def test_of_many_lowered_ranks_the_first_are_named_and_all_are_counted() -> None:
    with pytest.warns(
        UserWarning, match=r"smaller side of (parameter \d of a group \(2, 2\), ){8}\.\.\. \(30 matrices\)\.$"
    ):
        GaLoreAdamW([nn.Parameter(torch.zeros(2, 2)) for _ in range(30)], rank=4)


@pytest.mark.parametrize("kind", [Frugal, DCTAdamW, GaLoreAdamW])
def test_sparse_gradients_raise(kind: type[MatrixOptimizer]) -> None:
    layer = nn.Embedding(9, 9, sparse=True)
    optimizer = kind(layer.parameters(), **({} if kind is Frugal else {"rank": 2}))
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not take sparse gradients"):
        optimizer.step()
