"""What ``GradientMonitor`` sees of one optimizer within a step, as tensors, until a log step asks for numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.callbacks.clipping._layers import LayerFinder, Layers
from lightning_grad.callbacks.clipping._monitor_record import MonitorRecord
from lightning_grad.functional import gradient_cosine, moment_signal_to_noise, zero_share
from lightning_grad.functional.tensor_lists import stack_norms, whole


@dataclass(frozen=True)
class Place:
    """Where in the run a step is: its number, the epoch, and the batch."""

    step: int
    epoch: int
    batch_idx: int


@dataclass
class _Row:
    place: Place
    numbers: Tensor  # norm before, norm after, loss
    skipped: bool


class OptimizerWatch:
    """Looks at the gradients of one optimizer before and after others have changed them.

    Args:
        optimizer: Whose gradients they are.
        names: Names of the parameters that are watched.
        parameters: The parameters.
        finder: Sorts them into layers.
        record: Where numbers go.
        scaled: Whether a GradScaler skips steps that overflow, which then is nothing bad.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        finder: LayerFinder,
        record: MonitorRecord,
        scaled: bool,
    ) -> None:
        self.optimizer = optimizer
        self.record = record
        self.parameters = list(parameters)
        self.first_bad: dict[str, Any] = {}
        self._named = list(zip(names, parameters, strict=True))
        self._finder = finder
        self._scaled = scaled
        self._rows: list[_Row] = []
        self._before: Tensor | None = None
        self._details: dict[str, Tensor] = {}
        self._layers: Layers | None = None
        self._snapshot: list[tuple[Tensor, Tensor]] = []
        self._previous: dict[str, Tensor] = {}
        self._seen_bad: Tensor | None = None
        self._bad_norms: dict[tuple[str, ...], Tensor] = {}
        self._roots: dict[tuple[str, ...], Tensor] = {}

    # Within a step.

    def look_before(self, loss: Tensor | None, measured: bool, rare: bool, keep: bool) -> Tensor | None:
        """Look at gradients that nothing has changed yet.

        Args:
            loss: Of the step, as ``training_step`` gave it.
            measured: Whether the step is logged, and layers are looked at.
            rare: Whether the costly things are measured too.
            keep: Whether the next step is logged and will be compared with this one.

        Returns:
            Tensor: Norm of all gradients; ``None`` if there are none.
        """
        present = [(name, p, p.grad) for name, p in self._named if p.grad is not None]
        self._before = None
        if not present:
            return None
        names = tuple(name for name, _, _ in present)
        gradients = [gradient for _, _, gradient in present]
        norms = stack_norms(gradients)
        self._before = torch.linalg.vector_norm(norms)
        self._remember_first_bad(names, norms, loss)
        if measured:
            self._measure(names, [p for _, p, _ in present], gradients, norms, rare)
        self._previous = {n: g.clone() for n, g in zip(names, gradients, strict=True)} if keep else {}
        return self._before

    def _remember_first_bad(self, names: tuple[str, ...], norms: Tensor, loss: Tensor | None) -> None:
        """Keep the norms of the first step that is not finite, without asking whether this one is."""
        bad = ~norms.isfinite().all()
        if self._scaled and loss is not None:
            bad = bad & ~loss.isfinite().all().to(norms.device)
        seen = torch.zeros_like(bad) if self._seen_bad is None else self._seen_bad
        kept = self._bad_norms.get(names)
        self._bad_norms[names] = torch.where(bad & ~seen, norms, torch.zeros_like(norms) if kept is None else kept)
        self._seen_bad = seen | bad

    def _measure(
        self, names: tuple[str, ...], parameters: list[Tensor], gradients: list[Tensor], norms: Tensor, rare: bool
    ) -> None:
        layers = self._layers = self._finder.find(names, gradients)
        self._details = {"norm": _join(norms, layers), "weight_norm": _join(stack_norms(parameters), layers)}
        self._snapshot = [(parameter, parameter.detach().clone()) for parameter in parameters]
        if names not in self._roots:
            self._roots[names] = torch.tensor([g.numel() ** 0.5 for g in gradients], device=norms.device)
        deviations = norms / self._roots[names]
        self._details["rms_min"] = deviations.min()
        eps = self.optimizer.param_groups[0].get("eps")
        if isinstance(eps, float):
            self._details["below_epsilon"] = (deviations < eps).float().mean()
        pairs = [(g, self._previous[n]) for n, g in zip(names, gradients, strict=True) if n in self._previous]
        if pairs:
            self._details["cosine"] = gradient_cosine([g for g, _ in pairs], [other for _, other in pairs])
        if rare:
            self._measure_rarely(gradients, parameters)

    def _measure_rarely(self, gradients: list[Tensor], parameters: list[Tensor]) -> None:
        self._details["zero_share"] = zero_share(gradients)
        betas = self.optimizer.param_groups[0].get("betas")
        states = [self.optimizer.state[p] for p in parameters if self.optimizer.state.get(p)]
        ratio = moment_signal_to_noise(states, betas[:2]) if betas else None
        if ratio is not None:
            self._details["signal_to_noise"] = ratio

    def look_after(self, loss: Tensor | None, place: Place, changed: bool) -> None:
        """Look at the gradients that the optimizer is about to use.

        Args:
            loss: Of the step.
            place: Where in the run the step is.
            changed: Whether something may have changed the gradients since :meth:`look_before`.
        """
        before = self._before
        if before is None:
            return
        after = before
        present = [p.grad for _, p in self._named if p.grad is not None]
        if not present:
            after = torch.full_like(before, math.nan)
        elif changed:
            after = torch.linalg.vector_norm(stack_norms(present))
        value = torch.full_like(before, math.nan) if loss is None else loss.detach().float().mean().to(before.device)
        self._rows.append(_Row(place, torch.stack([before, after, value]), not present))

    def look_at_update(self) -> None:
        """Compare the weights with those from before the optimizer's step."""
        if self._snapshot and self._layers is not None:
            updates = [parameter.detach() - old for parameter, old in self._snapshot]
            self._details["update_ratio"] = _join(stack_norms(updates), self._layers) / self._details["weight_norm"]
        self._snapshot = []

    # Between steps.

    def drain(self) -> None:
        """Turn what is waiting into numbers: the one place where the host waits."""
        if not self._rows:
            return
        numbers = torch.stack([row.numbers for row in self._rows]).tolist()
        for row, (before, after, loss) in zip(self._rows, numbers, strict=True):
            finite = math.isfinite(before)
            skipped = row.skipped or (self._scaled and not finite)
            self.record.add(row.place.step, before, after, skipped)
            expected = self._scaled and math.isfinite(loss)
            if not finite and not expected and not self.first_bad:
                self.first_bad = {**vars(row.place), "loss": loss, "norm": before, "parameters": self._bad_names()}
        self._rows = []

    def _bad_names(self) -> list[str]:
        for names, norms in self._bad_norms.items():
            bad = [name for name, norm in zip(names, norms.tolist(), strict=True) if not math.isfinite(norm)]
            if bad:
                return bad
        return []

    def take_details(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Return scalars, and values by layer, of the step that was measured."""
        details, layers = self._details, self._layers
        self._details, self._snapshot = {}, []
        if not details or layers is None:
            return {}, {}
        flat = torch.cat([value.reshape(-1) for value in details.values()]).tolist()
        scalars, by_layer = {}, {}
        for key, value in details.items():
            own, flat = flat[: value.numel()], flat[value.numel() :]
            if value.ndim:
                by_layer[key] = dict(zip(layers.names, own, strict=True))
            else:
                scalars[key] = own[0]
        return scalars, by_layer

    def gradients_for_histograms(self, top: int) -> Mapping[str, Tensor]:
        """Return up to ``top`` gradients of weights by name; whole ones, so every rank must ask."""
        weights = [(name, p.grad) for name, p in self._named if p.grad is not None and p.ndim > 1]
        return {name: whole(gradient) for name, gradient in weights[:top]}


def _join(norms: Tensor, layers: Layers) -> Tensor:
    return norms.new_zeros(len(layers.names)).index_add_(0, layers.index, norms.square()).sqrt()
