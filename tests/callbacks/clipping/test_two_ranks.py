"""Two ranks that share a batch train as one process that has it all."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_grad.callbacks import (
    AdaptiveGradientClipping,
    AutoClip,
    GradientNoise,
    LayerwiseClipping,
    NormClipping,
    ZClip,
)
from tests.callbacks.clipping import Regression, pairs, small_net, train


class Shared(Regression):
    """Each rank takes its half of the batch, so that the mean of the gradients is that of the whole batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rank, ranks = self.global_rank, self.trainer.world_size
        x, y = (part.chunk(ranks)[rank] for part in batch)
        return F.mse_loss(self.net(x), y)


class Save(pl.Callback):
    """Every rank writes its weights."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(dict(pl_module.state_dict()), self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


CASES = {
    "NormClipping": lambda: NormClipping(0.3),
    "ZClip": lambda: ZClip(z_threshold=0.5, warmup_steps=3, max_norm=None),
    "AutoClip": lambda: AutoClip(30.0, window=4),
    "GradientNoise": lambda: GradientNoise(eta=0.1),
    "AdaptiveGradientClipping": lambda: AdaptiveGradientClipping(0.05, head=None),
    "LayerwiseClipping": lambda: LayerwiseClipping(0.3),
}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(name: str, tmp_path: Any) -> None:
    alone = Shared(small_net())
    train([CASES[name](), Save(tmp_path)], alone, pairs(12))
    train(
        [CASES[name](), Save(tmp_path)],
        Shared(small_net()),
        pairs(12),
        strategy="ddp_fork",
        devices=2,
        use_distributed_sampler=False,
    )
    one, first, second = (torch.load(tmp_path / f"{run}.pt") for run in ("1-0", "2-0", "2-1"))
    plain = Shared(small_net())
    train([], plain, pairs(12))
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-6)
    assert (plain.state_dict()["net.0.weight"] - one["net.0.weight"]).abs().max() > 1e-4, "the rule did something"
