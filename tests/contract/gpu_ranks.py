"""What each rank does in a test of strategies on two devices; on GPUs ``torchrun`` starts them, with NCCL."""

import sys

import torch
import torch.distributed as dist

from lightning_grad.testing import assert_identical, fit
from tests.contract.strategy_settings import CANONICAL
from tests.strategies.fits import outcome


def check(name: str, device: str) -> None:
    """Train in compressed form, neutrally and by plain DDP, and compare.

    Args:
        name: Class of the strategy.
        device: ``"cpu"`` or ``"gpu"``.
    """
    (scheme,) = [scheme for scheme in CANONICAL if scheme.name == name]
    ran = [
        fit([], scheme.module(), True, strategy=strategy, devices=2, accelerator=device, max_epochs=2)
        for strategy in (scheme.build(), scheme.build_neutral(), "ddp")
    ]
    compressed, neutral, plain = (outcome(*one)["module"] for one in ran)
    assert_identical(neutral, plain)
    assert ran[0][0].strategy.ledger.sent_bytes < ran[0][0].strategy.ledger.dense_bytes
    names = [name for name, _ in ran[0][1].named_parameters()]
    for weight in (compressed[name].to(ran[0][0].strategy.root_device) for name in names):
        assert weight.isfinite().all()
        others = [torch.empty_like(weight) for _ in range(2)]
        dist.all_gather(others, weight)
        assert torch.equal(*others), "both ranks have the same weights"
    assert any(not torch.equal(compressed[name], plain[name]) for name in names)


if __name__ == "__main__":
    check(*sys.argv[1:])
