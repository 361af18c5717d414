"""The losses of ``torch.nn.functional``: their arguments, their denominators, and the losses of single samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# With reduction="none" these return one value per position, and each position belongs to one sample.
_READABLE = _names(
    "cross_entropy nll_loss linear_cross_entropy binary_cross_entropy binary_cross_entropy_with_logits mse_loss "
    "l1_loss smooth_l1_loss huber_loss kl_div poisson_nll_loss gaussian_nll_loss soft_margin_loss multi_margin_loss "
    "multilabel_margin_loss multilabel_soft_margin_loss hinge_embedding_loss"  # linear_cross_entropy from torch 2.13 on
)
# Losses of several inputs, or with lengths, whose rows are not known to be samples. Unreduced, they return one value
# per sample.
_OF_SEVERAL = ("cosine_embedding_loss", "ctc_loss", "margin_ranking_loss", "triplet_margin_loss")
# Functions that the losses above call. User code may also call them directly, with other arguments.
_OF_OWN_NAMES = ("cross_entropy_loss", "nll_loss_nd", "nll_loss2d", "triplet_margin_with_distance_loss")
_INNER = (*_OF_OWN_NAMES, *_READABLE, *_OF_SEVERAL)

OF_CLASS_INDICES = ("cross_entropy", "nll_loss", "linear_cross_entropy", "multi_margin_loss")
_THAT_IGNORE = ("cross_entropy", "nll_loss", "linear_cross_entropy")
_WEIGHTED_BY_POSITION = ("mse_loss", "l1_loss")
_REDUCTIONS = ("mean", "sum", "none")


class LossFunction(NamedTuple):
    """A loss of ``torch.nn.functional``, or a function that such a loss calls.

    Attributes:
        name: Name of the function.
        defaults: Default values of its parameters by name, in order; ``None`` if it is not read.
        is_readable: Whether it has one input and one target per sample.
    """

    name: str
    defaults: dict[str, Any] | None = None
    is_readable: bool = False


def _table() -> dict[Callable[..., Any], LossFunction]:
    table: dict[Callable[..., Any], LossFunction] = {}
    for home in (torch, torch._C._nn):
        table.update({getattr(home, name): LossFunction(name) for name in _INNER if hasattr(home, name)})
    table[F.triplet_margin_with_distance_loss] = LossFunction("triplet_margin_with_distance_loss")
    for name in (*_READABLE, *_OF_SEVERAL):
        if hasattr(F, name):
            # Inspected at run time, because signatures differ between versions of torch.
            parameters = inspect.signature(getattr(F, name)).parameters
            defaults = {key: parameter.default for key, parameter in parameters.items()}
            table[getattr(F, name)] = LossFunction(name, defaults, name in _READABLE)
    return table


LOSSES = _table()


def dropped_weight(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``weight`` of a call of ``l1_loss``, which torch does not pass to a mode (pull request 193003).

    No release from torch 2.6 to 2.13 passes it. Without it, observing the loss would change its value, so it is read
    from the frame of the called function.
    """
    if func is not F.l1_loss or "weight" in kwargs:
        return {}
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()  # traced code has no frames
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not F.l1_loss.__code__:
        frame = frame.f_back
    return {} if frame is None else {"weight": frame.f_locals["weight"]}


def bind_arguments(defaults: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, with defaults, and ``reduction`` for the legacy arguments."""
    # Signature.bind takes six times as long. An invalid call raises an error in the function itself.
    arguments = {**defaults, **dict(zip(defaults, args)), **kwargs}  # noqa: B905 - no `strict=`, which torch before 2.7 cannot compile
    size_average, reduce = arguments.pop("size_average", None), arguments.pop("reduce", None)
    if size_average is not None or reduce is not None:
        arguments["reduction"] = _reduction.legacy_get_string(size_average, reduce, emit_warning=False)
    reductions = (*_REDUCTIONS, "batchmean") if "log_target" in arguments else _REDUCTIONS
    if arguments["reduction"] not in reductions:
        raise ValueError(f"its reduction is {arguments['reduction']!r}")
    return arguments


def targets_are_classes(name: str, target: Tensor) -> bool:
    """Return True if the target of a loss is the index of a class, not probabilities or values."""
    return name in OF_CLASS_INDICES and not target.is_floating_point()


def valid_positions(name: str, arguments: Mapping[str, Any], positions: Tensor) -> Tensor:
    """Return a mask of the positions that are not ignored."""
    if name in _THAT_IGNORE and targets_are_classes(name, arguments["target"]):
        ignore_index = arguments["ignore_index"]
        # linear_cross_entropy uses None for the default -100 of the others.
        valid: Tensor = arguments["target"] != (-100 if ignore_index is None else ignore_index)
        return valid
    return torch.ones((), dtype=torch.bool, device=positions.device).expand(positions.shape)


def denominator_shares(name: str, arguments: Mapping[str, Any], valid: Tensor, positions: Tensor) -> Tensor | float:
    """Return what each position adds to the denominator of the mean."""
    weight, target, logits = arguments.get("weight"), arguments["target"], arguments["input"]
    if name in _THAT_IGNORE and targets_are_classes(name, target):
        # The target of an ignored position may not be the index of a class.
        return valid if weight is None else weight[target.long().masked_fill(~valid, 0)] * valid
    if name in _WEIGHTED_BY_POSITION and weight is not None:
        # If the input is broadcast to a larger target, torch still divides by the sum of the unexpanded weights.
        return weight.expand(positions.shape) * (weight.numel() / max(positions.numel(), 1))  # type: ignore[no-any-return]
    if arguments["reduction"] == "batchmean":
        return (logits.shape[0] if logits.dim() else 1) / max(positions.numel(), 1)
    return 1.0


def split(values: Tensor, samples: int) -> Tensor:
    """Reshape values of positions to (samples, positions per sample); the positions of a sample are adjacent."""
    return values.reshape(samples, values.numel() // max(samples, 1))


class SampleSums(NamedTuple):
    """The sum of the losses of each sample, and the denominator of its mean: (B,) each."""

    numerators: Tensor
    denominators: Tensor

    @classmethod
    def of(cls, positions: Tensor, shares: Tensor | float, samples: int) -> SampleSums:
        """Sum the positions of each sample, in float32 or float64."""
        dtype = torch.float64 if positions.dtype == torch.float64 else torch.float32
        if isinstance(shares, Tensor):
            denominators = _row_sums(shares, samples, dtype)
        else:
            in_a_row = positions.numel() / max(samples, 1)
            denominators = torch.full((samples,), shares * in_a_row, dtype=dtype, device=positions.device)
        return cls(_row_sums(positions, samples, dtype), denominators)


def _row_sums(values: Tensor, samples: int, dtype: torch.dtype) -> Tensor:
    if values.numel() == samples:
        return values.reshape(samples).to(dtype)
    return split(values, samples).sum(1, dtype=dtype)


def reweighted(positions: Tensor, sums: SampleSums, weights: Tensor, reduction: str) -> Tensor:
    """Return a loss in which the part of every sample is multiplied by its weight."""
    # If all positions of a sample are ignored, its loss is nan, and its weight may be nan, too.
    weights = torch.where(sums.denominators == 0, 0.0, weights.to(sums.numerators))
    if reduction == "none":
        rows = split(positions, len(weights)) * weights[:, None]
        return rows.reshape(positions.shape).to(positions.dtype)
    total = (weights * sums.numerators).sum()
    return (total if reduction == "sum" else total / sums.denominators.sum()).to(positions.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class LossCall:
    r"""One call of a loss, with the loss of each sample.

    .. math::
        \ell_i = \frac{\sum_{p \in P_i} \ell_{ip}}{\sum_{p \in P_i} w_{ip}}

    where :math:`P_i` are the positions of sample i (one in plain classification, the tokens of a sentence, the pixels
    of an image, the entries of a vector), and :math:`w_{ip}` is the position's part of the denominator of the mean: 1,
    0 if ignored, or the weight of its class. :math:`\ell_i` is thus the mean loss of a batch that contains only sample
    i.

    Attributes:
        name: The name of the function in ``torch.nn.functional``.
        input: The argument ``input`` (for ``linear_cross_entropy`` the features, not the logits); detached.
        target: The argument ``target``; detached.
        samples: B, the number of samples.
        losses: :math:`\ell_i`, (B,), float32 or float64; nan if all positions of a sample are ignored. It is the mean
            over positions even with ``reduction="sum"``, and the mean over rows with "batchmean". Detached unless
            ``keep_graph``.
        valid: Positions that are not ignored, bool, in the shape of the loss with ``reduction="none"``.
        options: The other arguments by name, including defaults: ``reduction``, ``weight``, ``ignore_index`` ...;
            detached.
        has_graph: Whether the loss can be differentiated. A value computed for logging usually cannot.
        output: The argument ``input`` with its graph if ``keep_graph``; else ``None``.
    """

    name: str
    input: Tensor
    target: Tensor
    samples: int
    losses: Tensor
    valid: Tensor
    options: Mapping[str, Any]
    has_graph: bool
    output: Tensor | None = None

    @property
    def has_class_indices(self) -> bool:
        """Whether the target of each position is the index of a class."""
        return targets_are_classes(self.name, self.target)

    @property
    def labels(self) -> Tensor | None:
        """The class of every sample, (B,), including ``ignore_index``, if each has exactly one; ``None`` otherwise."""
        one_each = self.has_class_indices and self.target.numel() == self.samples
        return self.target.reshape(self.samples) if one_each else None

    def rows(self, values: Tensor) -> Tensor:
        """Reshape one value per position to (B, positions per sample)."""
        return split(values, self.samples)


def read(
    name: str,
    given: Mapping[str, Any],
    detached: Mapping[str, Any],
    positions: Tensor,
    samples: int,
    keep_graph: bool,
    has_graph: bool,
) -> tuple[LossCall, SampleSums]:
    """Compute the losses of the samples in a call, and their numerators and denominators.

    Args:
        name: Name of the loss.
        given: Arguments of the call by name.
        detached: The same arguments, detached.
        positions: Result of the call with ``reduction="none"``.
        samples: B.
        keep_graph: As in :class:`LossCapture`.
        has_graph: As in :class:`LossCall`.
    """
    valid = valid_positions(name, detached, positions)
    sums = SampleSums.of(positions, denominator_shares(name, detached, valid, positions), samples)
    losses = sums.numerators / sums.denominators
    losses, output = (losses, given["input"]) if keep_graph else (losses.detach(), None)
    options = {key: value for key, value in detached.items() if key not in ("input", "target")}
    inputs = (detached["input"], detached["target"])
    return LossCall(name, *inputs, samples, losses, valid, options, has_graph, output), sums
