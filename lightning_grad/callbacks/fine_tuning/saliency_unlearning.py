"""Saliency unlearning (SalUn): the callback. Masks and labels: ``functional/fine_tuning/saliency.py``."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.callbacks.fine_tuning._forget_set import ForgetPass, checked_forget, forget_indices
from lightning_grad.callbacks.fine_tuning._held_weights import HeldWeights
from lightning_grad.callbacks.fine_tuning._relabeling import RELABEL, BatchFunction, Labels, Relabel, find_labels
from lightning_grad.core import (
    WHOLE_WEIGHTS,
    Chosen,
    Compatibility,
    LossRequest,
    OptimizerCallback,
    SubsetCallback,
    TrainingSet,
    WrapOrder,
    during_fit,
    is_quiet,
    is_repeated,
    manual,
    no,
    sum_over_ranks,
    until_next_fit,
    wrap_method,
)
from lightning_grad.core.losses.rehearsal import Rehearsal
from lightning_grad.core.views.portable import pack_bits
from lightning_grad.data.fingerprints import Fingerprint
from lightning_grad.functional import LossCapture, saliency_masks
from lightning_grad.utilities.checks import check_count, check_ratio, refuse_dataloader_iter
from lightning_grad.utilities.parameters import all_names

_NAMES_SAMPLES = "the mask and the labels belong to the samples to forget"


class SaliencyUnlearning(OptimizerCallback):
    r"""Make a trained model forget samples: give them random labels, and train only the weights that matter to them.

    .. math::
        m = \mathbb 1 \bigl[\, |\nabla_w L_f| \ge \gamma \,\bigr], \qquad
        \min_{w \,:\, m} \; \sum_{i \in \text{forget}} \ell(x_i, y'_i) + \sum_{i \in \text{retain}} \ell(x_i, y_i)

    :math:`L_f` is the loss of the samples to forget at the start of the fit, with their own labels, in eval mode.
    :math:`\gamma` is one threshold for the whole network, reached by the share ``keep`` of its entries. All other weights
    keep their values bit for bit. y' is another class, drawn once for each sample. The samples to forget stay in the training
    set, next to those to retain. Validation and test see their own labels.

    The labels are found in the batch: they are the tensor that the loss compares with the outputs, or the only tensor
    of classes that decides the loss of each sample, which works for hand-written losses too.

    Args:
        forget: Indices of the samples to forget in the training set, or a callable (sample) -> bool.
            ``sample`` is what the data set returns for an index.
        keep: Share of the weights that train (0.5 in the paper); 1 trains all, without a mask.
        relabel: Callable (batch, forget, generator) -> batch, used instead of random labels.
            It returns a batch with other targets where ``forget`` (B,) is True, and must not change the batch in place.
        num_classes: Number of classes. Default: the number of outputs that the loss compares with a label.
            It is needed for hand-written losses.
        seed: Seed of the random labels.
        name: Name of this instance.

    Raises:
        ValueError: In the constructor for an empty ``forget``, a negative index, or a number outside its range. In setup
            for manual optimization, FSDP or DeepSpeed. When training starts, if an index is out of range, no sample or
            all samples are to be forgotten, the labels are not found, or their gradient is 0 or not finite.
        TypeError: When training starts, if samples have no index: iterable data, or a loader that hides them.

    **Hooks.** ``training_step`` gets a batch with other labels. Gradients of all other weights are set to 0 in
    ``on_before_optimizer_step``, and the weights are restored after the step, because momentum and weight decay move them.

    **Logs** under ``unlearning/``, at the end of an epoch, if the loss is a call of ``torch.nn.functional`` with class
    labels: ``forget_accuracy`` and ``retain_accuracy`` (share of right answers in training, by the own labels).

    **State.** The samples to forget, the mask (one bit for each weight) and the counts of the epoch.

    **Cost.** One pass with gradients over the samples to forget, once. Each step: a mask on gradients and weights, and one
    more evaluation of the loss function. It holds a copy of the weights, and one byte for each.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.SaliencyUnlearning
                  init_args:
                    forget: [3, 14, 15]

    References:
        Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image
        Classification and Generation", ICLR 2024, arXiv 2310.12508, equations 3 to 6, and its released code, which
        draws random labels among all classes; here the label of the sample itself is never drawn.
    """

    namespace: ClassVar[str] = "unlearning"
    moves_weights: ClassVar[bool] = True
    holds_weights: ClassVar[bool] = True
    compatibility: ClassVar[Compatibility] = OptimizerCallback.compatibility.but(
        ddp=SubsetCallback.compatibility.ddp,
        sparse_gradients=no(
            "masks single entries of gradients, and {} makes them sparse", "Set sparse=False in {value}"
        ),
        complex_parameters=no(
            "masks the bits of real weights, and {} is complex", "Store it as real and imaginary part"
        ),
        **manual(no("runs training_step without training, and under {} the step trains", "Use automatic optimization")),
        **WHOLE_WEIGHTS,
    )
    fixed_settings: ClassVar[Mapping[str, str]] = {
        "forget": _NAMES_SAMPLES,
        "keep": "the mask has this share",
        "num_classes": "the labels are drawn from so many",
        "seed": "the labels are drawn from it",
    }
    trial: ClassVar[Mapping[str, Any]] = {"forget": [0, 1, 2, 3]}
    neutral: ClassVar[Mapping[str, Any] | str] = "it gives at least one sample another label at any setting"
    of_batch: ClassVar[tuple[str, ...]] = ("_indices",)

    _forget = until_next_fit[Tensor | None](lambda _: None).saved()
    _masks = until_next_fit.of(dict[str, Tensor]).saved()  # packed bits, by the name of the parameter
    _counts = until_next_fit[Tensor](lambda _: torch.zeros(4)).saved()  # right and all answers: forget, retain
    _mark = until_next_fit[Fingerprint | None](lambda _: None)
    _module = during_fit[pl.LightningModule]()
    _training_set = during_fit[TrainingSet]()
    _relabel = during_fit[BatchFunction | Labels]()
    _forgotten = during_fit.of(set[int])
    _held = during_fit[HeldWeights]()
    _indices = during_fit.of(list[int])

    def __init__(
        self,
        forget: Sequence[int] | Callable[[Any], Any],
        keep: float = 0.5,
        relabel: Relabel | None = None,
        num_classes: int | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.forget = checked_forget(forget)
        self.keep = check_ratio(keep, "keep")
        self.relabel = relabel
        self.num_classes = check_count(num_classes, 2, "num_classes")
        self.seed = check_count(seed, 0, "seed")

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            refuse_dataloader_iter(pl_module.training_step, self.display_name)
            self._module = pl_module
            self._training_set = TrainingSet(trainer, self.display_name, self.undo)
            self.undo.push(wrap_method(pl_module, "training_step", self._see_labels, order=WrapOrder.LOSSES))
            self.undo.push(wrap_method(pl_module, "training_step", self._change_labels, order=WrapOrder.INPUTS))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "data": dataclasses.asdict(self._mark) if self._mark is not None else None}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        if state["data"] is not None:
            self._mark = Fingerprint(**state["data"])
            self._training_set.expect(self._mark)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.works_with().refuse_parameters(self.display_name, pl_module, set(self._parameters()))
        self._training_set.begin(None)
        how = "with random other labels" if self.relabel is None else "with the targets of relabel"
        self.announce(f"forgets samples by training on them {how}", "samples")

    @override
    def chosen(self) -> Chosen:
        """Return the samples to forget; an empty list before the training loader exists, unless they are indices."""
        known = self._forget.tolist() if self._forget is not None else [] if callable(self.forget) else self.forget
        return dataclasses.replace(super().chosen(), names=known)

    def _parameters(self) -> dict[int, Tensor]:
        """Return the parameters that optimizers train, by id."""
        groups = [group for optimizer in self.watched.values() for group in optimizer.param_groups]
        named = all_names(self._module)  # not parameters that another technique keeps outside of the module
        return {id(p): p for group in groups for p in group["params"] if p.requires_grad and id(p) in named}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = self._training_set
        if not found.is_whole_batch:
            raise ValueError(
                f"{self.display_name} must know the samples of each batch, but training_step takes a batch from each of "
                "several training loaders. Train with one loader."
            )
        if found.resumes_behind_last_batch:
            found.keep(None)
            found.leave_epoch()
        if self._forget is None:
            self._forget = forget_indices(self.forget, trainer, found, self.display_name)
        self._forgotten, self._mark = set(self._forget.tolist()), found.mark
        asked = LossRequest(self.display_name, way_out=RELABEL)
        looks = ForgetPass(trainer, pl_module, found, asked)
        Rehearsal(trainer, pl_module, asked, found, runs_the_step=self.relabel is None, by_terms=True).check_loader()
        self._relabel = self._find_labels(looks) if self.relabel is None else BatchFunction(self.relabel, self.seed)
        self._fix_weights(looks, self._forget)

    def _find_labels(self, looks: ForgetPass) -> Labels:
        chunks = looks.mixed_batches()
        with looks.batches(chunks) as batches, torch.no_grad():
            found = find_labels(looks.look_at, zip(batches, map(len, chunks), strict=True), self.display_name)
        number = self.num_classes or found.num_classes
        if number is None:
            raise ValueError(
                f"{self.display_name} draws another label for each sample, but the loss does not show the number of "
                "classes. Set num_classes."
            )
        if found.num_classes is not None and number > found.num_classes:
            raise ValueError(
                f"{self.display_name}: num_classes must be at most {found.num_classes}, the number of outputs that the loss "
                f"compares with a label; got {number}."
            )
        draws = torch.rand(self._training_set.sampler.total, generator=torch.Generator().manual_seed(self.seed))
        return Labels(found.path, number, found.is_target, draws, self.display_name)

    def _fix_weights(self, looks: ForgetPass, forget: Tensor) -> None:
        """Find the mask, unless a checkpoint holds it, and remember the weights that do not train."""
        names, parameters = all_names(self._module), self._parameters()
        if not self._masks:
            gradients = looks.gradients(forget, list(parameters.values()))
            masks = dict(zip(parameters, saliency_masks(gradients, self.keep), strict=True))
            self._masks = {names[key][0]: pack_bits(mask) for key, mask in masks.items()}
        packed = {key: self._masks.get(names[key][0]) for key in parameters}
        masks = {key: mask for key, mask in packed.items() if mask is not None}  # others did not train when it was made
        self._held = HeldWeights(list(masks.values()), [parameters[key] for key in masks])
        total = len(self._training_set.sampler.population)
        self.say(f"forgets {len(forget)} of {total} samples, and trains {self._held.share:.1%} of the weights")

    # One training step.

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training_set.keep(None)
        self._counts = torch.zeros(4, device=pl_module.device)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._indices = self._training_set.draw(batch_idx)

    def _change_labels(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap ``training_step``: replace the labels of the samples to forget in a copy of the batch."""
        forget = [index in self._forgotten for index in self._indices]
        if is_quiet(self._module) or not any(forget):
            return inner(*args, **kwargs)
        if args:
            return inner(self._relabel(args[0], self._indices, forget), *args[1:], **kwargs)
        key = next(iter(kwargs))
        return inner(**{**kwargs, key: self._relabel(kwargs[key], self._indices, forget)})

    def _see_labels(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap ``training_step``: count the right answers, if the step shows logits and labels."""
        samples = len(self._indices)
        if is_quiet(self._module) or is_repeated(self._module) or not samples:
            return inner(*args, **kwargs)
        with LossCapture(samples) as capture:
            output = inner(*args, **kwargs)
        calls = [c for c in capture.calls if c.labels is not None and c.input.dim() == 2 and len(c.input) == samples]
        if len(calls) == 1 and calls[0].labels is not None:
            self._count(calls[0].input.argmax(1), calls[0].labels)
        return output

    def _count(self, answers: Tensor, labels: Tensor) -> None:
        """Add the answers of a batch to the counts; a sample to forget is right if it has its own label."""
        forget = torch.tensor([index in self._forgotten for index in self._indices], device=labels.device)
        known = torch.zeros_like(forget)
        if isinstance(self._relabel, Labels) and self._relabel.is_target:
            labels, known = self._relabel.own(labels, self._indices, forget), forget
        right = answers == labels
        counts = [(right & known).sum(), known.sum(), (right & ~forget).sum(), (~forget).sum()]
        self._counts = self._counts.to(labels.device) + torch.stack(counts)

    @override
    def before_update(self, index: int, optimizer: Optimizer) -> None:
        self._held.mask_gradients(optimizer)

    @override
    def after_step(self, index: int, optimizer: Optimizer) -> None:
        self._held.restore(optimizer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        right, forget, retained, retain = sum_over_ranks(trainer, self._counts).tolist()
        shares = {"forget_accuracy": (right, forget), "retain_accuracy": (retained, retain)}
        known = {key: part / whole for key, (part, whole) in shares.items() if whole}
        self.log_scalars(pl_module, known, sync_dist=True)
