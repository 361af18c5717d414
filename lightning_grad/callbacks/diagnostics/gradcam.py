"""Show which parts of an image speak for the class that the network answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_grad.callbacks.diagnostics._explaining import ExplainingProbe, Target
from lightning_grad.callbacks.diagnostics._image_maps import channels_first
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
from lightning_grad.functional import ClassAnswers, OutputCapture, activation_maps, feature_map
from lightning_grad.functional.choices import check_choice
from lightning_grad.functional.diagnostics.gradcam import CAM_METHODS, CAMMethod
from lightning_grad.functional.plain_tensors import dressed, plain_tensor
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
            as the last blocks of a transformer that reads only its class token.
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
            Default: the first floating-point tensor with at least two dimensions.
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

    **State.** The scalars of all looks, the overlays of up to eight looks, and whether a look is due.

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
        path = find_input(look.batch, self.input_key, self.display_name)
        images = None if path is None else channels_first(plain_tensor(input_at(look.batch, path)))
        if path is None or images is None or len(images) != len(look.indices):
            raise TypeError(
                f"{self.display_name} needs images (B, C, H, W) in the batch; got "
                f"{'no floating-point tensor' if path is None else tuple(input_at(look.batch, path).shape)}. Set "
                "input_key to the images."
            )
        self.refuse_moved_rows(look)
        size = (images.shape[2], images.shape[3])
        explained = self._explain(look, size)
        if self.method == "smooth_gradcam++":
            inputs = input_at(look.batch, path)
            plain = plain_tensor(inputs)
            noisy = [plain + self.noise_std * torch.randn_like(plain) for _ in range(self.noisy_copies)]
            looks = [look.on(with_input(look.batch, path, dressed(each, inputs))) for each in noisy]
            classes = self.classes_of(explained.found)
            classes = torch.where(classes < 0, explained.found.answers, classes)
            copies = [self._explain(copy, size, classes) for copy in looks]
            maps = activation_maps(explained.activations, torch.stack([c.gradients for c in copies]), self.method)
        else:
            maps = activation_maps(explained.activations, explained.gradients, self.method)
        maps = F.interpolate(maps.unsqueeze(1).float(), size, mode="bilinear", align_corners=False).squeeze(1)
        return self._reading(look, images, maps, explained.found)

    def _explain(self, look: Look, size: tuple[int, int], classes: Tensor | None = None) -> _Explained:
        """Run the step, and return the layer's map and the gradient of the class score with respect to it."""
        modules = {clean_name(name): module for name, module in look.pl_module.named_modules() if name}
        wanted = getattr(self, "_layer", self.layer)
        if wanted is not None and clean_name(wanted) not in modules:
            raise ValueError(
                f"{self.display_name}: {type(look.pl_module).__name__} has no layer {wanted!r}. Choose a name of "
                f"named_modules(), such as {list(modules)[-1]!r}, or leave layer at None."
            )
        names = list(modules) if wanted is None else [clean_name(wanted)]
        order: list[str] = []  # of the calls; named_modules() has a block before its layers

        def is_map(name: str, output: Tensor) -> bool:
            order.append(name)
            return feature_map(output, len(look.indices), size) is not None

        captures = {name: OutputCapture(modules[name], partial(is_map, name)) for name in names}
        with torch.enable_grad(), ExitStack() as stack:
            for capture in captures.values():
                stack.enter_context(capture)
            found = self.answers_of(look)
            classes = self.classes_of(found) if classes is None else classes
            score = found.of(classes).sum()
        last_first = {name: captures[name] for name in reversed(order)}
        maps = {name: each for name, each in last_first.items() if each.output is not None}
        return self._of_layer(look, maps, found, score, size, names)

    def _of_layer(
        self,
        look: Look,
        maps: Mapping[str, OutputCapture],
        found: ClassAnswers,
        score: Tensor,
        size: tuple[int, int],
        names: Sequence[str],
    ) -> _Explained:
        """Choose the first of these layers whose map has an effect on the score."""
        outputs = [each.output for each in maps.values() if each.output is not None]
        gradients = torch.autograd.grad(score, outputs, allow_unused=True) if outputs else ()
        samples = len(look.indices)
        for name, gradient in zip(maps, gradients, strict=True):
            output = maps[name].output
            if gradient is None or output is None:
                continue
            activations, slopes = (feature_map(each.detach(), samples, size) for each in (output, gradient))
            if activations is None or slopes is None or (len(names) > 1 and not bool(slopes.any())):
                continue
            self._remember(_innermost(name, maps))
            return _Explained(activations, slopes, found)
        which = f"the layer {names[0]!r} has none" if len(names) == 1 else "no layer has one"
        raise ValueError(
            f"{self.display_name} needs a layer whose output is a map of the image, (B, C, H, W) with more than one "
            f"position or tokens (B, T, C) of a grid, and has an effect on the class; {which} for images of {size[0]} x "
            f"{size[1]} pixels. Set layer= to a convolution or to a block of a vision transformer."
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


def _innermost(name: str, maps: Mapping[str, OutputCapture]) -> str:
    """Return the innermost layer whose output a layer returns: the last child of a container, not the container."""
    for other, each in maps.items():
        # An in-place layer returns its input, the copy of the layer before it, so only children count.
        if other.startswith(f"{name}.") and each.copy is not None and each.copy is maps[name].output:
            return _innermost(other, maps)
    return name
