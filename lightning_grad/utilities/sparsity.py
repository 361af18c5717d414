"""Looking at finished weights: which are N:M sparse, and what the hardware can make of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_grad.functional import NMPattern, is_nm
from lightning_grad.utilities.parameters import clean_name, named_owners, selects
from lightning_grad.utilities.reporting import format_table
from lightning_grad.utilities.weight_axes import output_dimension

_GROUPS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class LayerSparsity:
    """What :func:`sparsity_report` found in one weight.

    Args:
        name: Name of the parameter.
        shape: Its shape.
        pattern: The pattern it was checked against, or the sparsest one it satisfies along its inputs; ``None`` if it
            satisfies none.
        zeros: Share of zeros, 0 to 1.
        exact: Whether no group holds more than N non-zeros.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str | None
    zeros: float
    exact: bool


@dataclass(frozen=True)
class ExportedLayer:
    """What :func:`export_semi_structured` did with one weight.

    Args:
        name: Name of the parameter.
        converted: Whether it is a semi-structured sparse tensor now.
        reason: Why not, else empty.
    """

    name: str
    converted: bool
    reason: str


def sparsest_pattern(weight: Tensor, dim: int = 1) -> NMPattern | None:
    """Return the N:M pattern of lowest density that a weight satisfies along its inputs, or ``None`` if it is dense.

    Args:
        weight: Any shape.
        dim: Dimension of the inputs.

    Example:
        >>> str(sparsest_pattern(torch.tensor([[0.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0]])))
        '1:4'
    """
    dim = min(dim, weight.ndim - 1)
    found = []
    for m in _GROUPS:
        if weight.shape[dim] % m == 0:
            grouped = weight.reshape(-1, m, weight.shape[dim + 1 :].numel())
            n = max(1, int((grouped != 0).sum(1).max()))
            if n < m:
                found.append(NMPattern(n, m))
    return min(found, key=lambda pattern: (pattern.density, pattern.m), default=None)


def sparsity_report(
    module: nn.Module, pattern: str | None = None, include: Sequence[str] | None = None, verbose: bool = True
) -> list[LayerSparsity]:
    """Tell for every weight of two or more dimensions how sparse it is, and in which pattern.

    Works on any module, with or without lightning-grad having trained it. A layer of another package whose weight is (in, out)
    is recognized by what it computes. During a fit it reports what a checkpoint would hold.

    Args:
        module: Any module.
        pattern: Check against this N:M pattern instead of looking for the sparsest that holds.
        include: Report only parameters that these name patterns match.
        verbose: Print the table as well.

    Returns:
        list[LayerSparsity]: One row a weight, in the order of the module.

    Raises:
        ValueError: If ``pattern`` is no N:M pattern.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
        >>> rows = sparsity_report(nn.Sequential(layer))
        layer     shape  pattern  zeros   exact
        0.weight  1x4    2:4      50.0 %  yes
    """
    wanted = None if pattern is None else NMPattern.parse(pattern)
    stored, rows = module.state_dict(), []
    for name, owner, attribute in named_owners(module):
        weight = stored.get(name)
        if weight is None or weight.ndim < 2 or not selects(name, include):
            continue
        dim = 0 if output_dimension(owner, attribute) == 1 else 1
        found = wanted or sparsest_pattern(weight, dim)
        exact = found is not None and is_nm(weight, found.n, found.m, dim)
        zeros = (weight == 0).float().mean().item()
        rows.append(LayerSparsity(clean_name(name), tuple(weight.shape), str(found) if found else None, zeros, exact))
    if verbose:
        print(format_table([_cells(row) for row in rows], ["layer", "shape", "pattern", "zeros", "exact"]))
    return rows


def _cells(row: LayerSparsity) -> list[str]:
    shape = "x".join(map(str, row.shape))
    return [row.name, shape, row.pattern or "dense", f"{100 * row.zeros:.1f} %", "yes" if row.exact else "no"]


def export_semi_structured(module: nn.Module, include: Sequence[str] | None = None) -> list[ExportedLayer]:
    """Check every Linear weight for 2:4 and convert those that fit to torch's semi-structured sparse tensors, in place.

    The conversion needs an NVIDIA GPU of compute capability 8.0 or later, half precision, and sizes that the sparse
    kernels take; the check works everywhere. Weights that stay as they are, are named with the reason.

    Args:
        module: The trained module, already on its device and in its dtype.
        include: Consider only parameters that these name patterns match.

    Returns:
        list[ExportedLayer]: One row for each Linear weight considered.

    Raises:
        ValueError: If not one Linear weight is 2:4 sparse, so that there is nothing to export.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[0.0, 1.0, 2.0, 0.0]])
        >>> export_semi_structured(layer)[0].converted
        False
    """
    rows, any_2_4 = [], False
    for name, owner, attribute in named_owners(module):
        if not isinstance(owner, nn.Linear) or attribute != "weight" or not selects(name, include):
            continue
        weight = owner.weight.detach()
        sparse = is_nm(weight, 2, 4)
        any_2_4 |= sparse
        reason = _why_not(weight) if sparse else "it is not 2:4 sparse"
        if not reason:
            reason = _convert(owner, weight)
        rows.append(ExportedLayer(clean_name(name), not reason, reason))
    if not any_2_4:
        raise ValueError("No Linear weight of this module is 2:4 sparse. Train it by NMSparsity(pattern='2:4') first.")
    for row in rows:
        if row.reason:
            rank_zero_info(f"export_semi_structured left {row.name} as it is: {row.reason}.")
    return rows


def _why_not(weight: Tensor) -> str:
    if weight.device.type != "cuda":
        return f"semi-structured kernels need an NVIDIA GPU, and it is on {weight.device}"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "semi-structured kernels need compute capability 8.0 or later"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"semi-structured kernels need float16 or bfloat16, and it is {weight.dtype}"
    return ""


def _convert(owner: nn.Linear, weight: Tensor) -> str:
    try:
        sparse = torch.sparse.to_sparse_semi_structured(weight)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    owner.weight = nn.Parameter(sparse, requires_grad=False)
    return ""
