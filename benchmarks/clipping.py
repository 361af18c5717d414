"""The cost of clipping: ratios to the functions of torch, to published code, and to a fit without the callback.

All variants are interleaved with their baseline in rotating order, and the median over the rounds counts. Gradients are
refilled before every timed call, which is not timed, so every call clips the same values. There are two lists of gradients:
with many small tensors the number of operations decides, and with few large ones the memory traffic.

The last tables are steps of a real ``Trainer.fit`` with a logger, over one whole log interval of 50 steps, so the expensive
log step counts as one in 50. The fits take turns step by step. Work at the end of a fit is not counted.

With one thread the scripts measure processor time, which excludes the time that other processes get. With more threads or
on a GPU they measure wall-clock time.

::

    python benchmarks/clipping.py --quick
    python benchmarks/clipping.py --out clipping.json
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from benchmarks.common import (
    Clock,
    convnet,
    in_turns,
    machine,
    quiet_trainer,
    rotated,
    show,
    show_missed,
    silence,
    speed_options,
    timed_fit,
    transformer,
    write_tables,
)
from benchmarks.rows import AGAIN, Row
from lightning_grad import callbacks
from lightning_grad.callbacks import (
    AdaptiveGradientClipping,
    AutoClip,
    NormalizedGradient,
    NormClipping,
    SpikeClipping,
    ZClip,
)
from lightning_grad.core.conditioner import GradientConditioner
from lightning_grad.functional import (
    add_gradient_noise_,
    autoclip_state,
    autoclip_threshold_,
    centralize_,
    clip_adaptively_,
    clip_layers_,
    clip_norm_,
    clip_spikes_,
    clip_to_threshold_,
    clip_value_,
    layer_limits,
    nonfinite,
    normalize_gradients_,
    normalize_layers_,
    total_norm,
    zclip_state,
    zclip_threshold_,
)
from lightning_grad.functional.gradients.tensor_lists import joined_norm

TINY, LARGE = "400 tiny tensors", "64 M entries"
SHAPES: dict[str, list[tuple[int, ...]]] = {
    TINY: [(16, 16), (256,), (8, 40), (320,)] * 100,
    LARGE: [(2048, 2048), (2048,)] * 16,
}
PASS_BUDGET, UNCLIPPED_BUDGET, SPIKES_BUDGET, FEW_SPIKES_BUDGET = 1.15, 0.55, 2.5, 1.2
NORM_BUDGET, STATISTICS_BUDGET, AGC_BUDGET, MONITOR_BUDGET, PUBLISHED_FACTOR = 1.0, 1.5, 0.6, 1.03, 3.0
NORMALIZE_BUDGET = 1.05  # of norm clipping
NORM, MAX_NORM, CLIP_VALUE, RATIO, EPS = 5.0, 1.0, 1e-3, 0.01, 1e-3  # NORM: joint norm of all gradients
WINDOW, FEW, PERCENTILE = 4096, 16, 10.0
MEAN, VARIANCE, Z_THRESHOLD, ALPHA = 1.0, 0.04, 2.5, 0.97
LOG_EVERY = 50  # the Trainer's default
ONE_NORM, ONE_DRAW = "torch norm of each tensor", "torch normal_"
TORCH_NORM, TORCH_VALUE, TIMM_LOOP = "torch clip_grad_norm_", "torch clip_grad_value_", "AGC as in timm, a loop"
FULL_WINDOW, EMPTY_WINDOW = f"AutoClip, {WINDOW} norms in the window", f"AutoClip, {FEW} norms in the window"
MODELS: dict[str, Callable[[], tuple[LightningModule, Any]]] = {
    "a residual convnet, width 32, 32 images of 3x32x32, AdamW": convnet,
    "a transformer, 4 layers of width 256, 4 x 256 tokens, AdamW": transformer,
}


# Published implementations, with the same operations.


@dataclass
class PublishedZClip:
    """ZClip after its warm-up: a loop over the parameters for the squares, a loop to scale them, numbers in Python."""

    mean: float = MEAN
    variance: float = VARIANCE

    def __call__(self, parameters: Sequence[Tensor]) -> None:
        """Clip the gradients of the parameters."""
        squares = [p.grad.to(p.dtype).square().sum() for p in parameters if p.grad is not None]
        norm = torch.stack(squares).sum().sqrt().item()
        deviation = self.variance**0.5
        z = (norm - self.mean) / (deviation + 1e-6)
        threshold = self.mean + Z_THRESHOLD * deviation / (z / Z_THRESHOLD) if z > Z_THRESHOLD else norm
        largest = min(threshold, MAX_NORM)
        if norm > largest:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(largest / (norm + 1e-6))
        self.mean = ALPHA * self.mean + (1 - ALPHA) * threshold
        self.variance = ALPHA * self.variance + (1 - ALPHA) * (threshold - self.mean) ** 2


@dataclass
class PublishedAutoClip:
    """AutoClip: a loop that waits for every norm, a list of all norms so far, and torch's clip."""

    norms: list[float]

    def __call__(self, parameters: Sequence[Tensor]) -> None:
        """Clip the gradients of the parameters."""
        squares = 0.0
        for parameter in parameters:
            if parameter.grad is not None:
                squares += parameter.grad.norm(2).item() ** 2
        self.norms.append(squares**0.5)
        clip_grad_norm_(parameters, float(np.percentile(self.norms, PERCENTILE)))


def clip_adaptively_as_timm(parameters: Sequence[Tensor], ratio: float = RATIO, eps: float = EPS) -> None:
    """Clip with timm's formula, one parameter after the other."""
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        largest = _unit_norms(parameter.detach()).clamp_(min=eps).mul_(ratio)
        norm = _unit_norms(gradient)
        clipped = gradient * (largest / norm.clamp(min=1e-6))
        gradient.copy_(torch.where(norm < largest, gradient, clipped))


def _unit_norms(x: Tensor) -> Tensor:
    norms: Tensor = x.norm(2) if x.ndim <= 1 else x.norm(2, dim=tuple(range(1, x.ndim)), keepdim=True)
    return norms


# The functions of this package, as the callbacks call them.


def autoclip_of(gradients: Sequence[Tensor], seen: int) -> Callable[[], object]:
    """Return a call of AutoClip whose window holds ``seen`` norms."""
    state = autoclip_state(WINDOW, gradients[0].device)
    state["norms"][:seen] = torch.tensor(past_norms(seen))
    state["count"].fill_(seen)

    def clip() -> None:
        norm = joined_norm(gradients)
        clip_to_threshold_(gradients, norm, autoclip_threshold_(norm, state, PERCENTILE))

    return clip


def past_norms(count: int) -> list[float]:
    """Return norms as in a typical run."""
    return [float(norm) for norm in np.random.default_rng(0).uniform(0.2, 1.2, count) * NORM]


def zclip_of(gradients: Sequence[Tensor]) -> Callable[[], object]:
    """Return a call of ZClip after its warm-up."""
    state = zclip_state(gradients[0].device)
    for key, value in (("count", 1000.0), ("mean", MEAN), ("variance", VARIANCE)):
        state[key].fill_(value)

    def clip() -> None:
        norm = joined_norm(gradients)
        clip_to_threshold_(gradients, norm, zclip_threshold_(norm, state, Z_THRESHOLD, ALPHA, MAX_NORM))

    return clip


# Gradients, and the calls that are timed on them.


class Gradients:
    """Parameters with gradients that can be restored.

    Args:
        parameters: Parameters that get random gradients with a joint norm of 5.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.originals = [torch.randn_like(parameter).detach() for parameter in self.parameters]
        torch._foreach_mul_(self.originals, NORM / float(total_norm(self.originals)))
        self.gradients = [original.clone() for original in self.originals]
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def refill(self) -> None:
        """Restore the gradients."""
        torch._foreach_copy_(self.gradients, self.originals)


@dataclass(frozen=True)
class Case:
    """A call to time. ``baseline`` is the name of another case; ``budget`` limits the ratio to it."""

    name: str
    call: Callable[[], object]
    baseline: str = TORCH_NORM
    budget: float | None = None
    at_least: bool = False


def function_cases(found: Gradients, tiny: bool) -> list[Case]:
    """Return all functions, with torch and published code as baselines; some budgets are for large tensors only."""
    p, g = found.parameters, found.gradients
    zclip, autoclip, layers = PublishedZClip(), PublishedAutoClip(past_norms(WINDOW)), layers_of(found)
    fresh = PublishedAutoClip(past_norms(FEW))
    moments = [original.square() for original in found.originals]
    published: dict[str, Any] = {"budget": PUBLISHED_FACTOR if tiny else None, "at_least": tiny}
    spikes, unclipped = (FEW_SPIKES_BUDGET, None) if tiny else (SPIKES_BUDGET, UNCLIPPED_BUDGET)
    for_passes = None if tiny else PASS_BUDGET
    return [
        Case(TORCH_NORM, lambda: clip_grad_norm_(p, MAX_NORM, foreach=True)),
        Case(f"{TORCH_NORM}, again", lambda: clip_grad_norm_(p, MAX_NORM, foreach=True)),
        Case("clip_norm_", lambda: clip_norm_(g, MAX_NORM), budget=NORM_BUDGET),
        Case("clip_norm_ below its limit", lambda: clip_norm_(g, 2 * NORM), budget=unclipped),
        Case("normalize_gradients_", lambda: normalize_gradients_(g), budget=NORMALIZE_BUDGET),
        Case(FULL_WINDOW, autoclip_of(g, WINDOW), budget=STATISTICS_BUDGET),
        Case(EMPTY_WINDOW, autoclip_of(g, FEW), budget=STATISTICS_BUDGET),
        Case("ZClip", zclip_of(g), budget=STATISTICS_BUDGET),
        *layers,
        Case("centralize_", lambda: centralize_(g)),
        Case("clip_spikes_", lambda: clip_spikes_(g, moments), budget=spikes),
        Case(ONE_NORM, lambda: torch._foreach_norm(g), ONE_NORM),
        Case("nonfinite", lambda: nonfinite(g), ONE_NORM, for_passes),
        Case(ONE_DRAW, lambda: [gradient.normal_() for gradient in g], ONE_DRAW),
        Case("add_gradient_noise_", lambda: add_gradient_noise_(g, 0.01, seed=1), ONE_DRAW, for_passes),
        Case(TORCH_VALUE, lambda: clip_grad_value_(p, CLIP_VALUE), TORCH_VALUE),
        Case("clip_value_", lambda: clip_value_(g, CLIP_VALUE), TORCH_VALUE),
        Case(TIMM_LOOP, lambda: clip_adaptively_as_timm(p), TIMM_LOOP),
        Case("clip_adaptively_", lambda: clip_adaptively_(g, p, RATIO, EPS), TIMM_LOOP, AGC_BUDGET),
        Case("ZClip as published", lambda: zclip(p), "ZClip", **published),
        Case(f"AutoClip as published, {WINDOW} norms", lambda: autoclip(p), FULL_WINDOW, **published),
        Case(f"AutoClip as published, {FEW} norms", lambda: fresh(p), EMPTY_WINDOW, **published),
    ]


def layers_of(found: Gradients) -> list[Case]:
    """Return the functions that act on layers, each a matrix and a vector."""
    p, g = found.parameters, found.gradients
    count, device = (len(g) + 1) // 2, g[0].device
    index = torch.arange(len(g), device=device) // 2
    sizes = torch.tensor([float(sum(x.numel() for x in g[2 * i : 2 * i + 2])) for i in range(count)], device=device)
    return [
        Case("clip_layers_", lambda: clip_layers_(g, index, layer_limits(sizes, MAX_NORM))),
        Case("normalize_layers_", lambda: normalize_layers_(g, p, index, count)),
        Case("normalize_gradients_, each layer", lambda: normalize_gradients_(g, index, count)),
    ]


def rows_of(cases: Sequence[Case], found: Gradients, rounds: int, clock: Clock) -> list[Row]:
    """Time all cases in turn."""
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for i in range(rounds + 1):
        for case in rotated(cases, i):
            found.refill()
            seconds = clock.seconds(case.call)
            if i:  # the first round warms up
                times[case.name].append(seconds)
    typical = {name: median(seconds) for name, seconds in times.items()}
    return [_row(case, typical) for case in cases]


def _row(case: Case, typical: Mapping[str, float]) -> Row:
    ratio = typical[case.name] / typical[case.baseline]
    baseline = "" if case.baseline == case.name else case.baseline
    return Row(case.name, 1000 * typical[case.name], ratio, case.budget, case.at_least, baseline)


def function_rows(shapes: Sequence[tuple[int, ...]], tiny: bool, rounds: int, clock: Clock) -> list[Row]:
    """Time the functions."""
    torch.manual_seed(0)
    found = Gradients([nn.Parameter(0.05 * torch.randn(shape, device=clock.device)) for shape in shapes])
    return rows_of(function_cases(found, tiny), found, rounds, clock)


# Whole hooks of the callbacks, during a fit.


class Weights(LightningModule):
    """Parameters of given shapes, trained with AdamW.

    Args:
        shapes: Shapes of the parameters.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([0.05 * torch.randn(shape) for shape in shapes])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return a loss that depends on every parameter."""
        return torch.stack([weight.square().mean() for weight in self.weights]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Probe(Callback):
    """Call a function once in a fit, after the first optimizer step.

    Args:
        act: Called with a function that runs the hook of a callback, and the gradients that the hook changes.
    """

    def __init__(self, act: Callable[[Callable[[GradientConditioner], None], Gradients], None]) -> None:
        self._act = act

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:

            def call(callback: GradientConditioner) -> None:
                callback.on_before_optimizer_step(trainer, pl_module, trainer.optimizers[0])

            self._act(call, Gradients(list(pl_module.parameters())))


def fit_with(
    conditioners: Sequence[GradientConditioner],
    act: Callable[[Callable[[GradientConditioner], None], Gradients], None],
    shapes: Sequence[tuple[int, ...]],
    clock: Clock,
) -> None:
    """Start a fit without log steps, and call ``act`` in the middle of it."""
    torch.manual_seed(0)
    trainer = quiet_trainer(
        clock.device, max_steps=2, max_epochs=1, log_every_n_steps=10**6, callbacks=[Probe(act), *conditioners]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*both clip the same gradients.*")
        trainer.fit(Weights(shapes), DataLoader([torch.zeros(1)] * 2, batch_size=None))  # type: ignore[arg-type]


def hook_rows(shapes: Sequence[tuple[int, ...]], rounds: int, clock: Clock) -> list[Row]:
    """Time hooks and the functions that they call; the difference is the cost of the base class."""
    hooks: dict[str, GradientConditioner] = {
        "NormClipping": NormClipping(MAX_NORM),
        "AutoClip": AutoClip(PERCENTILE, WINDOW),
        "NormalizedGradient": NormalizedGradient(),
        "ZClip": ZClip(),
        "AdaptiveGradientClipping": AdaptiveGradientClipping(RATIO, EPS, head=None),
    }
    rows: list[Row] = []

    def act(call: Callable[[GradientConditioner], None], found: Gradients) -> None:
        p, g = found.parameters, found.gradients
        functions: dict[str, Callable[[], object]] = {
            "NormClipping": lambda: clip_norm_(g, MAX_NORM),
            "AutoClip": autoclip_of(g, 2),
            "NormalizedGradient": lambda: normalize_gradients_(g),
            "ZClip": zclip_of(g),
            "AdaptiveGradientClipping": lambda: clip_adaptively_(g, p, RATIO, EPS),
        }
        names = (TORCH_NORM, f"{TORCH_NORM}{AGAIN}")
        cases = [Case(name, lambda: clip_grad_norm_(p, MAX_NORM, foreach=True)) for name in names]
        for name, callback in hooks.items():
            cases.append(Case(f"{name}, function", functions[name]))
            cases.append(Case(f"{name}, hook", lambda callback=callback: call(callback)))  # type: ignore[misc]
        rows.extend(rows_of(cases, found, rounds, clock))

    fit_with(list(hooks.values()), act, shapes, clock)
    return rows


def waitless_callbacks() -> list[GradientConditioner]:
    """Return one of each callback that changes gradients, in an allowed order.

    Excludes the role guard, because the host must know whether to skip a step.
    """
    settings: dict[type, dict[str, Any]] = {AdaptiveGradientClipping: {"head": None}, SpikeClipping: {"pause": 0}}
    classes = [getattr(callbacks, name) for name in callbacks.__all__]
    found = [c for c in classes if issubclass(c, GradientConditioner)]
    return [c(**settings.get(c, {})) for role in ("center", "clip", "noise") for c in found if c.role == role]


def check_no_wait(shapes: Sequence[tuple[int, ...]], clock: Clock) -> list[str]:
    """Run every hook while torch raises on host syncs, and return the names of the callbacks."""
    conditioners, passed = waitless_callbacks(), []

    def act(call: Callable[[GradientConditioner], None], found: Gradients) -> None:
        for callback in conditioners:
            found.refill()
            call(callback)  # one-time setup may wait
            with waiting_raises(clock):
                call(callback)
            passed.append(callback.display_name)

    fit_with(conditioners, act, shapes, clock)
    return passed


@contextmanager
def waiting_raises(clock: Clock) -> Iterator[None]:
    """Make torch raise if the host waits for the GPU."""
    if clock.device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# A real fit, with and without the monitor.


def monitor_rows(
    build: Callable[[], tuple[LightningModule, Any]], rounds: int, more: bool, clock: Clock
) -> list[Row] | None:
    """Train with and without the monitor in turn, each round over a whole log interval.

    Args:
        build: Builds a module and a batch.
        rounds: Number of rounds.
        more: Whether to add a second fit without the monitor, whose ratio shows the noise, and one with
            ``slow_stats_every=1``.
        clock: The clock.

    Returns:
        list: The rows, or ``None`` if this version has no monitor.
    """
    monitor = getattr(callbacks, "GradientMonitor", None)
    if monitor is None:
        return None
    seed_everything(0, verbose=False)
    used: dict[str, Callable[[], list[Callback]]] = {"without": list, "GradientMonitor": lambda: [monitor()]}
    if more:
        used |= {"GradientMonitor, slow statistics": lambda: [monitor(slow_stats_every=1)], "without, again": list}
    fits = {name: partial(logged_fit, *build(), callbacks_of=new, clock=clock) for name, new in used.items()}
    found = [in_turns(list(fits.values())) for _ in range(rounds)]
    typical = [mean(median(step) for step in zip(*blocks, strict=True)) for blocks in zip(*found, strict=True)]
    budgets = {"GradientMonitor": MONITOR_BUDGET}
    return [
        Row(name, 1000 * seconds, seconds / typical[0], budgets.get(name))
        for name, seconds in zip(fits, typical, strict=True)
    ]


def logged_fit(
    module: LightningModule,
    batch: Any,
    pause: Callable[[], None],
    callbacks_of: Callable[[], list[Callback]],
    clock: Clock,
) -> list[float]:
    """Train with a logger, and return the seconds of each step of a log interval."""
    with tempfile.TemporaryDirectory() as folder:
        logger = CSVLogger(folder)
        return timed_fit(
            module, batch, LOG_EVERY, callbacks_of(), clock, pause, log_every_n_steps=LOG_EVERY, logger=logger
        )


# Command line.


def measure_lists(rounds: int, clock: Clock) -> dict[str, list[Row]]:
    """Time functions and hooks on both lists of gradients."""
    tables: dict[str, list[Row]] = {}
    for name, shapes in SHAPES.items():
        repeats = 30 * rounds if name == TINY else 2 * rounds - 1
        tables[name] = function_rows(shapes, name == TINY, repeats, clock)
        show(f"Functions on {name}", tables[name])
        tables[f"{name}, hooks"] = hook_rows(shapes, repeats, clock)
        show(f"on_before_optimizer_step between log steps, {name}", tables[f"{name}, hooks"])
    return tables


def measure_monitor(rounds: int, quick: bool, clock: Clock) -> dict[str, list[Row]]:
    """Time steps with and without the monitor."""
    tables: dict[str, list[Row]] = {}
    for name, build in list(MODELS.items())[: 1 if quick else None]:
        rows = monitor_rows(build, max(1, rounds // 3), not quick, clock)
        if rows is None:
            print(f"\nStep of {name}: skipped, this version has no GradientMonitor.")
        else:
            tables[name] = rows
            show(f"Step of {name}, a log step every {LOG_EVERY}", rows)
    return tables


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    assert __doc__ is not None
    options = speed_options(__doc__, arguments, quick="one round and no transformer: a rough answer in under a minute")
    silence()
    torch.set_num_threads(options.threads)
    clock = Clock(options.device)
    print(f"{machine(options.device)}; {options.rounds} rounds")
    if options.device == "cuda":
        print(f"No hook waited for the GPU: {', '.join(check_no_wait(SHAPES[TINY], clock))}.")
    tables = measure_lists(options.rounds, clock) | measure_monitor(options.rounds, options.quick, clock)
    show_missed(tables)
    write_tables(options, tables)


if __name__ == "__main__":
    main()
