"""Report which weights of a trained module are N:M sparse, and convert 2:4 weights for sparse hardware."""

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
    """The sparsity of one weight, from :func:`sparsity_report`.

    Args:
        name: Name of the parameter.
        shape: Shape of the parameter.
        pattern: The given pattern, or the sparsest one that the weight satisfies along its inputs, if any.
        zeros: Fraction of zeros, 0 to 1.
        exact: Whether every group has at most N nonzero entries.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str | None
    zeros: float
    exact: bool


@dataclass(frozen=True)
class ExportedLayer:
    """The result of :func:`export_semi_structured` for one weight.

    Args:
        name: Name of the parameter.
        converted: Whether it was converted to a semi-structured sparse tensor.
        reason: Why it was not converted; empty otherwise.
    """

    name: str
    converted: bool
    reason: str


def sparsest_pattern(weight: Tensor, dim: int = 1) -> NMPattern | None:
    """Return the sparsest N:M pattern that a weight satisfies along its inputs, or ``None`` if it is dense.

    Args:
        weight: Any shape.
        dim: The input dimension.

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
    """Report the sparsity and the N:M pattern of every weight with two or more dimensions.

    Works on any module, however it was trained. Custom layers with a weight of shape (in, out) are recognized by what
    they compute. During a fit, the report is about the weights that a checkpoint would contain.

    Args:
        module: Any module.
        pattern: N:M pattern to check; ``None`` finds the sparsest that each weight satisfies.
        include: Name patterns of the parameters to report; ``None`` reports all.
        verbose: Also print the table.

    Returns:
        list[LayerSparsity]: One row per weight, in the order of the module.

    Raises:
        ValueError: If ``pattern`` is not an N:M pattern.

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
    """Convert all 2:4 sparse Linear weights to torch's semi-structured sparse tensors, in place.

    The conversion needs an NVIDIA GPU of compute capability 8.0 or later, half precision, and sizes that the sparse
    kernels support; the check for 2:4 works everywhere. Weights that are not converted are listed with the reason.

    Args:
        module: The trained module, on its final device and in its final dtype.
        include: Name patterns of the parameters to consider; ``None`` considers all.

    Returns:
        list[ExportedLayer]: One row for each Linear weight considered.

    Raises:
        ValueError: If no Linear weight is 2:4 sparse.

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
        raise ValueError(
            "No Linear weight of this module is 2:4 sparse. Train it with NMSparsity(pattern='2:4') first."
        )
    for row in rows:
        if row.reason:
            rank_zero_info(f"export_semi_structured did not convert {row.name}: {row.reason}.")
    return rows


def _why_not(weight: Tensor) -> str:
    if weight.device.type != "cuda":
        return f"semi-structured kernels need an NVIDIA GPU, but it is on {weight.device}"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "semi-structured kernels need compute capability 8.0 or later"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"semi-structured kernels need float16 or bfloat16, but it is {weight.dtype}"
    return ""


def _convert(owner: nn.Linear, weight: Tensor) -> str:
    try:
        sparse = torch.sparse.to_sparse_semi_structured(weight)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    owner.weight = nn.Parameter(sparse, requires_grad=False)
    return ""
