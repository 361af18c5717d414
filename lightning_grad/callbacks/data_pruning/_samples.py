"""Representation of a sample in tables and figures: the input of a data set item as a picture and as text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import ConcatDataset

_LARGEST_SIDE, _SMALLEST_SIDE = 192, 5  # pixels: larger pictures are scaled down, smaller arrays are not pictures
_MOST_CHARACTERS, _MOST_IDS = 600, 40


@dataclass(frozen=True)
class Sample:
    """One sample in a table or figure.

    Args:
        index: Its index in the data set.
        rank: Its rank by score, 0 for the highest.
        score: Its score.
        label: Name or number of its class, ``None`` if unknown.
        prediction: Name or number of the predicted class, ``None`` if unknown.
        wrong: Whether label and prediction are known and differ.
        kept: Whether training continues with it.
        picture: Its input as bytes (H, W) or (H, W, 3); ``None`` if it is not an image.
        text: Its input as text.
    """

    index: int
    rank: int
    score: float
    label: int | str | None
    prediction: int | str | None
    wrong: bool
    kept: bool
    picture: NDArray[np.uint8] | None
    text: str

    @property
    def sign(self) -> str:
        """Sign before the prediction: right, wrong, or an arrow if the label is unknown."""
        if self.label is None:
            return "\N{RIGHTWARDS ARROW}"
        return "\N{BALLOT X}" if self.wrong else "\N{CHECK MARK}"


Groups = tuple[Sequence[Sample], Sequence[Sample]]  # those with the highest and the lowest scores
OF_HARDNESS = ("The hardest samples ({}), hardest first", "The easiest samples ({}), easiest last")
OF_INFLUENCE = (
    "The most influential samples ({}), most influential first",
    "The least influential samples ({}), least influential last",
)


def view_of(item: Any) -> tuple[NDArray[np.uint8] | None, str]:
    """Return the input in a data set item as a picture, or ``None`` if it is not an image, and as text.

    Example:
        >>> picture, text = view_of((torch.rand(3, 8, 6), 1))
        >>> picture.shape, text
        ((8, 6, 3), 'shape (3, 8, 6)')
        >>> view_of({"input_ids": torch.tensor([12, 7, 9]), "label": 1})
        (None, 'ids 12 7 9')
    """
    found = list(_inputs(item))
    if not found:
        return None, f"a {type(item).__name__}"
    # Some data sets put the label first: prefer a text, an image or an array over a single number.
    value = next((value for value in found if isinstance(value, str) or _is_pil(value) or value.ndim), found[0])
    if isinstance(value, str):
        # A lone surrogate cannot be encoded as UTF-8, so replace it.
        return None, shortened(" ".join(value.split()).encode(errors="replace").decode())
    if _is_pil(value):
        return _picture_of_pil(value), f"{value.width} x {value.height} pixels"
    array = _array(value)
    return _picture(array), _words(array)


def _inputs(item: Any) -> Iterator[Any]:
    if isinstance(item, (Tensor, np.ndarray, str)) or _is_pil(item):
        yield item
    elif isinstance(item, list) and item and all(isinstance(part, int) for part in item):
        yield torch.tensor(item)
    elif isinstance(item, (list, tuple, Mapping)):
        for part in item.values() if isinstance(item, Mapping) else item:
            yield from _inputs(part)


def _is_pil(value: Any) -> bool:
    return hasattr(value, "getbands") and hasattr(value, "convert")


def _array(value: Any) -> NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype in (torch.bfloat16, torch.float16) else value.numpy()
    return np.asarray(value)


def _words(array: NDArray[Any]) -> str:
    if array.dtype.kind in "iu" and array.size == max(array.shape, default=1):
        shown = " ".join(map(str, array.ravel()[:_MOST_IDS].tolist()))
        return f"ids {shown}" + (f" ... ({array.size})" if array.size > _MOST_IDS else "")
    return f"shape {array.shape}"


def shortened(text: str, most: int = _MOST_CHARACTERS) -> str:
    """Return the text, cut to at most ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _picture_of_pil(image: Any) -> NDArray[np.uint8] | None:
    if image.mode in ("1", "I", "F", "I;16", "I;16B"):
        return _picture(np.asarray(image))
    shown = image if image.mode in ("L", "RGB") else image.convert("RGB")
    return _smaller(np.asarray(shown, dtype=np.uint8))


def _picture(array: NDArray[Any]) -> NDArray[np.uint8] | None:
    """Return an array as a picture, scaled from its minimum to its maximum; ``None`` if it is not an image.

    Accepts (H, W), channels first and channels last; an alpha channel is dropped. Non-finite values are clipped.
    """
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] in (1, 3, 4):
        array = array[..., 0] if array.shape[-1] == 1 else array[..., :3]
    elif array.ndim != 2:
        return None
    if array.dtype.kind not in "fiub" or min(array.shape[:2]) < _SMALLEST_SIDE:
        return None
    values = array.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return _smaller(np.rint((values - low) / ((high - low) or 1.0) * 255).astype(np.uint8))


def _smaller(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    factor = max(height, width) / _LARGEST_SIDE
    if factor <= 1:
        return pixels
    planes = torch.from_numpy(np.array(pixels, dtype=np.float32)).reshape(1, height, width, -1).movedim(-1, 1)
    size = (max(1, round(height / factor)), max(1, round(width / factor)))
    small = F.interpolate(planes, size, mode="area")[0].movedim(0, -1).round().byte().numpy()
    return np.asarray(small[..., 0] if pixels.ndim == 2 else small)


def class_names_of(dataset: Any) -> list[str] | None:
    """Return the class names in the ``classes`` attribute of a data set, as in torchvision, or ``None``.

    Unwraps data sets with an attribute ``dataset``, such as ``Subset``, and a ``ConcatDataset`` whose parts agree.

    Example:
        >>> letters = torch.utils.data.TensorDataset(torch.zeros(2))
        >>> letters.classes = ["a", "b"]
        >>> class_names_of(torch.utils.data.Subset(letters, [0])), class_names_of([1, 2])
        (['a', 'b'], None)
    """
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, (list, tuple)):
        return [", ".join(name) if isinstance(name, tuple) else str(name) for name in classes]
    if isinstance(dataset, ConcatDataset):
        first, *others = (class_names_of(part) for part in dataset.datasets)
        return first if all(other == first for other in others) else None
    inner = getattr(dataset, "dataset", None)
    return None if inner is None else class_names_of(inner)


def named(number: int | None, class_names: Sequence[str] | None) -> int | str | None:
    """Return the name of a class, or its number if the classes have no names."""
    if number is None or class_names is None:
        return number
    return str(class_names[number]) if number < len(class_names) else str(number)
