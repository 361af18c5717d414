"""GradCAMLogger shows the right layer and the right maps, in figures and tables, and refuses what has no maps."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import GradCAMLogger
from lightning_grad.functional import OutputCapture, activation_maps
from lightning_grad.testing import make_trainer

SIZE, CLASSES = 8, 4


class Classifies(pl.LightningModule):
    """Trains any network; its validation shows no loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Residual(nn.Module):
    """A block whose output is that of no layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(4, 4, 1)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class Transformer(nn.Module):
    """A vision transformer that averages its tokens, or reads its class token."""

    def __init__(self, has_class_token: bool) -> None:
        super().__init__()
        self.has_class_token = has_class_token
        self.patches = nn.Conv2d(1, 8, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        if self.has_class_token:
            tokens = torch.cat([self.token.expand(len(x), 1, 8), tokens], 1)
        tokens = self.encoder(tokens)
        return self.head(tokens[:, 0] if self.has_class_token else tokens.mean(1))


def convolutional(*last: nn.Module) -> nn.Sequential:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)]
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), *last, *head)


def data(channels: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, channels, SIZE, SIZE, generator=generator)
    return TensorDataset(images, torch.arange(24) % CLASSES)


class Keeps(GradCAMLogger):
    """Keeps the maps of its last look."""

    def _reading(self, look: Any, images: Tensor, maps: Tensor, found: Any) -> Any:
        self.last = {"maps": maps, "layer": self._layer, "images": images.clone(), "found": found}
        return super()._reading(look, images, maps, found)


def run(net: nn.Module, *callbacks: Any, of: TensorDataset | None = None, module: Any = None, **arguments: Any) -> Any:
    pl.seed_everything(1, verbose=False)
    module = Classifies(net) if module is None else module
    trainer = make_trainer(callbacks=list(callbacks), **{"max_epochs": 1, **arguments})
    loader = DataLoader(data() if of is None else of, 8)
    trainer.fit(module, loader, loader)
    return module


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (lambda: convolutional(), "net.1"),
        (lambda: convolutional(Residual()), "net.2"),
        (lambda: convolutional(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())), "net.2.1"),
        (lambda: Transformer(False), "net.encoder.layers.1"),
        # Its head reads the class token only, so the patches last count as keys and values of the last attention.
        (lambda: Transformer(True), "net.encoder.layers.1.norm1"),
    ],
    ids=["convolutions", "residual", "container", "transformer", "class token"],
)
def test_the_last_layer_that_matters_is_shown(make: Any, layer: str) -> None:
    pl.seed_everything(1, verbose=False)
    probe = Keeps(samples=3)
    run(make(), probe)
    assert probe.last["layer"] == layer
    assert probe.last["maps"].shape == (3, SIZE, SIZE)
    assert probe.record.last["empty_maps"] < 3


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
def test_maps_are_those_of_the_network_at_the_end_of_the_epoch(method: Any) -> None:
    probe = Keeps(method, "net.0", samples=[5, 7, 20], target="label")
    module = run(convolutional(), probe).eval()
    images, labels = data()[[5, 7, 20]]
    assert torch.equal(probe.last["images"], images)
    with OutputCapture(module.net[0]) as capture:
        logits = module.net(images)
    (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), capture.output)
    expected = activation_maps(capture.output.detach(), gradient, method)  # of the size of the images
    torch.testing.assert_close(probe.last["maps"], expected)
    before = Keeps(method, "net.0", samples=[5, 7, 20], target="label", every_n_steps=1)
    run(convolutional(), before, max_steps=1)
    assert not torch.allclose(before.last["maps"], expected), "the maps change in the epoch"


def test_smooth_maps_use_noisy_copies_of_the_images() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(256, 8), nn.Tanh(), nn.Linear(8, CLASSES)
    )
    maps = []
    for arguments in (
        {"method": "gradcam++"},
        {"noise_std": 1e-6},
        {"noise_std": 2.0},
        {"noise_std": 2.0, "noisy_copies": 1},
    ):
        probe = Keeps(**{"method": "smooth_gradcam++", "samples": 3, **arguments})
        torch.manual_seed(0)
        for layer in net:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        run(net, probe)
        maps.append(probe.last["maps"] / probe.last["maps"].amax())
    torch.testing.assert_close(maps[0], maps[1], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(maps[0], maps[2], atol=1e-2)
    assert not torch.allclose(maps[2], maps[3], atol=1e-2)


def test_files_of_a_run(tmp_path: Path) -> None:
    probe = GradCAMLogger(samples=3, class_names=["cat", "dog"])
    run(convolutional(), probe, of=data(), max_epochs=2, logger=CSVLogger(tmp_path, name="", version=""))
    names = {path.name for path in (tmp_path / "grad_cam_logger").iterdir()}
    assert names == {f"step_{step:08d}_{end}" for step in (2, 5) for end in ("maps.png", "samples.csv")}
    rows = list(csv.DictReader((tmp_path / "grad_cam_logger" / "step_00000005_samples.csv").read_text().splitlines()))
    assert [(row["index"], row["label"]) for row in rows] == [("0", "cat"), ("8", "cat"), ("16", "cat")]
    assert {row["right"] for row in rows} <= {"True", "False"}
    assert sum(row["right"] == "True" for row in rows) / 3 == pytest.approx(probe.record.last["accuracy"])
    assert (tmp_path / "grad_cam_logger.png").is_file()
    assert len(probe.kept_looks.kept) == 2
    assert probe.kept_looks.kept[0]["overlays"].shape == (3, 64, 64, 3)


def test_colors_and_channels_last_images() -> None:
    class Permuted(Classifies):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(self.net(batch[0].movedim(3, 1)), batch[1])

    first = convolutional()
    first[0] = nn.Conv2d(3, 4, 3, padding=1)
    images, labels = data(3).tensors
    probe = Keeps(samples=2)
    run(first, probe, module=Permuted(first), of=TensorDataset(images.movedim(1, 3), labels))
    assert probe.last["images"].shape == (2, 3, SIZE, SIZE)


# Refusals, all after the first batch.


class Regresses(Classifies):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0])[:, 0], batch[1].float())


class Hides(Classifies):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -self.net(batch[0]).log_softmax(1)[:, 0].mean()


REFUSED: list[Any] = [
    (lambda: (nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), None), {}, "no layer has one for images of 8 x 8"),
    (lambda: (convolutional(), None), {"layer": "net.9"}, "has no layer 'net.9'. Choose a name"),
    (lambda: (convolutional(), None), {"layer": "net.3"}, r"the layer 'net.3' returns \(3, 4\) for images of 8 x 8"),
    (lambda: (convolutional(), Regresses), {}, r"mse_loss with input \(3,\).*Set outputs_fn="),
    (lambda: (convolutional(), Hides), {}, "GradCAMLogger must capture the loss of each sample"),
    (lambda: (convolutional(), None), {"samples": 99}, "would inspect 99 samples, but the validation set has 24"),
    (lambda: (convolutional(), None), {"input_key": "1"}, "input_key='1' must name a floating-point tensor"),
]


@pytest.mark.parametrize(("make", "arguments", "words"), REFUSED)
def test_refusals(make: Any, arguments: dict[str, Any], words: str) -> None:
    net, kind = make()
    with pytest.raises((ValueError, RuntimeError), match=words) as caught:
        run(net, GradCAMLogger(**{"samples": 3, **arguments}), module=kind and kind(net))
    assert "GradCAMLogger" in str(caught.value)


def test_what_is_no_image_is_refused() -> None:
    flat = TensorDataset(torch.randn(24, 5), torch.arange(24) % CLASSES)
    with pytest.raises(TypeError, match=r"needs images \(B, C, H, W\) in the batch; got \(3, 5\)"):
        run(nn.Linear(5, CLASSES), GradCAMLogger(samples=3), of=flat)


def outputs(module: Any, batch: Any) -> Any:
    return module.net(batch[0]), batch[1]


def test_outputs_fn_shows_what_a_loss_by_hand_hides() -> None:
    net = convolutional()
    probe = Keeps(samples=3, outputs_fn=outputs)
    run(net, probe, module=Hides(net))
    assert probe.last["layer"] == "net.1"
