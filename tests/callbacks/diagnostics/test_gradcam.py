"""GradCAMLogger shows the right layer and the right maps, in figures and tables, and refuses what has no maps."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import GradCAMLogger
from lightning_grad.callbacks.diagnostics._image_maps import MappedImage, draw_samples
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


class Attention(nn.Module):
    """An attention written out, whose layers see queries, keys and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.norm, self.softmax = nn.Linear(8, 24), nn.Identity(), nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.project(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        weights = self.softmax(self.norm(queries) @ self.norm(keys).mT)
        return (weights @ values).transpose(1, 2).flatten(2)


class Mixes(Attention):
    """The same, by a name that does not tell."""


class WrittenOut(nn.Module):
    """A vision transformer whose class token reads the patches in an attention written out."""

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(1, 8, 2, 2), nn.Parameter(torch.randn(1, 1, 8))
        self.before, self.attention, self.head = nn.LayerNorm(8), attention(), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), 1, 8), tokens], 1)
        return self.head((tokens + self.attention(self.before(tokens)))[:, 0])


class Shares(nn.Module):
    """Calls one activation for maps and for features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.head = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.act(self.first(x)).mean((2, 3))))


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
        (lambda: WrittenOut(Attention), "net.before"),
        (lambda: WrittenOut(Mixes), "net.attention.project"),  # but not the keys and weights, of four dimensions
        (lambda: Shares(), "net.act"),
    ],
    ids=["convolutions", "residual", "container", "transformer", "class token", "attention", "unnamed", "shared"],
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


class Twice(Classifies):
    """Its second loss is only logged, and calls the network again."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 0.5 * super().training_step([batch[0].flip(3), batch[1]], batch_idx)


def test_a_layer_that_another_loss_calls_again_is_explained_by_the_loss_that_is_asked_for() -> None:
    probe = Keeps(samples=3, layer="net.0", loss_index=0)
    module = run(convolutional(), probe, module=Twice(convolutional())).eval()
    images, _ = data()[[0, 8, 16]]
    with OutputCapture(module.net[0]) as capture:
        score = module.net(images).amax(1).sum()
    (gradient,) = torch.autograd.grad(score, capture.output)
    torch.testing.assert_close(probe.last["maps"], activation_maps(capture.output.detach(), gradient))


class Bytes(Classifies):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0] / 255, batch[1]], batch_idx)


def test_images_of_bytes_are_shown_but_get_no_noise() -> None:
    images, labels = data().tensors
    of = TensorDataset((127 + 50 * images).clamp(0, 255).byte(), labels)
    probe = Keeps(samples=3, input_key=0)
    net = convolutional()
    run(net, probe, of=of, module=Bytes(net))
    assert probe.last["images"].dtype == torch.uint8
    assert probe.record.last["empty_maps"] < 3
    with pytest.raises(TypeError, match=r"cannot add noise to images of torch\.uint8.*set method='gradcam\+\+'"):
        run(net, GradCAMLogger("smooth_gradcam++", samples=3), of=of, module=Bytes(net))


class Unlabelled(Classifies):
    """Reads of each label whether there is one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1].masked_fill(batch[1] == 0, -100))


def test_samples_without_a_label_count_neither_as_right_nor_as_wrong(tmp_path: Path) -> None:
    net = convolutional()
    probe = Keeps(samples=[0, 4, 1], class_names=["same"] * CLASSES)
    module = run(net, probe, module=Unlabelled(net), logger=CSVLogger(tmp_path, "", "")).eval()
    answer = module.net(data()[[1]][0]).argmax().item()
    assert probe.record.last["accuracy"] == float(answer == 1)
    rows = list(csv.DictReader((tmp_path / "keeps" / "step_00000002_samples.csv").read_text().splitlines()))
    assert [(row["label"], row["right"]) for row in rows] == [("", ""), ("", ""), ("same", str(answer == 1))]
    assert probe.kept_looks.kept[-1]["wrong"].tolist() == [False, False, answer != 1]  # though the names are equal


def test_pictures_in_checkpoints_are_few_and_small() -> None:
    images = torch.randn(24, 1, 300, 200, generator=torch.Generator().manual_seed(0))
    probe = GradCAMLogger(samples=16)
    run(convolutional(), probe, of=TensorDataset(images, torch.arange(24) % CLASSES))
    kept = probe.kept_looks.kept[-1]
    assert kept["images"].shape == kept["overlays"].shape == (12, 112, 74, 3)
    assert len(kept["indices"]) == 16


def test_titles_and_names_lie_within_the_figure_and_empty_maps_are_marked() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    samples = [MappedImage(pixels, pixels, 9, "an answer of many words", "a label of many words", 0.5, True, True)]
    figure = draw_samples(
        samples * 5, "GradCAMLogger of net.backbone.encoder.stages.3.layers.2.activation, a long title"
    )
    figure.canvas.draw()
    places = [axis.title.get_window_extent() for axis in figure.axes if axis.get_title()]
    places.append(figure._suptitle.get_window_extent())
    assert all(place.x0 >= 0 and place.x1 <= figure.bbox.width for place in places)
    above = sorted((place.x0, place.x1) for place in places[:-1] if place.y0 > 0.7 * figure.bbox.height)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(above))
    assert [text.get_text() for axis in figure.axes for text in axis.texts] == ["empty map"] * 5


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


class Frozen(nn.Module):
    """Runs its convolution without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused, self.head = convolutional()[:-1], nn.Conv2d(1, 1, 1), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x)
        return self.head(x)


REFUSED: list[Any] = [
    (
        lambda: (Frozen(), None),
        {},
        r"found maps of the layers, but no gradient.*Freeze layers by requires_grad_\(False\)",
    ),
    (lambda: (Frozen(), None), {"layer": "net.unused"}, "the step calls no layer 'net.unused'"),
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
    series = TensorDataset(torch.randn(24, 4, 40), torch.arange(24) % CLASSES)
    net = nn.Sequential(nn.Conv1d(4, 4, 5), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    with pytest.raises(TypeError, match=r"needs images \(B, C, H, W\) in the batch; got \(3, 4, 40\)"):
        run(net, GradCAMLogger(samples=3), of=series)


def outputs(module: Any, batch: Any) -> Any:
    return module.net(batch[0]), batch[1]


def test_outputs_fn_shows_what_a_loss_by_hand_hides() -> None:
    net = convolutional()
    probe = Keeps(samples=3, outputs_fn=outputs)
    run(net, probe, module=Hides(net))
    assert probe.last["layer"] == "net.1"
