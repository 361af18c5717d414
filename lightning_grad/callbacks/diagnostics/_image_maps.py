"""Images with a map on top: as pixels for tables, and as figures of one look and of the whole run."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pixels = NDArray[np.uint8]

_LEAST, _MOST = 64, 224  # pixels of the longer side: smaller pictures are enlarged, larger ones reduced
_NARROWEST = 16  # pixels of the shorter side: a picture of one row would not be visible
_MOST_KEPT, _KEPT = 12, 112  # samples in the figure of the run, and pixels of their longer side
_COLUMNS = 8
_LONG = 8  # times as long as wide
_MOST_SHOWN = 64  # samples in the figure of a look
_LONGEST = 21  # characters above an image
_WRONG = "#b3261e"
# From black over red and yellow to white, as red, green and blue at five places.
_HEAT = np.array([[0, 0, 0], [120, 20, 90], [220, 60, 40], [250, 170, 30], [255, 255, 190]], np.float32)


@dataclass(frozen=True)
class MappedImage:
    """One sample with its map.

    Args:
        pixels: The image, uint8 (H, W, 3).
        overlay: The image with the map on top, of the same shape.
        index: Index in the data set.
        answer: What the network answers.
        label: Its label; ``None`` if it has none.
        confidence: Probability of the answer.
        is_wrong: Whether the answer is not the label; names do not tell, because two classes may have the same.
        is_empty: Whether the map is zero everywhere.
    """

    pixels: Pixels
    overlay: Pixels
    index: int
    answer: str
    label: str | None
    confidence: float
    is_wrong: bool
    is_empty: bool

    @property
    def side_by_side(self) -> Pixels:
        """The image and the overlay next to each other, (H, 2 W, 3)."""
        return np.concatenate([self.pixels, self.overlay], 1)


def channels_first(images: Tensor) -> Tensor | None:
    """Return images as (B, C, H, W) from (B, H, W), (B, C, H, W) or (B, H, W, C), or ``None`` if they are none.

    Example:
        >>> channels_first(torch.zeros(2, 8, 8, 3)).shape, channels_first(torch.zeros(2, 8)) is None
        (torch.Size([2, 3, 8, 8]), True)
    """
    if images.dim() == 3:
        return images.unsqueeze(1)
    if images.dim() != 4:
        return None
    return images.movedim(3, 1) if images.shape[3] in (1, 3) and images.shape[1] not in (1, 3) else images


def is_series(inputs: Tensor) -> bool:
    """Return True for inputs (B, C, T) or (B, T, C) that are too long to be images without channels."""
    return inputs.dim() == 3 and max(inputs.shape[1:]) >= _LONG * min(inputs.shape[1:])


def image_pixels(image: Tensor) -> Pixels:
    """Return an image (C, H, W) as pixels (H, W, 3): three channels as colors, others as their mean in gray.

    Each image is scaled from its minimum to its maximum, because the normalization of the data is unknown.
    """
    image = image.detach().float().cpu().nan_to_num()
    image = image if len(image) == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
    low, high = image.min(), image.max()
    scaled = (image - low) / (high - low).clamp(min=1e-12)
    pixels: Pixels = _resized(scaled).mul(255).round().byte().movedim(0, 2).numpy()
    return pixels


def overlaid(pixels: Pixels, values: Tensor, strength: float = 0.6) -> Pixels:
    """Return pixels in gray with a map (H, W) on top, scaled to its maximum; large values are bright and warm."""
    values = values.detach().float().cpu().nan_to_num().clamp(min=0)
    scaled = (values / values.max().clamp(min=1e-12))[None, None]
    shown = F.interpolate(scaled, pixels.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()
    places = np.linspace(0, 1, len(_HEAT))
    heat = np.stack([np.interp(shown, places, _HEAT[:, channel]) for channel in range(3)], -1)
    gray = np.broadcast_to(pixels.mean(-1, keepdims=True), pixels.shape)
    return np.asarray((1 - strength) * gray + strength * heat).round().astype(np.uint8)


def _resized(image: Tensor) -> Tensor:
    """Return an image (C, H, W) of a size that can be seen."""
    height, width = image.shape[1:]
    longer = max(height, width)
    scale = math.ceil(_LEAST / longer) if longer < _LEAST else min(1.0, _MOST / longer)
    size = [max(_NARROWEST, round(side * scale)) for side in (height, width)]
    if scale < 1:
        return F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    return F.interpolate(image[None], size, mode="nearest")[0]


def draw_samples(samples: Sequence[MappedImage], title: str) -> Figure:
    """Draw each image above its overlay; wrong answers have a red frame. Needs matplotlib."""
    if len(samples) > _MOST_SHOWN:
        samples, title = samples[:_MOST_SHOWN], f"{title} (first {_MOST_SHOWN} of {len(samples)})"
    columns = min(len(samples), _COLUMNS)
    rows = math.ceil(len(samples) / columns)
    figure, axes = _grid(2 * rows, max(columns, 4), samples[0].pixels, title, 0.25)
    for place, sample in enumerate(samples):
        row, column = divmod(place, columns)
        above, below = axes[2 * row][column], axes[2 * row + 1][column]
        label = "no label" if sample.label is None else f"label {sample.label}"
        above.set_title(_shortened(f"#{sample.index}, {label}", _LONGEST), fontsize=7, parse_math=False)
        sign = "\N{BALLOT X} " if sample.is_wrong else ""
        color = _WRONG if sample.is_wrong else "black"
        answer = f"{sign}{_shortened(sample.answer, _LONGEST - 8)} ({sample.confidence:.0%})"
        below.set_title(answer, fontsize=7, color=color, parse_math=False)
        _show(above, sample.pixels)
        _show(below, sample.overlay, sample.is_wrong)
        if sample.is_empty:
            below.text(0.5, 0.5, "empty map", transform=below.transAxes, ha="center", va="center", color="white")
    return figure


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"


def draw_run(
    images: Tensor, overlays: Sequence[tuple[str, Tensor, Tensor]], indices: Sequence[int], title: str
) -> Figure:
    """Draw one row for each sample: the image, and its overlay in each kept look. Needs matplotlib.

    Args:
        images: uint8 (B, H, W, 3).
        overlays: For each look its name, the overlays (B, H, W, 3), and whether each answer was wrong, (B,).
        indices: Index of each sample in the data set.
        title: Title in plain text.
    """
    count = len(images)
    figure, axes = _grid(count, 1 + max(len(overlays), 4), images[0].numpy(), title, 0.1, 0.85)
    for row in range(count):
        axes[row][0].text(
            -0.08, 0.5, f"#{indices[row]}", transform=axes[row][0].transAxes, ha="right", va="center", fontsize=8
        )
        _show(axes[row][0], images[row].numpy())
        for column, (name, pictures, wrong) in enumerate(overlays, 1):
            _show(axes[row][column], pictures[row].numpy(), bool(wrong[row]))
            if row == 0:
                axes[0][column].set_title(name, fontsize=8, parse_math=False)
    axes[0][0].set_title("image", fontsize=8)
    return figure


def _grid(
    rows: int, columns: int, like: Pixels, title: str, between: float, side: float = 1.15
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure of equal panels, none of which has anything in it yet."""
    from matplotlib.figure import Figure

    tall, width = side * like.shape[0] / like.shape[1], columns * (side + 0.12) + 0.5
    lines = textwrap.wrap(title, int(11 * width))  # characters of an inch
    figure = Figure(figsize=(width, rows * (tall + between) + 0.75 + 0.2 * len(lines)), layout="constrained")
    figure.suptitle("\n".join(lines), fontsize=11, parse_math=False)
    figure.supxlabel("each map is scaled to its largest value", fontsize=8)
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, [list(row) for row in axes]


def _show(axis: Axes, pixels: Pixels, is_wrong: bool = False) -> None:
    axis.set_axis_on()
    axis.set_xticks([])
    axis.set_yticks([])
    axis.imshow(pixels, interpolation="nearest")
    for spine in axis.spines.values():
        spine.set(visible=is_wrong, color=_WRONG, linewidth=2.5)


def kept_pictures(pictures: Sequence[Pixels]) -> Tensor:
    """Return the first pictures, of equal size, as one small tensor (B, H, W, 3), for checkpoints."""
    kept = torch.from_numpy(np.stack(pictures[:_MOST_KEPT]))
    longer = max(kept.shape[1:3])
    if longer <= _KEPT:
        return kept
    size = [max(1, round(side * _KEPT / longer)) for side in kept.shape[1:3]]
    smaller = F.interpolate(kept.movedim(3, 1).float(), size, mode="bilinear", antialias=True, align_corners=False)
    return smaller.round().clamp(0, 255).byte().movedim(1, 3)
