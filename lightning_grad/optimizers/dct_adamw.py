"""DCT-AdamW as an optimizer of torch. Its rule is :func:`lightning_grad.functional.dct_adamw_`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_grad.functional import dct_adamw_, dct_basis
from lightning_grad.functional.optimizers.projection_rank import rank_within
from lightning_grad.optimizers.matrix_optimizer import MatrixOptimizer
from lightning_grad.utilities.checks import check_count


class DCTAdamW(MatrixOptimizer):
    r"""AdamW in a low-rank part of each gradient, spanned by columns of the discrete cosine transform (DCT-AdamW).

    .. math::
        S = (g + e) Q, \qquad u = \mathrm{Adam}(S_C), \qquad w \leftarrow w - \eta \, u \, Q_C^\top

    C are the ``rank`` columns of S with the largest sum of absolute values. Moments have the size of S_C, so they take
    rank / min(shape) of the memory of AdamW's; the matrix Q is shared by all parameters of a size and never saved.
    Cosines come close to the best directions if neighboring entries of a row are alike; otherwise they are little better
    than random ones.

    Args:
        params: Matrices or groups of them.
        lr: Learning rate.
        betas: Decays of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        rank: Number of columns; at most the smaller side of a matrix, to which it is lowered.
        update_gap: Choose the columns again every this many steps.
        error_feedback: Add what a projection drops to the next gradient; takes the memory of a gradient.

    Raises:
        ValueError: If a parameter is not a real matrix, or an option is not valid.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(8, 4))
        >>> optimizer = DCTAdamW([w], lr=0.1, rank=2)
        >>> w.sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[w]["exp_avg"].shape
        torch.Size([8, 2])

    References:
        Modoranu et al., "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models", 2025, arXiv
        2505.17967. The gap is the default of the released code, which has none for the rank.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 128,
        update_gap: int = 1,
        error_feedback: bool = False,
    ) -> None:
        self._bases: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "rank": rank, "update_gap": update_gap, "error_feedback": error_feedback})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, and compute the bases again."""
        super().__setstate__(state)
        self._bases = {}

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise if an option of a new group is not valid, and name the matrices whose rank is lowered."""
        super().check_group(group)
        check_count(group["rank"], 1, "rank")
        check_count(group["update_gap"], 1, "update_gap")
        self.name_lowered_ranks(group)

    def step_group(self, group: dict[str, Any]) -> None:
        """Update the parameters of a group that have a gradient."""
        options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self._state_of(weight, group)
            refresh = state["step"] % group["update_gap"] == 0
            state["step"] += 1
            state["columns"] = dct_adamw_(
                weight,
                weight.grad,
                self._basis_of(weight),
                state.get("columns"),
                state["exp_avg"],
                state["exp_avg_sq"],
                state["step"],
                refresh=refresh,
                residual=state.get("residual"),
                **options,
            )

    def _state_of(self, weight: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[weight]
        if not state:
            rank = rank_within(weight.shape, group["rank"])
            state["step"] = 0
            state["exp_avg"] = weight.new_zeros(max(weight.shape), rank)
            state["exp_avg_sq"] = weight.new_zeros(max(weight.shape), rank)
            if group["error_feedback"]:
                state["residual"] = weight.new_zeros(max(weight.shape), min(weight.shape))
        return state

    def _basis_of(self, weight: Tensor) -> Tensor:
        key = (min(weight.shape), weight.dtype, weight.device)
        if key not in self._bases:
            self._bases[key] = dct_basis(*key)
        return self._bases[key]
