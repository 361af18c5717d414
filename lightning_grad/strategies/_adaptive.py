"""Levels of compression that differ between layers and follow the gradients: L-GreCo.

``dgc.py`` and ``powersgd.py`` derive from it: a level is a share of entries or a rank. The mathematics is in
``functional/communication/lgreco.py``.
"""

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_grad.core.fit import until_next_fit
from lightning_grad.functional import choose_levels, feedback_errors
from lightning_grad.functional.communication.lgreco import total_at
from lightning_grad.strategies._buckets import Gradient
from lightning_grad.strategies._rank_files import State
from lightning_grad.strategies.compressed_ddp import CompressedDDPStrategy
from lightning_grad.utilities.checks import check_count

Adapt = Literal["lgreco", "lgreco_feedback"]

LEVEL_FACTORS = tuple(2 ** (quarter / 4) for quarter in range(-12, 13))
"""Levels of a layer, relative to that of the uniform setting: from an eighth to eight times."""

_SEEN = "seen"
_PLAN = "plan"


class AdaptiveDDP(CompressedDDPStrategy):
    """A scheme whose level may differ between layers.

    With ``adapt`` each rank adds up the gradients of each adapted layer. At the first exchange of an epoch, or of each
    ``adapt_every`` steps, it measures the error of every level on these sums: that of one message with ``'lgreco'``, or
    of what error feedback accumulates with ``'lgreco_feedback'``. The errors are averaged over the ranks, rank 0 plans,
    and all ranks get its choice. Subclasses call :meth:`check_adapt` in their constructor, define what a level is, and
    call ``super().accumulate(gradients)`` first.

    Attributes:
        levels: Planned level of each layer, by name; empty before the first plan.
    """

    level_word: ClassVar[str]
    """What a level is, for messages."""
    plan_settings: ClassVar[frozenset[str]]
    """Settings whose change makes earlier plans obsolete."""

    adapt: Adapt | None
    adapt_every: int | None

    # Needed by checkpoints that are written after the fit or after an exception.
    levels = until_next_fit.of(dict[str, float])
    _period = until_next_fit[int | None](lambda _: None)
    _plan_figures = until_next_fit.of(dict[str, float])

    # What a scheme defines.

    @abstractmethod
    def uniform_level(self, name: str) -> float:
        """Return the level of a layer that the settings ask for."""

    @abstractmethod
    def possible_levels(self, name: str) -> list[float]:
        """Return the levels between which a plan may choose, the uniform level among them."""

    @abstractmethod
    def level_bytes(self, name: str, level: float) -> int:
        """Return the bytes of a compressed gradient in the messages of one step."""

    @abstractmethod
    def level_errors(self, name: str, seen: Tensor, levels: Sequence[float]) -> Tensor:
        """Return the squared error of a flat gradient at each level, float64."""

    def is_adapted(self, name: str) -> bool:
        """Return whether plans choose the level of a layer."""
        return self.adapt is not None

    def level_of(self, name: str) -> float:
        """Return the current level of a layer."""
        return self.levels[name] if name in self.levels else self.uniform_level(name)

    def check_adapt(self, adapt: Adapt | None, adapt_every: int | None) -> None:
        """Check and store the arguments of the constructor.

        Raises:
            ValueError: If ``adapt_every`` is below 1, or set without ``adapt``.
        """
        self.adapt, self.adapt_every = adapt, check_count(adapt_every, 1, "adapt_every")
        if adapt is None and adapt_every is not None:
            raise ValueError(f"adapt_every={adapt_every} has no effect without adapt. Set adapt='lgreco', or drop it.")

    @property
    def syncs_per_step(self) -> str:
        """Why a step waits for the device; empty if none does."""
        return "" if self.adapt is None else "a plan of the levels of all layers is made on the host, once per period"

    # One step.

    @override
    def accumulate(self, gradients: Sequence[Gradient]) -> None:
        if self.adapt is None:
            return
        self._plan_if_due()
        for gradient in gradients:
            if self.is_adapted(gradient.name):
                memory = self.memory.setdefault(gradient.name, {})
                if _SEEN not in memory:
                    kind = torch.promote_types(gradient.values.dtype, torch.float32)
                    memory[_SEEN] = torch.zeros_like(gradient.values, dtype=kind)
                memory[_SEEN].add_(gradient.values)

    def _plan_if_due(self) -> None:
        period = self._trainer.current_epoch if self.adapt_every is None else self.step // self.adapt_every
        # A layer that no rank used keeps its level. All ranks have accumulated the same layers.
        names = [name for name in self._order if _SEEN in self.memory.get(name, {})]
        if self._period not in (None, period) and names:
            self._plan(names)
            for name in names:  # not before: if another rank is lost while they plan, the run that resumes plans
                del self.memory[name][_SEEN]
        self._period = period

    def _plan(self, names: Sequence[str]) -> None:
        begin = time.perf_counter()
        possible = [self.possible_levels(name) for name in names]
        seen = [self.memory[name][_SEEN] for name in names]
        measured = [self._measure_errors(*layer) for layer in zip(names, seen, possible, strict=True)]
        mean = self.ranks.mean_(torch.cat(measured)).cpu()
        if not mean.isfinite().all():  # the sums have overflowed, on any rank: all keep their levels
            return
        errors = [layer.tolist() for layer in torch.split(mean, [len(levels) for levels in possible])]
        sizes = [[self.level_bytes(n, level) for level in levels] for n, levels in zip(names, possible, strict=True)]
        uniform = [_index(levels, self.uniform_level(name)) for name, levels in zip(names, possible, strict=True)]
        used = [_index(levels, self.level_of(name)) for name, levels in zip(names, possible, strict=True)]
        # Other ranks may round the numbers of the program in another way on other hardware, so only one plans.
        plan = choose_levels(errors, sizes, uniform) if self.is_global_zero else uniform
        chosen = self.ranks.begin_copy_(torch.tensor(plan, dtype=torch.int32, device=self.root_device))().tolist()
        is_first = not self.levels
        self.levels |= {name: levels[at] for name, levels, at in zip(names, possible, chosen, strict=True)}
        seconds = time.perf_counter() - begin
        sent, of_uniform = total_at(sizes, chosen), total_at(sizes, uniform)
        self._plan_figures = {"plan_bytes": sent / of_uniform, "plan_ms": 1000 * seconds}
        words = f"{len(names)} layers in {seconds:.2g} s: {sent:,.0f} bytes per step instead of {of_uniform:,.0f}"
        if not is_first and total_at(errors, uniform) > 0.0:
            self._plan_figures["plan_error"] = total_at(errors, used) / total_at(errors, uniform)
            words += (
                f"; the plan before had {self._plan_figures['plan_error']:.3g} times the error of the uniform setting"
            )
        least, most = (pick(self.levels[name] for name in names) for pick in (min, max))
        rank_zero_info(f"{self.display_name} planned {self.level_word}s from {least:.3g} to {most:.3g} for {words}.")

    def _measure_errors(self, name: str, seen: Tensor, levels: Sequence[float]) -> Tensor:
        errors = self.level_errors(name, seen, levels)
        if self.adapt == "lgreco":
            return errors
        return feedback_errors(errors, torch.linalg.vector_norm(seen, dtype=torch.float64).square())

    @override
    def figures(self) -> dict[str, float]:
        return {**super().figures(), **self._plan_figures}

    @override
    def sent_bytes(self, name: str, shape: torch.Size, itemsize: int) -> int:
        return self.level_bytes(name, self.level_of(name))

    @override
    def _layers(self) -> list[dict[str, Any]]:
        rows = super()._layers()
        if self.adapt is None:
            return rows
        planned = [self.level_of(row["layer"]) if row["layer"] in self._chosen else "" for row in rows]
        return [{**row, self.level_word: level} for row, level in zip(rows, planned, strict=True)]

    # The saved state.

    @override
    def rank_state(self) -> State:
        own, shared = super().rank_state()
        plan = {"levels": dict(self.levels), "period": self._period, "figures": dict(self._plan_figures)}
        return own, {**shared, _PLAN: plan}

    @override
    def forget_rank_state(self) -> None:
        super().forget_rank_state()
        self.levels, self._period, self._plan_figures = {}, None, {}

    @override
    def load_rank_state(self, own: Mapping[str, Any], shared: Mapping[str, Any], changed: set[str]) -> None:
        super().load_rank_state(own, shared, changed)
        for name, kept in self.memory.items():
            if not self.is_adapted(name):
                kept.pop(_SEEN, None)
        plan = shared.get(_PLAN, {"levels": {}, "period": None, "figures": {}})
        if "adapt_every" not in changed:  # it counts other periods
            self._period = plan["period"]
        if not changed & self.plan_settings:
            self.levels = {name: level for name, level in plan["levels"].items() if name in self._chosen}
            self._plan_figures = dict(plan["figures"])
        elif plan["levels"]:
            rank_zero_info(f"{self.display_name} drops the {self.level_word}s that were planned for other settings.")


def _index(levels: Sequence[float], level: float) -> int:
    return min(range(len(levels)), key=lambda at: abs(levels[at] - level))
