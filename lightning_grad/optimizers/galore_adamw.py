"""GaLore as an optimizer of torch. Its rule is :func:`lightning_grad.functional.galore_adamw_`."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_grad.functional import galore_adamw_, gradient_basis, is_settled, pack_int4, unpack_int4
from lightning_grad.functional.optimizers.projection_rank import rank_within
from lightning_grad.optimizers.matrix_optimizer import MatrixOptimizer
from lightning_grad.utilities.checks import check_between, check_count, check_finite_at_least


class GaLoreAdamW(MatrixOptimizer):
    r"""AdamW in a low-rank part of each gradient, spanned by its singular vectors (GaLore, Q-GaLore).

    .. math::
        R = G B, \qquad W \leftarrow (1 - \eta \lambda) W - \eta \, \alpha \, \mathrm{Adam}(R) \, B^\top

    B holds ``rank`` singular vectors of a gradient on the smaller side of the matrix, from every ``update_gap``-th step.
    The moments have the size of R, so they take rank / min(shape) of the memory of AdamW's, and B half of that again
    for a square matrix. Every matrix that it is given is projected.

    With ``lazy=True``, a matrix whose first singular vector hardly turns doubles its own gap. With
    ``projector_bits=4``, B is rounded to 4 bits. The two are Q-GaLore, without its 8-bit weights and moments.

    Args:
        params: Matrices or groups of them.
        lr: Learning rate.
        betas: Decays of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        rank: Rank of each update; at most the smaller side of a matrix, to which it is lowered.
        update_gap: Decompose the gradient every this many steps.
        scale: Factor alpha of the update.
        lazy: Double the gap of a matrix when its first singular vector hardly turned in the last refreshes.
        cosine_threshold: Mean absolute cosine of the last first vectors from which the gap doubles.
        queue: Number of these cosines.
        projector_bits: 4 rounds B to 16 levels in groups of 256; None keeps it as it is.

    Raises:
        ValueError: If a parameter is not a real matrix, or an option is not valid.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(8, 4))
        >>> optimizer = GaLoreAdamW([w], lr=0.1, rank=2)
        >>> w.square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[w]["exp_avg"].shape, optimizer.state[w]["projector"].shape
        (torch.Size([8, 2]), torch.Size([4, 2]))

    References:
        Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024, arXiv
        2403.03507; rank, gap and scale of the example in the README of the released code. Zhang et al., "Q-GaLore:
        Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients", 2024, arXiv 2407.08296; threshold
        and queue of the released code.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 128,
        update_gap: int = 200,
        scale: float = 0.25,
        lazy: bool = False,
        cosine_threshold: float = 0.4,
        queue: int = 5,
        projector_bits: Literal[4] | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        projection = {"rank": rank, "update_gap": update_gap, "scale": scale, "projector_bits": projector_bits}
        laziness = {"lazy": lazy, "cosine_threshold": cosine_threshold, "queue": queue}
        super().__init__(params, {**defaults, **projection, **laziness})

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise if an option of a new group is not valid, and name the matrices whose rank is lowered."""
        super().check_group(group)
        check_count(group["rank"], 1, "rank")
        check_count(group["update_gap"], 1, "update_gap")
        check_count(group["queue"], 1, "queue")
        check_finite_at_least(group["scale"], 0.0, "scale")
        check_between(group["cosine_threshold"], 0.0, 1.0, "cosine_threshold")
        if group["projector_bits"] not in (None, 4):
            raise ValueError(f"projector_bits must be 4 or None; got {group['projector_bits']!r}.")
        self.name_lowered_ranks(group)

    def step_group(self, group: dict[str, Any]) -> None:
        """Update the parameters of a group that have a gradient."""
        options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "scale")}
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self._state_of(weight, group)
            if state["step"] == state["refresh_at"]:
                self._refresh(weight.grad, state, group)
            state["step"] += 1
            basis = self._basis_of(weight, state)
            galore_adamw_(weight, weight.grad, basis, state["exp_avg"], state["exp_avg_sq"], state["step"], **options)

    def _state_of(self, weight: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[weight]
        if not state:
            rank = rank_within(weight.shape, group["rank"])
            state.update(step=0, refresh_at=0, gap=group["update_gap"], decompositions=0)
            state["exp_avg"] = weight.new_zeros(max(weight.shape), rank)
            state["exp_avg_sq"] = weight.new_zeros(max(weight.shape), rank)
        return state

    def _refresh(self, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        basis = gradient_basis(gradient, state["exp_avg"].shape[1])
        state["decompositions"] += 1
        if group["lazy"]:
            self._note_turn(basis[:, 0].clone(), state, group)
        state["refresh_at"] = state["step"] + state["gap"]
        if group["projector_bits"] is None:
            state["projector"] = basis
        else:
            packed, step, low = pack_int4(basis)
            # The steps have the type of the weight, because torch gives loaded states this type.
            state.update(projector=packed, projector_step=step.to(basis.dtype), projector_low=low.to(basis.dtype))

    def _note_turn(self, direction: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """Compare the first direction with the one before, and double the gap if it has hardly turned lately."""
        if "direction" in state:
            cosine = float(torch.dot(direction, state["direction"]).abs())  # a host sync, as rare as a refresh
            state["cosines"] = [*state.get("cosines", []), cosine][-group["queue"] :]
            if is_settled(state["cosines"], group["cosine_threshold"], group["queue"]):
                state["gap"] *= 2
        state["direction"] = direction

    def _basis_of(self, weight: Tensor, state: Mapping[str, Any]) -> Tensor:
        if "projector_step" not in state:
            return state["projector"]  # type: ignore[no-any-return]
        shape = (min(weight.shape), state["exp_avg"].shape[1])
        return unpack_int4(state["projector"], state["projector_step"], state["projector_low"], shape).to(weight.dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. Packed bytes stay bytes, although torch gives them the type of the weight."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "projector_step" in state:
                state["projector"] = state["projector"].to(torch.uint8)

    def decompositions(self) -> tuple[int, int]:
        """Return how many decompositions were made, and how many a fixed gap would have made.

        Example:
            >>> w = torch.nn.Parameter(torch.eye(2))
            >>> optimizer = GaLoreAdamW([w], rank=1, update_gap=2, lazy=True, queue=1)
            >>> for _ in range(9):
            ...     w.grad = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
            ...     optimizer.step()
            >>> optimizer.decompositions()  # at steps 0, 2 and 6, instead of 0, 2, 4, 6 and 8
            (3, 5)
        """
        pairs = [(self.state[w], g["update_gap"]) for g in self.param_groups for w in g["params"] if w in self.state]
        made = sum(state["decompositions"] for state, _ in pairs)
        return made, sum(-(-state["step"] // gap) for state, gap in pairs)

    def notes(self) -> list[str]:
        """Return what :func:`lightning_grad.utilities.optimizer_report` says about this run, as sentences."""
        made, fixed = self.decompositions()
        saved = f", {fixed - made} fewer than with a fixed gap" if any(g["lazy"] for g in self.param_groups) else ""
        return [f"GaLoreAdamW decomposed gradients {made} times{saved}."]
