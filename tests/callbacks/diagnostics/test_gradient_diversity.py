"""GradientDiversity measures the gradients of the module's own losses, in batches of the loader, also of losses by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import GradientDiversity
from lightning_grad.functional import vendi_score
from lightning_grad.testing import make_trainer

CHOSEN = [3, 7, 8, 11, 19, 1, 2]


class Classifies(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))

    def losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByHand(Classifies):
    def losses(self, batch: Any) -> Tensor:
        return (self.net(batch[0]) - 0.3).square().sum(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses(batch).mean()


class Rooted(Classifies):
    """Its loss cannot be separated into samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1]).sqrt()


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(20, 6, generator=generator), torch.arange(20) % 3)


def run(probe: GradientDiversity, kind: type = Classifies, **arguments: Any) -> Any:
    pl.seed_everything(1, verbose=False)
    module = kind()
    trainer = make_trainer(callbacks=[probe], **{"max_epochs": 1, **arguments})
    trainer.fit(module, DataLoader(data(), 4))
    return module.eval()


def expected_of(module: Any) -> tuple[float, Tensor]:
    losses = module.losses(data()[CHOSEN])
    rows = [torch.autograd.grad(loss, list(module.parameters()), retain_graph=True) for loss in losses]
    return vendi_score(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))


def losses_of(module: Any, batch: Any) -> Tensor:
    return module.losses(batch)


@pytest.mark.parametrize(("kind", "loss_fn"), [(Classifies, None), (ByHand, None), (Rooted, losses_of)])
def test_diversity_is_that_of_the_whole_gradients(kind: Any, loss_fn: Any) -> None:
    probe = GradientDiversity(CHOSEN, dim=4096, loss_fn=loss_fn)
    module = run(probe, kind)
    score, cosines = expected_of(module)
    found = probe.record.last
    assert found["g_vendi"] == pytest.approx(score, rel=0.03)
    assert found["share"] == pytest.approx(found["g_vendi"] / len(CHOSEN))
    pairs = (cosines.sum() - len(CHOSEN)) / (len(CHOSEN) * (len(CHOSEN) - 1))
    assert found["mean_cosine"] == pytest.approx(float(pairs), abs=0.02)
    assert found["zero_gradients"] == 0
    module.train()
    assert expected_of(module)[0] != pytest.approx(score, rel=0.03), "the training mode has other gradients"


def test_files(tmp_path: Path) -> None:
    probe = GradientDiversity(CHOSEN, dim=64)
    run(probe, logger=CSVLogger(tmp_path, name="", version=""), max_epochs=2)
    looks = {path.name for path in (tmp_path / "gradient_diversity").iterdir()}
    assert looks == {f"step_{step:08d}_cosines.png" for step in (4, 9)}
    assert (tmp_path / "gradient_diversity.png").is_file()


def test_a_loss_that_cannot_be_separated_is_refused() -> None:
    with pytest.raises(
        (RuntimeError, ValueError), match=r"GradientDiversity needs the loss of each sample\..*set loss_fn="
    ):
        run(GradientDiversity(4), Rooted)
    with pytest.raises(ValueError, match="loss_index and loss_fn would both choose the loss"):
        GradientDiversity(loss_index=0, loss_fn=losses_of)


def test_samples_without_a_gradient_are_counted() -> None:
    class Flat(Classifies):
        def losses(self, batch: Any) -> Tensor:
            return super().losses(batch) * (batch[1] != 0)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.losses(batch).mean()

    probe = GradientDiversity(6, dim=64)
    run(probe, Flat)
    zeros = sum(int(data()[index][1]) == 0 for index in (0, 3, 6, 10, 13, 16))
    assert probe.record.last["zero_gradients"] == zeros > 0
    assert probe.record.last["share"] <= 1


class Vanishing(ByHand):
    """In eval mode, no loss has a gradient that is finite and not zero."""

    factor = 0.0

    def losses(self, batch: Any) -> Tensor:
        return (self.net(batch[0]) * (1 if self.training else self.factor)).square().sum(1)


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_samples_without_any_direction_are_refused(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vanishing, "factor", factor)
    probe = GradientDiversity(4, dim=64)
    with pytest.raises(ValueError, match="needs two samples with a gradient, but only 0 of 4 have one"):
        run(probe, Vanishing)
    assert not probe.record.count, "nothing is logged half"


@pytest.mark.parametrize("samples", [1, [3]])
def test_one_sample_has_no_diversity(samples: Any) -> None:
    with pytest.raises(ValueError, match=r"samples must be at least 2.*got 1"):
        GradientDiversity(samples)
