"""Round the weights of a trained network to a few bits, by the outputs of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grad.functional import QuantizedTensor, integer_range, outlier_mask, with_outliers
from lightning_grad.functional.quantization.outliers import OutlierScore
from lightning_grad.utilities.checks import check_at_least, check_between
from lightning_grad.utilities.modes import evaluated
from lightning_grad.utilities.parameters import check_patterns, clean_name, named_owners, selects
from lightning_grad.utilities.reconstruction import Reconstruction, RoundedUnit
from lightning_grad.utilities.reporting import format_table
from lightning_grad.utilities.rounding_units import RoundableWeight, called_modules, find_units
from lightning_grad.utilities.weight_axes import is_foreign_matrix, output_dimension

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def round_weights(
    module: nn.Module,
    batches: Iterable[Any],
    bits: int = 4,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    blocks: Sequence[str] | None = None,
    run: Callable[[nn.Module, Any], object] | None = None,
    steps: int = 1000,
    strength: float = 10.0,
    outliers: float = 0.0,
    outlier_score: OutlierScore = "gradient-error",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> dict[str, QuantizedTensor]:
    """Round the weights of a trained module to a few bits, in place, without training it again.

    Each layer learns which of its weights round up (:func:`~lightning_grad.functional.learn_rounding`), so it keeps
    its output on the given batches. No layer ends with a larger error there than with nearest rounding. The module is in
    eval mode meanwhile.

    Args:
        module: The trained module, without techniques on its weights.
        batches: Batches of training data, some 1,000 samples in total. They are kept in memory.
        bits: Bits of a weight, 2 to 8.
        include: Names or wildcards of layers or weights. Default: every Linear, Conv and attention layer except the first
            and the last that are called.
        exclude: Names or wildcards of layers or weights to skip.
        blocks: Names or wildcards of modules whose weights are rounded together, by the output of the whole module.
        run: Function (module, batch) that runs the forward pass. Default: ``module(batch)``, with the first item of a
            tuple or list, or with a mapping as keyword arguments.
        steps: Optimizer steps for each layer; 0 rounds to the nearest levels.
        strength: Strength of the penalty on undecided weights, relative to the error of the layer.
        outliers: Share of the weights of each layer that keep their values, such as 0.01.
        outlier_score: What makes an outlier; see :func:`~lightning_grad.functional.outlier_mask`.
        loss: Function (module, batch) -> loss, for the gradients that scores of outliers need.
        seed: Seed of the order of the batches.
        verbose: Show a progress bar, and print a table of the layers.

    Returns:
        dict: Integers and scales of each rounded weight, by name: the ``report`` of the exporters.

    Raises:
        ValueError: For bits below 2 or above 8, a name that matches nothing, no weight to round, no batch, or outliers
            whose score needs a ``loss``.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> report = round_weights(net, [torch.randn(32, 4)], bits=3, steps=50, verbose=False)
        >>> list(report), torch.equal(report["2.weight"].dequantize(), net[2].weight)
        (['2.weight'], True)
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    integer_range(bits)
    check_between(outliers, 0.0, 1.0, "outliers")
    check_at_least(steps, 0, "steps")
    check_patterns(module, "round_weights", include=include, exclude=exclude)
    data = list(batches)
    if not data:
        raise ValueError("round_weights needs at least one batch; got none. Pass batches of training data.")
    with evaluated(module):
        runs = [partial(run or _call, module, batch) for batch in data]
        with torch.no_grad():
            called = called_modules(module, runs[0])
        owners = _chosen(module, include, exclude, called)
        scores = _gradients(module, owners, data, loss, outlier_score) if outliers else {}
        weights = [_weight(module, own, bits, outliers, outlier_score, scores) for own in owners]
        units, unused = find_units(module, weights, called, blocks or ())
        rounding = Reconstruction(units, runs, steps, strength, seed=seed)
        results = list(tqdm(rounding, "Rounding", len(units), leave=False, disable=not verbose))
    if verbose:
        print(rounding_table(results, unused))
    results += map(RoundedUnit.nearest, unused)
    _write(module, results)
    return _report(results)


def rounding_table(results: Sequence[RoundedUnit], unused: Sequence[RoundableWeight] = ()) -> str:
    """Return a table of the rounded layers: bits, error relative to nearest rounding, undecided share."""
    rows = [
        [clean_name(each.name), str(each.weights[0].bits), f"{each.relative_error:.2f}", f"{each.found.undecided:.1%}"]
        for each in results
    ]
    rows += [[clean_name(weight.name), str(weight.bits), "nearest: its module is not called", ""] for weight in unused]
    return format_table(rows, ["layer", "bits", "error / nearest", "undecided"])


def _report(results: Sequence[RoundedUnit]) -> dict[str, QuantizedTensor]:
    """Return integers and scales by name."""
    found = {w.name: (w, q) for each in results for w, q in zip(each.weights, each.found.rounded, strict=True)}
    return {
        clean_name(name): rounded if weight.kept is None else with_outliers(rounded, weight.weight, weight.kept)
        for name, (weight, rounded) in found.items()
    }


def _call(module: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(batch[0] if isinstance(batch, (tuple, list)) else batch)


Owners = tuple[str, list[tuple[nn.Module, str]]]
"""Name of a parameter, and its owners: several if it is tied."""


def _chosen(
    module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None, called: Mapping[nn.Module, int]
) -> list[Owners]:
    """Return the weights to round."""
    layers = [own for own in named_owners(module) if is_layer_weight(*own[1:])]
    order = sorted((owner for _, owner, _ in layers if owner in called), key=lambda owner: called[owner])
    ends = {*order[:1], *order[-1:]} if include is None else set[nn.Module]()
    found: dict[int, Owners] = {}
    for name, owner, attribute in layers:
        if owner not in ends and selects(name, include, exclude):
            parameter = owner._parameters[attribute]
            assert parameter is not None
            if parameter.is_floating_point() and parameter.ndim > 1:
                found.setdefault(id(parameter), (name, []))
    for _, owner, attribute in named_owners(module):
        if id(owner._parameters[attribute]) in found:
            found[id(owner._parameters[attribute])][1].append((owner, attribute))
    if not found:
        raise ValueError(
            "round_weights found no weight to round. It rounds Linear, Conv and attention layers, by default all but the "
            "first and the last one. Choose others with include=."
        )
    return list(found.values())


def is_layer_weight(owner: nn.Module, attribute: str) -> bool:
    """Return True for a matrix by which a layer multiplies: of Linear, Conv, attention and layers of other libraries."""
    if isinstance(owner, nn.MultiheadAttention):
        return attribute in _ATTENTION
    return attribute == "weight" and (isinstance(owner, _LAYERS) or is_foreign_matrix(owner, attribute))


def _weight(
    module: nn.Module,
    owners: Owners,
    bits: int,
    outliers: float,
    score: OutlierScore,
    gradients: Mapping[str, Tensor],
) -> RoundableWeight:
    name, uses = owners
    owner, attribute = uses[0]
    weight = module.get_parameter(name).detach()
    dim = output_dimension(owner, attribute) or 0
    kept = outlier_mask(weight, bits, outliers, gradients.get(name), score, dim) if outliers else None
    return RoundableWeight(name, weight, [owner for owner, _ in uses], partial(show_values, uses), bits, dim, kept)


def show_values(uses: Sequence[tuple[nn.Module, str]], value: Tensor | None) -> None:
    """Let modules compute with a tensor in place of a parameter: an attribute of the instance comes first."""
    for owner, attribute in uses:
        if value is None:
            owner.__dict__.pop(attribute, None)
        else:
            owner.__dict__[attribute] = value


def _gradients(
    module: nn.Module,
    owners: Sequence[Owners],
    data: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None,
    score: OutlierScore,
) -> dict[str, Tensor]:
    """Return the absolute gradients of the weights, summed over batches."""
    if score == "magnitude":
        return {}
    if loss is None:
        raise ValueError(
            f"outlier_score={score!r} needs gradients. Set loss= to a function (module, batch) that returns the loss, or "
            "outlier_score='magnitude'."
        )
    parameters = [module.get_parameter(name) for name, _ in owners]
    sums = absolute_gradients(parameters, [partial(loss, module, batch) for batch in data])
    return {name: each for (name, _), each in zip(owners, sums, strict=True)}


def absolute_gradients(parameters: Sequence[nn.Parameter], losses: Iterable[Callable[[], Tensor]]) -> list[Tensor]:
    """Return the absolute gradients of parameters, frozen ones too, summed over losses.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0, 2.0]), requires_grad=False)
        >>> absolute_gradients([weight], [lambda: weight[0] * 3, lambda: -weight.sum()])
        [tensor([4., 1.])]
    """
    sums = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        for loss in losses:
            with torch.enable_grad():
                value = loss()
            gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
            torch._foreach_add_(sums, torch._foreach_abs(gradients))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return sums


@torch.no_grad()
def _write(module: nn.Module, results: Sequence[RoundedUnit]) -> None:
    for each in results:
        for weight, value in zip(each.weights, each.values, strict=True):
            module.get_parameter(weight.name).copy_(value)
