"""The outer step is torch's Nesterov SGD, and a byte a number comes back with an error of at most half a scale."""

import pytest
import torch

from lightning_grad.functional import int8_bytes, outer_step_, pack_int8, unpack_int8
from lightning_grad.functional.communication.int8_messages import BLOCK


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.0, 0.0), (0.5, 0.0)])
def test_it_is_sgd_with_the_mean_move_as_gradient(lr, momentum):
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
    theirs = [torch.nn.Parameter(weight.clone()) for weight in ours]
    velocities = [torch.zeros_like(weight) for weight in ours]
    optimizer = torch.optim.SGD(theirs, lr, momentum, nesterov=momentum > 0)
    for _ in range(4):
        moves = [torch.randn(weight.shape, generator=generator) for weight in ours]
        for weight, move in zip(theirs, moves, strict=True):
            weight.grad = move.clone()
        optimizer.step()
        outer_step_(ours, moves, velocities if momentum else None, lr, momentum)
    for weight, expected in zip(ours, theirs, strict=True):
        assert torch.equal(weight, expected.detach())


@pytest.mark.parametrize("numel", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_bytes_come_back_up_to_half_a_scale_of_their_block(numel):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    values[-1] *= 1000  # another block does not suffer
    message = pack_int8(values)
    assert message.dtype == torch.uint8
    assert message.numel() == int8_bytes(numel) == numel + 4 * -(-numel // BLOCK)
    found = unpack_int8(message, numel)
    for mine, theirs in zip(values.split(BLOCK), found.split(BLOCK), strict=True):
        assert (mine - theirs).abs().max() <= mine.abs().max() / 254 * (1 + 1e-5)


def test_a_subnormal_value_does_not_change_its_sign():
    value = torch.tensor([190 * 2.0**-149])  # its scale rounds to a third less, so it does not fit into 127 steps
    assert 0 < unpack_int8(pack_int8(value), 1) < value


def test_zeros_stay_zero_and_what_is_not_finite_spoils_its_block_only():
    assert torch.equal(unpack_int8(pack_int8(torch.zeros(5)), 5), torch.zeros(5))
    for bad in (torch.nan, torch.inf):
        values = torch.ones(2 * BLOCK)
        values[3] = bad
        found = unpack_int8(pack_int8(values), 2 * BLOCK)
        assert found[:BLOCK].isnan().all()
        assert torch.equal(found[BLOCK:], torch.ones(BLOCK))
