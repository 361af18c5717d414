"""One sparse weight: its mask now, and what the forward pass sees of it. Which weights are chosen is in ``_nm_choice.py``.

Used by :class:`lightning_grad.callbacks.NMSparsity` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grad.core.portable import pack_bits, unpack_bits
from lightning_grad.core.weight_view import InPlaceView
from lightning_grad.functional import NMPattern, NMPhase, nm_mask, prune, scale_weight
from lightning_grad.functional.nm_schedule import DENSE
from lightning_grad.utilities.parameters import clean_name


class SparseWeight:
    """A dense parameter and its N:M mask; the view through which the module sees it.

    Args:
        name: Full name of the parameter, as in ``state_dict``.
        module: The module that owns it.
        attribute: Its name there.
        pattern: The pattern it ends with.
        dim: Dimension in which the groups lie.
        in_place: Whether the module is shown the weight by writing it into the parameter.
        others: Other owners of the same, tied parameter, each with its attribute.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        attribute: str,
        pattern: NMPattern,
        dim: int,
        in_place: bool = False,
        others: Sequence[tuple[nn.Module, str]] = (),
    ) -> None:
        self.name = name
        self.module = module
        self.attribute = attribute
        self.pattern = pattern
        self.dim = dim
        self.in_place = in_place
        self.others = others
        self.exposed: InPlaceView | None = None
        self.straight_through = False
        self.phase: NMPhase = DENSE
        self.factor: Tensor | None = None
        self.inference: Tensor | None = None
        self._mask_age = 0
        self._version = -1

    @property
    def parameter(self) -> nn.Parameter:
        """The dense weight."""
        found = self.module._parameters.get(self.attribute)
        if found is None:
            raise RuntimeError(
                f"NMSparsity makes {clean_name(self.name)} sparse, and something has taken it out of its layer in mid-fit, as "
                "pruning, weight_norm, spectral_norm and parametrize do. Do that before the fit, or leave the layer out: "
                f"exclude=[{clean_name(self.name)!r}]."
            )
        return found

    @property
    def dense(self) -> Tensor:
        """The dense weight's values, also while a step computes with others in its place."""
        return self.parameter.detach() if self.exposed is None else self.exposed.dense

    @property
    def size(self) -> int:
        """Size of the dimension in which the groups lie."""
        return self.parameter.shape[self.dim]

    @property
    def mask(self) -> Tensor | None:
        """The mask in use, in the weight's dtype; ``None`` while no weight is outside of one."""
        if self.factor is None or self.phase.decay == 0.0:
            return self.factor
        return None if self.phase.decay >= 1.0 else (self.factor == 1.0).to(self.factor.dtype)

    def value(self, dense: Tensor) -> Tensor:
        """Return what the forward pass uses."""
        if self.inference is not None:
            return self.inference
        if self.factor is None:
            return dense
        return scale_weight(dense, self.factor, self.straight_through)

    def stored(self, dense: Tensor) -> Tensor:
        """Return what inference and checkpoints use: always under the mask of these very values.

        The mask that trains may be some steps old (``mask_every``), and weight averaging brings other weights; this is
        right for both.
        """
        return dense if self.phase.pattern is None else prune(dense, self._factor_of(dense))

    def _factor_of(self, dense: Tensor) -> Tensor:
        assert self.phase.pattern is not None
        mask = nm_mask(dense, self.phase.pattern.n, self.phase.pattern.m, self.dim)
        return mask.clamp_(min=self.phase.decay) if self.phase.decay > 0.0 else mask

    def refresh(self, phase: NMPhase, mask_every: int = 1) -> None:
        """Take the mask anew from the dense weight, or only the decay value while the mask is young enough."""
        mask = self.mask if phase.pattern == self.phase.pattern and self._mask_age + 1 < mask_every else None
        self.phase = phase
        self._mask_age = 0 if mask is None else self._mask_age + 1
        self._version = self.parameter._version
        if phase.pattern is None:
            self.factor = None
        elif mask is None:
            self.factor = self._factor_of(self.dense)
        else:
            self.factor = mask.clamp(min=phase.decay)

    def refresh_if_changed(self) -> None:
        """Take the mask anew if something other than the optimizer (a load) has changed the weight."""
        if self.parameter._version != self._version:
            self.refresh(self.phase)

    def enter_inference(self) -> None:
        """Show what a checkpoint would hold, whichever weights are in the parameter now."""
        self.inference = None if self.phase.pattern is None else self.stored(self.dense)

    def leave_inference(self) -> None:
        """Show the training weights again."""
        self.inference = None

    @torch.no_grad()
    def bake(self) -> None:
        """Make the stored weight the parameter's own."""
        self.parameter.copy_(self.stored(self.parameter.detach()))

    def clear_pruned(self, state: Mapping[str, Any]) -> None:
        """Clear what an optimizer remembers of pruned entries, once the pattern is final."""
        if self.phase.final and self.mask is not None:
            for value in state.values():
                if isinstance(value, Tensor) and value.is_floating_point() and value.shape == self.parameter.shape:
                    value.mul_(self.mask)

    def state_dict(self) -> dict[str, Any]:
        """Return what a mask that is older than its weight needs to go on."""
        mask = self.mask
        return {"age": self._mask_age, "mask": pack_bits(mask)} if self._mask_age and mask is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved mask, after :meth:`refresh`."""
        if state and self.factor is not None:
            mask = unpack_bits(state["mask"], self.factor).to(self.factor.dtype)
            self.factor, self._mask_age = mask.clamp_(min=self.phase.decay), int(state["age"])
