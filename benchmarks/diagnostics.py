"""The cost of TrainingDoctor, while it watches and after it has stopped, and of one look of each probe.

All fits train with the same two callbacks. A fit with the doctor, one without it and one without it "again", which shows the
noise, take turns step by step. The two batches of a fit whose events are recorded have a line of their own. A look of a probe
is compared with a training step, and with a batch in evaluation where the budget says so.

With one thread the script measures processor time, which excludes the time that other processes get.

::

    python benchmarks/diagnostics.py --quick
    python benchmarks/diagnostics.py --out diagnostics.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from benchmarks.common import (
    Clock,
    StepTimer,
    convnet,
    in_turns,
    machine,
    quiet_trainer,
    show,
    show_missed,
    silence,
    speed_options,
    timed_fit,
    transformer,
    write_tables,
)
from benchmarks.rows import AGAIN, LOOKS, Row
from lightning_grad.callbacks import (
    GradCAMLogger,
    GradientDiversity,
    GradientMonitor,
    HessianSpectrum,
    InputGradientLogger,
    NormClipping,
    TrainingDoctor,
)
from lightning_grad.core import ProbeCallback

WATCH_BUDGET, AFTER_BUDGET = 1.02, 1.01
SKIPPED, RECORDED = 1, 2  # batches before the first that the doctor times
FOREVER = 10**9  # batches
SMALLEST = "the smallest step"
STEPS = {SMALLEST: 300, "a residual convnet": 30, "a transformer": 12}
Fit = Callable[[], list[Callback]]

STEP, EVALUATION = "a training step of 32 images", "a batch of 32 images in evaluation"
LOOKS_OF_A_ROUND, STEPS_OF_A_ROUND = 3, 12
MAPS_BUDGET = 3.0  # batches in evaluation for the maps of eight images
LOOKED_AT = 128  # images in the data set of the probes
PROBES: dict[str, tuple[Callable[[], ProbeCallback], str, float | None]] = {
    "GradCAMLogger, 8 images": (lambda: GradCAMLogger(every_n_steps=1, split="train"), EVALUATION, MAPS_BUDGET),
    "GradCAMLogger, smooth_gradcam++, 8 images": (
        lambda: GradCAMLogger("smooth_gradcam++", every_n_steps=1, split="train"),
        EVALUATION,
        None,
    ),
    "InputGradientLogger, 8 images": (
        lambda: InputGradientLogger(every_n_steps=1, split="train"),
        EVALUATION,
        MAPS_BUDGET,
    ),
    "GradientDiversity, 100 images": (lambda: GradientDiversity(every_n_steps=1), STEP, None),
    "HessianSpectrum, 100 images": (lambda: HessianSpectrum(every_n_steps=1), STEP, None),
}
"""Each probe with what a look is compared with, and the budget."""


class Smallest(LightningModule):
    """One linear layer, so the step costs little more than Lightning itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss on ``batch``."""
        loss: Tensor = self.layer(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


MODELS: dict[str, Callable[[], tuple[LightningModule, Any]]] = {
    SMALLEST: lambda: (Smallest(), torch.randn(4, 8)),
    "a residual convnet": convnet,
    "a transformer": transformer,
}


def others() -> list[Callback]:
    """Return the callbacks of all fits."""
    return [NormClipping(max_norm=1.0), GradientMonitor(figure=False)]


def watching() -> list[Callback]:
    """Return them with a doctor that times every batch."""
    return [TrainingDoctor(batches=FOREVER, host_syncs=False, figure=False), *others()]


def stopped() -> list[Callback]:
    """Return them with a doctor that stops after the first batch that it times."""
    return [TrainingDoctor(batches=1, figure=False), *others()]


def step_rows(name: str, variant: str, doctored: Fit, budget: float, rounds: int, clock: Clock) -> list[Row]:
    """Time steps with and without the doctor in turn; the batches before the first that the doctor times do not count."""
    found: list[list[list[float]]] = []
    for _ in range(rounds):
        seed_everything(0, verbose=False)
        fits = [partial(_steps, name, callbacks, clock) for callbacks in (others, doctored, others)]
        found.append([times[SKIPPED + RECORDED :] for times in in_turns(fits)])
    plain, watched, again = (median(time for times in each for time in times) for each in zip(*found, strict=True))
    # The smallest step has no budget: a step of a real training takes far longer.
    limit = None if name == SMALLEST else budget
    baseline = f"without, next to {variant}"
    return [
        Row(baseline, 1000 * plain, 1.0),
        Row(f"TrainingDoctor, {variant}", 1000 * watched, watched / plain, limit, baseline=baseline),
        Row(f"without{AGAIN}", 1000 * again, again / plain, baseline=baseline),
    ]


def _steps(name: str, callbacks: Fit, clock: Clock, pause: Callable[[], None]) -> list[float]:
    return timed_fit(*MODELS[name](), STEPS[name], callbacks(), clock, pause)


class _EveryStep(StepTimer):
    """Returns also the first steps."""

    @property
    @override
    def periods(self) -> list[float]:
        return [end - start for start, end in zip(self._starts, self._ends[1:], strict=False)]


def recording_row(name: str, plain: Row, rounds: int, clock: Clock) -> Row:
    """Time the batches whose events are recorded.

    Args:
        name: The model.
        plain: Steps without the doctor.
        rounds: Number of fits; the median over their recorded batches counts.
        clock: The clock.
    """
    found: list[float] = []
    for _ in range(rounds):
        timer = _EveryStep(clock)
        module, batch = MODELS[name]()
        trainer = quiet_trainer(clock.device, max_epochs=1, callbacks=[timer, *stopped()])
        trainer.fit(module, DataLoader(cast(Any, [batch] * (SKIPPED + RECORDED + 2)), batch_size=None))
        found += timer.periods[SKIPPED : SKIPPED + RECORDED]
    milliseconds = 1000 * median(found)
    assert plain.milliseconds is not None
    ratio = milliseconds / plain.milliseconds
    return Row("TrainingDoctor, a recorded batch", milliseconds, ratio, baseline=plain.name)


def look_rows(rounds: int, clock: Clock, chosen: Sequence[str] = tuple(PROBES)) -> list[Row]:
    """Time one look of each probe at a residual convnet, next to a training step and a batch in evaluation."""
    found: dict[str, list[float]] = {name: [] for name in (STEP, EVALUATION, f"{STEP}{AGAIN}", *chosen)}
    for _ in range(rounds):
        for name in found:
            found[name] += _seconds_of(name, clock)
    times = {name: median(each) for name, each in found.items()}
    rows = [Row(STEP, 1000 * times[STEP], 1.0), Row(EVALUATION, 1000 * times[EVALUATION], 1.0, baseline=EVALUATION)]
    again = f"{STEP}{AGAIN}"
    rows.append(Row(again, 1000 * times[again], times[again] / times[STEP], baseline=STEP))
    for name in chosen:
        _, baseline, budget = PROBES[name]
        rows.append(Row(name, 1000 * times[name], times[name] / times[baseline], budget, baseline=baseline))
    return rows


def _seconds_of(name: str, clock: Clock) -> list[float]:
    """Return the seconds of a few steps, evaluations or looks."""
    seed_everything(0, verbose=False)
    module, batch = convnet()
    if name.startswith(STEP):
        return timed_fit(module, batch, STEPS_OF_A_ROUND, [], clock)
    data = TensorDataset(torch.randn(LOOKED_AT, 3, 32, 32), torch.randint(10, (LOOKED_AT,)))
    if name == EVALUATION:
        module.eval().to(clock.device)
        images = data[:32][0].to(clock.device)
        with torch.inference_mode():
            return [clock.seconds(lambda: module(images)) for _ in range(1 + STEPS_OF_A_ROUND)][1:]
    probe, times = PROBES[name][0](), list[float]()
    take: Callable[..., Any] = probe._take

    def timed(*arguments: Any) -> Any:
        start = clock.now()
        outcome = take(*arguments)
        times.append(clock.now() - start)
        return outcome

    vars(probe)["_take"] = timed
    trainer = quiet_trainer(clock.device, max_epochs=-1, max_steps=LOOKS_OF_A_ROUND, callbacks=[probe])
    trainer.fit(module, DataLoader(data, 32))
    return times[1:] or times  # the first look also finds the loss of the step


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    assert __doc__ is not None
    options = speed_options(__doc__, arguments, quick="one round of the smallest step: a rough answer in seconds")
    silence()
    torch.set_num_threads(options.threads)
    clock = Clock(options.device)
    print(f"{machine(options.device)}; {options.rounds} rounds")
    tables: dict[str, list[Row]] = {}
    for name in list(MODELS)[: 1 if options.quick else None]:
        rows = tables[name] = []
        for variant, callbacks, budget in (
            ("watching", watching, WATCH_BUDGET),
            ("after it has stopped", stopped, AFTER_BUDGET),
        ):
            rows += step_rows(name, variant, callbacks, budget, max(1, options.rounds // 3), clock)
        rows.append(recording_row(name, rows[0], options.rounds, clock))
        show(f"Step of {name}", rows)
    if not options.quick:
        tables[LOOKS] = look_rows(max(1, options.rounds // 3), clock)
        show(LOOKS, tables[LOOKS])
    show_missed(tables)
    write_tables(options, tables)


if __name__ == "__main__":
    main()
