"""InputGradientLogger shows the gradients of images, features and tokens, and refuses what has none."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import InputGradientLogger
from lightning_grad.functional import input_saliency
from lightning_grad.testing import make_trainer, on_ranks

CLASSES = 3


class Classifies(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Reads(nn.Module):
    """Reads tokens; the embedding of positions is called first, and that of the tokens twice."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.embedding = nn.Embedding(6, 4), nn.Embedding(10, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.places(torch.arange(tokens.shape[1]))
        weights = torch.arange(1.0, tokens.shape[1] + 1)[None, :, None]
        x = (weights * (self.embedding(tokens) + places)).sum(1).tanh()
        return self.head(x + 0.1 * self.embedding(tokens).mean(1).detach())


def images() -> TensorDataset:
    x = torch.randn(12, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, torch.arange(12) % CLASSES)


def convnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, CLASSES))


def run(net: nn.Module, probe: InputGradientLogger, data: Any, module: Any = None, **arguments: Any) -> Any:
    pl.seed_everything(1, verbose=False)
    module = Classifies(net) if module is None else module
    trainer = make_trainer(callbacks=[probe], **{"max_epochs": 1, **arguments})
    trainer.fit(module, DataLoader(data, 4), DataLoader(data, 4))
    return module.eval()


def shown(probe: InputGradientLogger) -> list[Tensor]:
    """Let the probe note the maps of each look."""
    found: list[Tensor] = []
    reading = probe.image_reading
    vars(probe)["image_reading"] = lambda look, images, maps, *rest: (
        found.append(maps) or reading(look, images, maps, *rest)
    )
    return found


@pytest.mark.parametrize("target", ["answer", "label"])
def test_maps_of_images_are_the_input_gradients(target: Any) -> None:
    probe = InputGradientLogger([1, 4, 6], target=target)
    maps = shown(probe)
    module = run(convnet(), probe, images())
    x, y = images()[[1, 4, 6]]
    classes = y if target == "label" else module.net(x).argmax(1)
    expected = input_saliency(lambda inputs: module.net(inputs).gather(1, classes[:, None])[:, 0], x)
    torch.testing.assert_close(maps[-1], expected.amax(1))
    found = probe.record.last
    assert found["gradient_norm"] == pytest.approx(float(expected.flatten(1).norm(dim=1).mean()), rel=1e-5)
    top = expected.flatten(1).topk(5, 1).values.sum(1) / expected.flatten(1).sum(1)
    assert found["top_share"] == pytest.approx(float(top.mean()), rel=1e-5)


def test_tokens_have_the_gradient_of_the_first_embedding(tmp_path: Path) -> None:
    tokens = torch.randint(10, (12, 5), generator=torch.Generator().manual_seed(0))
    probe = InputGradientLogger(3)
    run(Reads(), probe, TensorDataset(tokens, torch.arange(12) % CLASSES), logger=CSVLogger(tmp_path, "", ""))
    mean = probe.kept_looks.kept[-1]["mean"]
    torch.testing.assert_close(mean, torch.arange(1.0, 6) / 5, atol=1e-4, rtol=1e-4)
    looks = tmp_path / "input_gradient_logger"
    rows = list(csv.DictReader((looks / "step_00000002_samples.csv").read_text().splitlines()))
    assert [row["largest at"] for row in rows] == ["4, 3, 2, 1, 0"] * 3
    assert (looks / "step_00000002_maps.png").is_file()
    assert (tmp_path / "input_gradient_logger.png").is_file()


def test_features_have_one_row_each() -> None:
    data = TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % CLASSES)
    net = nn.Linear(4, CLASSES)
    probe = InputGradientLogger(12)
    module = run(net, probe, data)
    answers = module.net(data.tensors[0]).argmax(1)
    rows = module.net.weight.detach().abs()[answers]
    torch.testing.assert_close(probe.kept_looks.kept[-1]["mean"], (rows / rows.amax(1, keepdim=True)).mean(0))


def test_a_series_has_one_value_for_each_time() -> None:
    series = TensorDataset(
        torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(0)), torch.arange(12) % CLASSES
    )
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, CLASSES))
    probe = InputGradientLogger(12)
    module = run(net, probe, series)
    weights = module.net[1].weight.detach().abs()[module.net(series.tensors[0]).argmax(1)]
    rows = weights.view(12, 2, 16).amax(1)
    torch.testing.assert_close(probe.kept_looks.kept[-1]["mean"], (rows / rows.amax(1, keepdim=True)).mean(0))


class Detaches(Classifies):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0].detach()), batch[1])


def test_refusals() -> None:
    net = convnet()
    with pytest.raises(ValueError, match=r"found no gradient of the answers with respect to the input \(3, 2, 5, 5\)"):
        run(net, InputGradientLogger(3), images(), Detaches(net))
    bytes_only = TensorDataset(torch.ones(12, 4, dtype=torch.long), torch.arange(12) % CLASSES)

    class Casts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    with pytest.raises(TypeError, match=r"InputGradientLogger needs an input with a gradient.*Set input_key"):
        run(Casts(4, CLASSES), InputGradientLogger(3), bytes_only)


class Gathers(Classifies):
    """A step that all ranks must run, because it collects their losses."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # Lightning uses a function that newer torch deprecates
            self.losses: Any = self.all_gather(loss.detach())
        return loss


def record_of_a_rank() -> dict[str, Any]:
    probe = InputGradientLogger(samples=4, split="train", figure=False)
    trainer = make_trainer(strategy="ddp", devices=2, callbacks=[probe], max_epochs=1, log_every_n_steps=1)
    trainer.fit(Gathers(convnet()), DataLoader(images(), 6))
    return probe.record.last


def test_a_step_that_all_ranks_must_run() -> None:
    one, other = on_ranks(2, record_of_a_rank, limit=60.0)
    assert one == other
