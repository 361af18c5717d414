"""FRUGAL as an optimizer of torch. Its rule is :func:`lightning_grad.functional.frugal_`."""

from collections.abc import Mapping
from random import Random
from typing import Any, Literal, get_args

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from lightning_grad.functional import active_rows, frugal_
from lightning_grad.functional.choices import check_choice
from lightning_grad.functional.shuffling import hashed_seed
from lightning_grad.optimizers.matrix_optimizer import MatrixOptimizer
from lightning_grad.utilities.checks import check_between, check_count, check_finite_at_least

BlockOrder = Literal["random", "ascending", "descending"]


class Frugal(MatrixOptimizer):
    r"""AdamW for a block of rows that moves through the matrices, and signSGD for the rest (FRUGAL).

    .. math::
        w_B \leftarrow w_B - \eta \, \mathrm{Adam}(g_B), \qquad
        w_{\bar B} \leftarrow w_{\bar B} - \eta \, s \, \mathrm{sign}(g_{\bar B})

    All rows of a group stand in one line, and the block B is a stretch of it with at most ``density`` of the entries.
    So the moments take at most ``density`` of the memory of AdamW's. When the block moves, the moments of matrices
    whose rows change start at zero; a matrix that stays in the block with the same rows keeps them.

    Args:
        params: Matrices or groups of them. Blocks are chosen within a group.
        lr: Learning rate.
        betas: Decays of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay of all entries.
        density: Largest share of the entries in the block, from 0 (signSGD) to 1 (AdamW).
        update_gap: Move the block every this many steps.
        inactive_lr_scale: Factor s of the learning rate outside the block; 0.1 is usual in fine-tuning.
        order: "random" blocks, or "ascending" or "descending" through the parameters.
        seed: Seed of the random order.

    Raises:
        ValueError: If a parameter is not a real matrix, an option is not valid, or the block has no room for a row.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(4, 8))
        >>> optimizer = Frugal([w], lr=0.1, density=0.25)
        >>> w.sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[w]["exp_avg"].shape
        torch.Size([1, 8])

    References:
        Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training", ICML
        2025, arXiv 2411.07837. Defaults of the released code, which takes whole matrices as blocks and resets all
        moments when it moves.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density: float = 0.25,
        update_gap: int = 200,
        inactive_lr_scale: float = 1.0,
        order: BlockOrder = "random",
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "density": density}
        own = {"update_gap": update_gap, "inactive_lr_scale": inactive_lr_scale, "order": order, "seed": seed}
        super().__init__(params, {**defaults, **own, "steps": 0, "rows": [], "next_row": 0})

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise if an option of a new group is not valid."""
        super().check_group(group)
        density = check_between(group["density"], 0.0, 1.0, "density")
        check_count(group["update_gap"], 1, "update_gap")
        check_finite_at_least(group["inactive_lr_scale"], 0.0, "inactive_lr_scale")
        check_choice(group["order"], get_args(BlockOrder), "order")
        shapes = [weight.shape for weight in group["params"]]
        total, row = sum(rows * columns for rows, columns in shapes), max((columns for _, columns in shapes), default=0)
        if density > 0.0 and int(density * total) < row:
            raise ValueError(
                f"density={density:g} of {total} entries has no room for a row of {row}. Use at least "
                f"{row / total:.2g}, or 0 for signSGD."
            )

    @_disable_dynamo  # its blocks change too often to be compiled
    def step_group(self, group: dict[str, Any]) -> None:
        """Update the parameters of a group that have a gradient, and count the step if there is one."""
        if all(weight.grad is None for weight in group["params"]):
            return  # a step that was skipped, which is no step of AdamW either
        if group["steps"] % group["update_gap"] == 0:
            self._move_block(group)
        group["steps"] += 1
        options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "inactive_lr_scale")}
        for weight, rows in zip(group["params"], group["rows"], strict=True):
            if weight.grad is not None:
                state = self._state_of(weight, rows[1]) if rows[1] else {}
                mean, square = state.get("exp_avg"), state.get("exp_avg_sq")
                frugal_(weight, weight.grad, rows, mean, square, state.get("step", 0), **options)

    def _move_block(self, group: dict[str, Any]) -> None:
        """Choose the next block, and drop the moments of the matrices whose rows change."""
        weights, start = group["params"], group["next_row"]
        places = list(range(len(weights)))
        if group["order"] == "descending":
            places.reverse()
        elif group["order"] == "random":
            # From the saved count of steps, so it is equal on all ranks and after a resume.
            stream = Random(hashed_seed(group["seed"], group["steps"]))
            stream.shuffle(places)
            start = stream.randrange(sum(map(len, weights)))
        found = active_rows([weights[place].shape for place in places], group["density"], start)
        blocks = [list(rows) for _, rows in sorted(zip(places, found, strict=True))]
        for weight, old, new in zip(weights, group["rows"] or blocks, blocks, strict=True):
            if old != new:
                self.state.pop(weight, None)
        group["rows"], group["next_row"] = blocks, start + sum(count for _, count in found)

    def _state_of(self, weight: torch.Tensor, count: int) -> dict[str, Any]:
        state: dict[str, Any] = self.state[weight]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(weight[:count])
            state["exp_avg_sq"] = torch.zeros_like(weight[:count])
        state["step"] += 1
        return state
