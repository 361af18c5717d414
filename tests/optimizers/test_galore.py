"""GaLoreAdamW: its equation, its rank and memory, the lazy rule and the packed projector of Q-GaLore."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_grad.functional import gradient_basis, pack_int4, unpack_int4
from lightning_grad.optimizers import GaLoreAdamW
from tests.optimizers.test_optimizers import COMMON, SHAPES, STEPS, after, gradients, start


def rounded(basis: Tensor) -> Tensor:
    """Round a basis of less than 256 entries to 16 levels."""
    with_zeros = torch.cat([basis.flatten(), basis.new_zeros(1)])  # the group is filled up with zeros
    low, step = with_zeros.min(), (with_zeros.max() - with_zeros.min()) / 15
    return low + step * ((basis - low) / step).round()


@pytest.mark.parametrize("bits", [None, 4])
def test_it_takes_the_steps_of_its_equation(bits: Any) -> None:
    """With projections of full size; the signs of singular vectors are those of torch."""
    found = after(lambda w: GaLoreAdamW(w, rank=2, update_gap=3, scale=0.5, projector_bits=bits, **COMMON))
    for at, weight in enumerate(start()):
        w, tall = weight.detach(), SHAPES[at][0] >= SHAPES[at][1]
        w = w if tall else w.T
        m = v = torch.zeros(len(w), 2, dtype=torch.float64)
        for step in range(STEPS):
            g = gradients(step)[at]
            if step % 3 == 0:
                left, _, right = torch.linalg.svd(g, full_matrices=False)
                basis = right[:2].T if tall else left[:, :2]
                basis = rounded(basis) if bits else basis
            low = (g if tall else g.T) @ basis
            m, v = 0.8 * m + 0.2 * low, 0.9 * v + 0.1 * low * low
            adam = m / (1 - 0.8 ** (step + 1)) / ((v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-6)
            w = w * (1 - 0.005) - 0.05 * 0.5 * adam @ basis.T
        assert (found[at] - (w if tall else w.T)).abs().max() < 1e-12


def ranks_of_updates(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> list[int]:
    found = []
    for step in range(4):
        before = weight.detach().clone()
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        found.append(int(torch.linalg.matrix_rank(weight.detach() - before, rtol=1e-3)))
    return found


def test_the_rank_is_the_one_asked_for_where_a_library_may_ignore_it() -> None:
    weight = nn.Parameter(torch.zeros(32, 32))
    assert ranks_of_updates(GaLoreAdamW([weight], rank=4, update_gap=2), weight) == [4] * 4
    po = pytest.importorskip("pytorch_optimizer")
    for group, expected in (({"rank": 4, "update_proj_gap": 2, "scale": 0.25, "projection_type": "std"}, 4), ({}, 32)):
        weight = nn.Parameter(torch.zeros(32, 32))
        found = ranks_of_updates(po.GaLore([{"params": [weight], **group}]), weight)
        assert found == [expected] * 4, "without the rank in its group, the library is Adam"


def test_the_moments_are_kept_when_the_basis_changes() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    optimizer, seen = GaLoreAdamW([weight], rank=1, update_gap=2), []
    for _ in range(5):
        weight.grad = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        optimizer.step()
        state = optimizer.state[weight]
        seen.append((state["decompositions"], state["step"], state["refresh_at"]))
    assert seen == [(1, 1, 2), (1, 2, 2), (2, 3, 4), (2, 4, 4), (3, 5, 6)]
    assert state["exp_avg"].abs().max() == pytest.approx(4 * (1 - 0.9**5))


@pytest.mark.parametrize(("is_steady", "expected"), [(True, (8, 40)), (False, (40, 40))])
def test_the_lazy_rule_saves_decompositions_of_steady_gradients_only(
    is_steady: bool, expected: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    steady = torch.randn(64, 1, generator=generator) @ torch.randn(1, 48, generator=generator)
    weight = nn.Parameter(torch.zeros(64, 48))
    optimizer = GaLoreAdamW([weight], rank=4, update_gap=1, lazy=True, queue=3)
    for _ in range(40):
        noise = torch.randn(64, 48, generator=generator)
        weight.grad = steady + 0.1 * noise if is_steady else noise
        optimizer.step()
    # Steps 0 to 3 compare three times. Then the gap doubles at each refresh: 3, 5, 9, 17, 33.
    assert optimizer.decompositions() == expected
    assert optimizer.notes() == [
        f"GaLoreAdamW decomposed gradients {expected[0]} times, {40 - expected[0]} fewer than with a fixed gap."
    ]


@pytest.mark.parametrize("shape", [(7, 5), (300, 9)])
def test_rounding_to_4_bits_is_off_by_half_a_step(shape: tuple[int, int]) -> None:
    basis = gradient_basis(torch.randn(shape[0], 9, generator=torch.Generator().manual_seed(0)), shape[1])
    packed, step, low = pack_int4(basis)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-basis.numel() // 256) * 128
    back = unpack_int4(packed, step, low, basis.shape)
    assert ((back - basis).abs() <= step.repeat_interleave(256)[: basis.numel()].view(basis.shape) / 2 + 1e-6).all()
    assert not torch.equal(back, basis)
    assert torch.equal(unpack_int4(*pack_int4(torch.full((3,), 0.5)), (3,)), torch.full((3,), 0.5))


def test_a_zero_gradient_and_bfloat16() -> None:
    weight = nn.Parameter(torch.ones(6, 4, dtype=torch.bfloat16))
    optimizer = GaLoreAdamW([weight], rank=2, projector_bits=4, lazy=True)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, torch.ones_like(weight))
    assert {value.dtype for value in optimizer.state[weight].values() if isinstance(value, Tensor)} == {
        torch.bfloat16,
        torch.uint8,
    }
