"""The measurements of ``GradientMonitor`` for one optimizer. They stay tensors until a log step reads them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.callbacks.diagnostics._monitor_record import MonitorRecord
from lightning_grad.functional import gradient_cosine, moment_signal_to_noise, zero_share
from lightning_grad.functional.gradients.tensor_lists import stack_norms, whole
from lightning_grad.functional.plain_tensors import on_plain_tensors, plain_tensor
from lightning_grad.utilities.layers import LayerFinder, Layers
from lightning_grad.utilities.optimizers import Shape, optimizer_shape

_MOST_ROWS = 4096  # waiting for a log step; a run that never logs waits for the device once per this many steps

_ALMOST = 0.5  # times the largest growth: parameters with less are no suspects

Named = Sequence[tuple[str, Tensor]]


@dataclass(frozen=True)
class Place:
    """The position of a step in the run: its number, the epoch, the batch, and the indices of its samples, if known."""

    step: int
    epoch: int
    batch_idx: int
    samples: tuple[int, ...] = ()


class OptimizerWatch:
    """Measure the gradients of one optimizer before and after other code changes them.

    Every vector has an entry for each watched parameter, zero if it has no gradient. Nothing must
    therefore be rebuilt when the set of parameters with a gradient changes from one step to the
    next.

    Args:
        optimizer: The optimizer.
        named: Names of the watched parameters, and the parameters.
        layer_depth: Join layers whose names agree in this many leading parts.
        record: Where numbers go.
        scaled: Whether a GradScaler skips steps that overflow; they then are not bad steps.
        spike_factor: Multiple of the usual norm above which a step is a spike; ``None`` for none.

    Attributes:
        spikes: Steps found since they were last taken, each with the names of the suspected parameters.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named: Named,
        layer_depth: int | None,
        record: MonitorRecord,
        scaled: bool,
        spike_factor: float | None = None,
    ) -> None:
        self.record = record
        self.first_bad: dict[str, Any] = {}
        self.spikes: list[dict[str, Any]] = []
        self._spike_factor = spike_factor
        self._norms: Tensor | None = None
        self._layer_depth = layer_depth
        self._scaled = scaled
        # Place, numbers (norm before, norm before clipping, norm after, loss), whether the step was skipped, and the
        # norm of each parameter.
        self._rows: list[tuple[Place, Tensor, bool, Tensor]] = []
        self._before: Tensor | None = None
        self._unclipped: Tensor | None = None
        self._details: dict[str, Tensor] = {}
        self._snapshot: list[tuple[Tensor, Tensor]] = []
        self.follow(optimizer, named)

    def follow(self, optimizer: Optimizer, named: Named) -> None:
        """Watch an optimizer from now on, with its current parameters."""
        self.drain()
        self.optimizer = optimizer
        self.shape: Shape = optimizer_shape(optimizer)
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self._layers: Layers | None = None
        self._roots: Tensor | None = None
        self._previous: dict[str, Tensor] = {}
        self._bad_norms: Tensor | None = None

    def _gradients(self) -> list[Tensor | None]:
        gradients = [parameter.grad for parameter in self.parameters]
        return [None if gradient is None else plain_tensor(gradient) for gradient in gradients]

    # Within a step.

    def look_before(self, loss: Tensor | None, measured: bool, slow: bool, keep: bool) -> Tensor | None:
        """Measure the gradients before anything changes them.

        Args:
            loss: Loss of the step, as ``training_step`` returned it.
            measured: Whether the step is logged, and layers are measured.
            slow: Whether to compute the slow statistics too.
            keep: Whether the next step is logged and will be compared with this one.

        Returns:
            Tensor: Norm of all gradients, or ``None`` if there are none.
        """
        gradients = self._gradients()
        self._before = self._unclipped = None
        if all(gradient is None for gradient in gradients):
            return None
        norms = self._norms = stack_norms(gradients)
        self._before = torch.linalg.vector_norm(norms)
        self._remember_first_bad(norms, loss)
        if measured:
            self._measure(gradients, norms, slow)
        present = zip(self.names, gradients, strict=True) if keep else ()
        self._previous = {name: gradient.clone() for name, gradient in present if gradient is not None}
        return self._before

    def _remember_first_bad(self, norms: Tensor, loss: Tensor | None) -> None:
        """Keep the norms of the first non-finite step on the device, so the host need not ask at every step."""
        if self._bad_norms is None:
            self._bad_norms = torch.zeros_like(norms)
        bad = ~norms.isfinite().all()
        if self._scaled and loss is not None:
            bad = bad & ~loss.isfinite().all().to(norms.device)
        self._bad_norms = torch.where(bad & self._bad_norms.isfinite().all(), norms, self._bad_norms)

    def _measure(self, gradients: list[Tensor | None], norms: Tensor, slow: bool) -> None:
        """Measure layers and keep the weights, for the update of this step."""
        if self._layers is None or self._roots is None:
            self._layers = LayerFinder(layer_depth=self._layer_depth).find(self.names, self.parameters)
            self._roots = torch.tensor([parameter.numel() ** 0.5 for parameter in self.parameters]).to(norms.device)
        present = [(n, p, g) for n, p, g in zip(self.names, self.parameters, gradients, strict=True) if g is not None]
        weights = [plain_tensor(parameter).detach() for parameter in self.parameters]
        self._details = {"norm": self._join(norms), "weight_norm": self._join(stack_norms(weights))}
        self._measured_norms = norms
        self._snapshot = [(p, weight.clone()) for p, weight in zip(self.parameters, weights, strict=True)]
        self._measure_vanishing(gradients, norms)
        pairs = [(g, self._previous[n]) for n, _, g in present if n in self._previous]
        if pairs:
            self._details["cosine"] = gradient_cosine([g for g, _ in pairs], [other for _, other in pairs])
        if slow:
            self._measure_slowly([g for _, _, g in present], [p for _, p, _ in present])

    def _measure_vanishing(self, gradients: list[Tensor | None], norms: Tensor) -> None:
        """Compare the root mean square of each gradient with the optimizer's eps."""
        zero, one = norms.new_zeros(()), norms.new_ones(())
        counts = torch.stack([one if g is not None and g.numel() else zero for g in gradients]) > 0
        assert self._roots is not None
        deviations = torch.where(counts, norms / self._roots, torch.inf)
        self._details["rms_min"] = deviations.min()
        eps = self.optimizer.param_groups[0].get("eps")
        if isinstance(eps, float):
            self._details["below_epsilon"] = (deviations < eps).sum() / counts.sum()

    def _measure_slowly(self, gradients: list[Tensor], parameters: list[Tensor]) -> None:
        self._details["zero_share"] = zero_share(gradients)
        betas = self.optimizer.param_groups[0].get("betas")
        states = [self.optimizer.state[p] for p in parameters if self.optimizer.state.get(p)]
        ratio = moment_signal_to_noise(states, betas[:2]) if betas else None
        if ratio is not None:
            self._details["signal_to_noise"] = ratio

    def look_before_clipping(self) -> None:
        """Measure gradients that are already changed and about to be clipped."""
        gradients = self._gradients()
        if self._before is not None and any(gradient is not None for gradient in gradients):
            self._unclipped = torch.linalg.vector_norm(stack_norms(gradients))

    def look_after(self, loss: Tensor | None, place: Place, changed: bool) -> None:
        """Measure the gradients that the optimizer is about to use.

        Args:
            loss: Loss of the step.
            place: Position of the step in the run.
            changed: Whether anything may have changed the gradients since :meth:`look_before`.
        """
        before, self._before = self._before, None
        if before is None:
            return
        after, gradients = before, self._gradients()
        gone = all(gradient is None for gradient in gradients)
        if gone:
            after = torch.full_like(before, math.nan)
        elif changed:
            after = torch.linalg.vector_norm(stack_norms(gradients))
        unclipped = before if self._unclipped is None else self._unclipped
        value = torch.full_like(before, math.nan) if loss is None else loss.detach().float().mean().to(before.device)
        numbers = [number.float() for number in (before, unclipped, after, value)]
        assert self._norms is not None
        self._rows.append((place, torch.stack(numbers), gone, self._norms))
        if len(self._rows) >= _MOST_ROWS:
            self.drain()

    @torch.no_grad()
    @on_plain_tensors
    def look_at_update(self) -> None:
        """Compare the weights with those from before the optimizer's step."""
        if self._snapshot:
            updates = [plain_tensor(parameter).detach() - old for parameter, old in self._snapshot]
            self._details["update_ratio"] = self._join(stack_norms(updates)) / self._details["weight_norm"]
        self._snapshot = []

    def _join(self, norms: Tensor) -> Tensor:
        assert self._layers is not None
        squares = norms.new_zeros(len(self._layers.names)).index_add_(0, self._layers.index, norms.square())
        return squares.sqrt()

    # Between steps.

    def drain(self) -> None:
        """Turn the waiting tensors into numbers. Only here the host waits for the device."""
        if not self._rows:
            return
        numbers = torch.stack([row[1] for row in self._rows]).tolist()
        for (place, _, skipped, norms), (before, unclipped, after, loss) in zip(self._rows, numbers, strict=True):
            finite = math.isfinite(before)
            usual = self.record.usual_norm()
            self.record.add_step(place.step, before, after, skipped or (self._scaled and not finite), unclipped)
            facts = {**vars(place), "samples": list(place.samples), "loss": loss, "norm": before}
            is_bad = not finite and not (self._scaled and math.isfinite(loss))
            if is_bad and not self.first_bad:
                self.first_bad = {**facts, "parameters": self._bad_names()}
            if is_bad or self._is_spike(before, usual):
                self.spikes.append({**facts, "usual_norm": usual, "suspects": self._suspects(norms.tolist())})
        self._rows = []

    def _is_spike(self, norm: float, usual: float | None) -> bool:
        return self._spike_factor is not None and usual is not None and norm > self._spike_factor * usual

    def _suspects(self, norms: Sequence[float]) -> dict[str, float]:
        """Return the non-finite gradients, or those that grew at least half as much as the one that grew the most.

        The growth is that since the last log step, or, before the first one, the norm itself.
        """
        named = dict(zip(self.names, norms, strict=False))
        bad = {name: norm for name, norm in named.items() if not math.isfinite(norm)}
        if bad:
            return bad
        known = self.record.reference
        grown = {name: norm / (known.get(name) or math.inf) for name, norm in named.items()} if known else named
        largest = max(grown.values(), default=0.0)
        return {name: growth for name, growth in grown.items() if growth >= _ALMOST * largest and largest > 0}

    def _bad_names(self) -> list[str]:
        norms = [] if self._bad_norms is None else self._bad_norms.tolist()
        return [name for name, norm in zip(self.names, norms, strict=False) if not math.isfinite(norm)]

    def take_details(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Return the scalars and the values by layer of the last measured step, and forget them."""
        details, layers = self._details, self._layers
        self._details, self._snapshot = {}, []
        if not details or layers is None:
            return {}, {}
        finite = zip(self.names, self._measured_norms.tolist(), strict=True)
        self.record.reference = {name: norm for name, norm in finite if math.isfinite(norm) and norm > 0}
        flat = torch.cat([value.reshape(-1) for value in details.values()]).tolist()
        scalars, by_layer = {}, {}
        for key, value in details.items():
            own, flat = flat[: value.numel()], flat[value.numel() :]
            if value.ndim:
                by_layer[key] = dict(zip(layers.names, own, strict=True))
            else:
                scalars[key] = own[0]
        return scalars, by_layer

    def gradients_for_histograms(self, max_layers: int) -> Mapping[str, Tensor]:
        """Return up to ``max_layers`` gradients of weights by name. Shards are joined, so every rank must call it."""
        weights = [(n, p.grad) for n, p in zip(self.names, self.parameters, strict=True) if p.ndim > 1]
        return {name: whole(gradient) for name, gradient in weights[:max_layers] if gradient is not None}
