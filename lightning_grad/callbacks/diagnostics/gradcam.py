"""Show which parts of an image speak for the class that the network answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_grad.callbacks.diagnostics._explaining import ExplainingProbe, Target
from lightning_grad.callbacks.diagnostics._image_maps import channels_first, is_series
from lightning_grad.callbacks.diagnostics._layer_maps import LayerMaps, gradients_of, innermost, parts_of_attention
from lightning_grad.core import (
    Look,
    ProbeLook,
    Reading,
    check_above,
    check_count,
    during_fit,
    find_input,
    input_at,
    with_input,
)
from lightning_grad.core.probe_samples import Split
from lightning_grad.functional import ClassAnswers, activation_maps, feature_map
from lightning_grad.functional.choices import check_choice
from lightning_grad.functional.diagnostics.gradcam import CAM_METHODS, CAMMethod
from lightning_grad.functional.plain_tensors import dressed, plain_tensor
from lightning_grad.utilities.batches import Path, first_numbers, follow
from lightning_grad.utilities.parameters import clean_name

_NAMES = {"gradcam": "Grad-CAM", "gradcam++": "Grad-CAM++", "smooth_gradcam++": "Smooth Grad-CAM++"}


@dataclass(frozen=True, eq=False)
class _Explained:
    """The output of the layer as a map, its gradient, and the answers of one run."""

    activations: Tensor
    gradients: Tensor
    found: ClassAnswers


class GradCAMLogger(ExplainingProbe):
    r"""Show by Grad-CAM which parts of some validation images speak for the answer of the network.

    .. math::
        M = \max\Bigl(0, \sum_k w_k A_k\Bigr), \qquad w_k = \frac 1 {HW} \sum_{ij} \frac{\partial s_c}{\partial A_{kij}}

    where A is the output of one layer, and :math:`s_c` is the logit of class c. The images are the same in each epoch. Logits
    and labels come from the loss of the module's own ``training_step``, in eval mode.

    Args:
        method: "gradcam", "gradcam++" or "smooth_gradcam++", which averages over noisy copies.
        layer: Name of the layer, as in ``named_modules()``. Default: the last one whose output is a map.
            A map is (B, C, H, W) or (B, H, W, C) with more than one position, or the tokens (B, T, C) of a vision
            transformer, with or without a class token. Layers whose map has no effect on the class are skipped, such
            as the last blocks of a transformer that reads only its class token. Layers inside an attention come last.
        samples: Number of images to show, spread evenly over the set, or their indices.
        every_n_epochs: Look at the end of every n-th epoch. Default: 1.
        every_n_steps: Look after every n-th optimizer step instead.
        target: Class that is explained: the "answer" of the network or the "label".
        noisy_copies: Noisy copies of each image for "smooth_gradcam++".
            The default is that of torchcam.
        noise_std: Standard deviation of their noise, in units of the input.
            The default is that of torchcam.
        class_names: Names of the classes, for figures and tables.
        split: Set that the images are from, "train" or "val".
        dataset: Callable (trainer) -> data set to read from, for example one without augmentation.
        loader_key: Key or list position of the loader to use, if there are several.
        input_key: Key or position of the images in the batch; join nested keys with dots.
            Default: the first tensor with at least two dimensions, floating-point or uint8.
        outputs_fn: Callable (module, batch) -> (logits, labels). Use it if the loss cannot be captured.
        loss_index: Index, from 0, of the loss call to use. Default: the only classification loss.
        figure: Draw figures (needs matplotlib and a logger with a folder).
        name: Name of this instance, needed if two are used; part of state and log keys.

    Raises:
        ValueError: In the constructor for wrong arguments. In ``setup`` for sharded strategies and manual optimization. When
            training starts, without validation data. After the first batch, if there are fewer images, no layer has such
            an output, there is no such layer, or the loss does not compare class scores with labels.
        TypeError: After the first batch, if it holds no images.
        RuntimeError: After the first batch, if no loss can be captured.

    **Hooks.** Those of :class:`~lightning_grad.core.ProbeCallback`. Hooks on layers exist only during a look.

    **Logs** under ``explain/gradcam/``, in each look: ``accuracy`` and ``confidence`` of the shown images, ``map_area``, the
    mean share of an image in which the map is above half of its maximum, and ``empty_maps``, the number of maps that
    are zero everywhere; the image ``maps``, with wrong answers framed in red, and the table ``samples`` with image,
    overlay, label, answer and confidence. At the end: the figure of the run, which shows how the maps changed, and a
    table of the scalars.

    **State.** The scalars of all looks, 12 small overlays of up to eight looks, and whether a look is due.

    **Cost.** One forward and one backward pass of the shown images in each look; with "smooth_gradcam++" one more for each
    noisy copy. See docs/benchmarks.md.

    **Deviations.** Grad-CAM++ uses the weights of eq. 19 without the normalization of the authors' released code.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.GradCAMLogger
                  init_args:
                    samples: 8

    References:
        Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", 2017, arXiv
        1610.02391.
        Chattopadhay et al., "Grad-CAM++", 2018, arXiv 1710.11063, eq. 19.
        Omeiza et al., "Smooth Grad-CAM++", 2019, arXiv 1908.01224.
    """

    namespace: ClassVar[str] = "explain/gradcam"
    trial: ClassVar[Mapping[str, Any]] = {"samples": 4}

    _layer = during_fit[str]()

    def __init__(
        self,
        method: CAMMethod = "gradcam",
        layer: str | None = None,
        samples: int | Sequence[int] = 8,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        target: Target = "answer",
        noisy_copies: int = 4,
        noise_std: float = 0.3,
        class_names: Sequence[str] | None = None,
        split: Split = "val",
        dataset: Callable[[pl.Trainer], Any] | None = None,
        loader_key: str | int | None = None,
        input_key: str | int | None = None,
        outputs_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        loss_index: int | None = None,
        figure: bool = True,
        name: str | None = None,
    ) -> None:
        chosen = (samples, every_n_epochs, every_n_steps, target, class_names, split, dataset, loader_key)
        super().__init__(*chosen, input_key, outputs_fn, loss_index, figure, name)
        check_choice(method, CAM_METHODS, "method")
        self.method: CAMMethod = method
        self.layer = layer
        self.noisy_copies = check_count(noisy_copies, 1, "noisy_copies")
        self.noise_std = check_above(noise_std, 0.0, "noise_std")

    # A look.

    @override
    def probe(self, look: ProbeLook) -> Reading:
        path, images = self._images(look)
        self.refuse_moved_rows(look)
        size = (images.shape[2], images.shape[3])
        explained = self._explain(look, size)
        gradients = explained.gradients
        if self.method == "smooth_gradcam++":
            gradients = torch.stack(list(self._noisy_gradients(look, path, size, explained.found)))
        maps = activation_maps(explained.activations, gradients, self.method)
        maps = F.interpolate(maps.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)
        return self._reading(look, images, maps, explained.found)

    def _images(self, look: ProbeLook) -> tuple[Path, Tensor]:
        """Return the path of the images in the batch, and the images as (B, C, H, W)."""
        path, found = first_numbers(look.batch)
        if self.input_key is not None:
            path, found = follow(look.batch, self.input_key, self.display_name)
        is_image = isinstance(found, Tensor) and (found.is_floating_point() or found.dtype == torch.uint8)
        if self.input_key is not None and not is_image:
            find_input(look.batch, self.input_key, self.display_name)  # which raises
        images = channels_first(plain_tensor(found)) if is_image and found is not None else None
        if path is None or found is None or images is None or is_series(found) or len(images) != len(look.indices):
            kind = "no tensor" if found is None else f"{tuple(found.shape)} of {found.dtype}"
            raise TypeError(
                f"{self.display_name} needs images (B, C, H, W) in the batch; got {kind}. Set input_key to the images, "
                "floating-point or uint8, and stack them to one tensor in collate_fn."
            )
        if self.method == "smooth_gradcam++" and not found.is_floating_point():
            raise TypeError(
                f"{self.display_name} cannot add noise to images of {found.dtype}. Convert them to floating point in the "
                "data set, or set method='gradcam++'."
            )
        return path, images

    def _noisy_gradients(
        self, look: ProbeLook, path: Path, size: tuple[int, int], found: ClassAnswers
    ) -> Iterator[Tensor]:
        """Yield the gradient of the same class scores for noisy copies of the images."""
        inputs, classes = input_at(look.batch, path), self.classes_of(found)
        classes = torch.where(classes < 0, found.answers, classes)
        plain = plain_tensor(inputs)
        for _ in range(self.noisy_copies):
            noisy = dressed(plain + self.noise_std * torch.randn_like(plain), inputs)
            yield self._explain(look.on(with_input(look.batch, path, noisy)), size, classes).gradients

    def _explain(self, look: Look, size: tuple[int, int], classes: Tensor | None = None) -> _Explained:
        """Run the step, and return the layer's map and the gradient of the class score with respect to it."""
        modules = {clean_name(name): module for name, module in look.pl_module.named_modules() if name}
        wanted = getattr(self, "_layer", self.layer)
        if wanted is not None and clean_name(wanted) not in modules:
            raise ValueError(
                f"{self.display_name}: {type(look.pl_module).__name__} has no layer {wanted!r}. Choose a name of "
                f"named_modules(), such as {list(modules)[-1]!r}, or leave layer at None."
            )
        layers = modules if wanted is None else {clean_name(wanted): modules[clean_name(wanted)]}
        with torch.enable_grad(), LayerMaps(layers, len(look.indices), size) as seen:
            found = self.answers_of(look)
            score = found.of(self.classes_of(found) if classes is None else classes).sum()
        maps = seen.last_first()
        if wanted is None:  # what an attention computes inside is less of a map than its input
            inside = parts_of_attention(look.pl_module)
            maps.sort(key=lambda each: each.name in inside)
        for each, gradient in zip(maps, gradients_of(score, maps), strict=True):
            activations = feature_map(each.output.detach(), len(look.indices), size)
            slopes = None if gradient is None else feature_map(gradient, len(look.indices), size)
            if activations is None or slopes is None or (wanted is None and not bool(slopes.any())):
                continue
            self._remember(innermost(each, maps))
            return _Explained(activations, slopes, found)
        raise self._no_map(seen, bool(maps), wanted, size)

    def _no_map(self, seen: LayerMaps, has_maps: bool, wanted: str | None, size: tuple[int, int]) -> ValueError:
        """Return the error about a layer, or a network, that has no map with an effect on the class."""
        which = "the layers" if wanted is None else f"the layer {wanted!r}"
        if has_maps:
            return ValueError(
                f"{self.display_name} found maps of {which}, but no gradient of the class with respect to them. Freeze "
                "layers by requires_grad_(False), not by torch.no_grad() or detach(), and set use_reentrant=False in "
                "checkpoint()."
            )
        why = "no layer has one"
        if wanted is not None:
            shape = seen.shapes.get(clean_name(wanted))
            why = f"the step calls no layer {wanted!r}" if shape is None else f"{which} returns {shape}"
        return ValueError(
            f"{self.display_name} needs a layer whose output is a map of the image, (B, C, H, W) with more than one "
            f"position, or tokens (B, T, C) of a grid; {why} for images of {size[0]} x {size[1]} pixels. Set layer= to a "
            "convolution or to a block of a vision transformer."
        )

    def _remember(self, name: str) -> None:
        if not hasattr(self, "_layer"):
            self._layer = name
            if self.layer is None:
                rank_zero_info(f"{self.display_name} shows the output of {name!r}.")

    def _reading(self, look: ProbeLook, images: Tensor, maps: Tensor, found: ClassAnswers) -> Reading:
        peaks = maps.flatten(1).amax(1)
        area = (maps.flatten(1) > 0.5 * peaks[:, None]).float().mean(1)
        is_empty = peaks == 0
        scalars = {"map_area": area.sum() / (~is_empty).sum().clamp(min=1), "empty_maps": is_empty.sum()}
        explained = f"bright parts speak for the {self.target}"
        title = f"{self.title()} of {self._layer}, epoch {look.epoch}: {explained}"
        return self.image_reading(look, images, maps, found, scalars, title)

    @override
    def title(self) -> str:
        return f"{self.display_name}, {_NAMES[self.method]}"
