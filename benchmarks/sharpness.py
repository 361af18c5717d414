"""The cost of SAM, TrAct, Lookahead and zeroth-order steps: ratios to plain steps, loops by hand and evaluation passes.

Steps run in ``Trainer.fit``, from the start of one batch to the start of the next. A sharp step runs forward and backward
twice. With ``every_n_steps=5`` and in Lookahead, the mean over a cycle counts: the mean of the medians of its five steps. The
loops by hand are modules with manual optimization that do what published code does.

``ZerothOrder`` trains a transformer on tokens with SGD. Its baseline is a forward pass without a graph. Peak memory is that of
a process of its own, in addition to what the same on a tiny batch has taken before, and includes the weights.

All variants take turns step by step, and rows "again" show the noise. With one thread the script measures processor time,
which excludes the time that other processes get.

::

    python benchmarks/sharpness.py --quick
    python benchmarks/sharpness.py --out sharpness.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from benchmarks.common import (
    WARM_STEPS,
    Clock,
    SmallTransformer,
    in_turns,
    machine,
    quiet_trainer,
    show,
    show_missed,
    silence,
    speed_options,
    timed_fit,
    write_tables,
)
from benchmarks.data_pruning import highest_memory, in_fresh_process
from benchmarks.memory import map_large_memory
from benchmarks.rows import AGAIN, Row
from lightning_grad.callbacks import SAM, Lookahead, TrAct, ZerothOrder
from lightning_grad.functional import move_along_

STEPS_OF, WITHOUT, MEMORY = "steps of a transformer", "steps without gradients", "memory without gradients"  # titles
PLAIN, EVALUATION, SGD_STEP = "plain", "an evaluation pass", "plain, SGD"
BITS = 4
ROUNDED = f"ZerothOrder, bits={BITS}"
SAM_BY_HAND, ASAM_BY_HAND, ZEROTH_BY_HAND = "SAM by hand", "ASAM by hand", "ZerothOrder by hand"
EVERY = 5  # steps of a cycle
LOOKAHEAD = f"Lookahead, k={EVERY}"
STEPS = 2 * EVERY
SHARP_BUDGET, CYCLE_BUDGET, TRACT_BUDGET, HAND_BUDGET, MEMORY_BUDGET = 2.05, 1.2, 1.05, 1.05, 1.1
LOOKAHEAD_BUDGET = 1.02
EPSILON, RATE = 1e-3, 1e-4
VOCABULARY = 1000
SEQUENCES = 16  # of a batch whose memory is measured
Timed = Callable[[Callable[[], None]], list[float]]


# Steps with gradients.


def batch_of() -> tuple[Tensor, Tensor]:
    """Return a batch for the transformer."""
    return torch.randn(4, 256, 256), torch.randn(4, 256, 256)


class SharpByHand(SmallTransformer):
    """The transformer with SAM in its own step, parameter by parameter, as in common code.

    Args:
        adaptive: Measure the move relative to the size of each weight (ASAM).
    """

    def __init__(self, adaptive: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.adaptive = adaptive

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        optimizer = cast(Any, self.optimizers())
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        moves = self.ascend()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        with torch.no_grad():
            for parameter, move in moves:
                parameter.sub_(move)
        optimizer.step()
        return loss

    @torch.no_grad()
    def ascend(self) -> list[tuple[Tensor, Tensor]]:
        """Move the weights up the gradient, and return the moves."""
        pairs = [(p, p.grad) for p in self.parameters() if p.grad is not None]
        sizes = [p.abs() + 0.01 if self.adaptive and p.ndim > 1 else torch.ones(()) for p, _ in pairs]
        norm = torch.stack([(g * size).norm() for (_, g), size in zip(pairs, sizes, strict=True)]).norm()
        scale = (0.5 if self.adaptive else 0.05) / norm
        moves: list[tuple[Tensor, Tensor]] = [
            (p, g * size.square() * scale) for (p, g), size in zip(pairs, sizes, strict=True)
        ]
        for parameter, move in moves:
            parameter.add_(move)
        return moves


def step_variants() -> dict[str, Callable[[], tuple[LightningModule, list[Callback]]]]:
    """Return the modules and callbacks whose steps are compared."""
    by_hand: dict[str, Callable[[], tuple[LightningModule, list[Callback]]]] = {}
    for name, adaptive in ((SAM_BY_HAND, False), (ASAM_BY_HAND, True), (f"{SAM_BY_HAND}{AGAIN}", False)):
        by_hand[name] = lambda adaptive=adaptive: (SharpByHand(adaptive), [])  # type: ignore[misc]
    return {
        PLAIN: lambda: (SmallTransformer(), []),
        **by_hand,
        "SAM": lambda: (SmallTransformer(), [SAM()]),
        "ASAM": lambda: (SmallTransformer(), [SAM(adaptive=True)]),
        f"SAM, every_n_steps={EVERY}": lambda: (SmallTransformer(), [SAM(every_n_steps=EVERY)]),
        f"ASAM, every_n_steps={EVERY}": lambda: (SmallTransformer(), [SAM(adaptive=True, every_n_steps=EVERY)]),
        "TrAct": lambda: (SmallTransformer(), [TrAct()]),
        LOOKAHEAD: lambda: (SmallTransformer(), [Lookahead(EVERY)]),
        f"{PLAIN}{AGAIN}": lambda: (SmallTransformer(), []),
    }


def step_rows(rounds: int, clock: Clock) -> list[Row]:
    """Time steps of all variants in turn."""
    fits: dict[str, Timed] = {name: partial(_steps, make, clock) for name, make in step_variants().items()}
    typical = times_of(fits, rounds)
    budgets = dict.fromkeys(("SAM", "ASAM"), SHARP_BUDGET)
    budgets |= dict.fromkeys((f"{name}, every_n_steps={EVERY}" for name in ("SAM", "ASAM")), CYCLE_BUDGET)
    budgets |= {"TrAct": TRACT_BUDGET, LOOKAHEAD: LOOKAHEAD_BUDGET}
    rows = [row_of(typical, name, PLAIN, budgets.get(name)) for name in typical if name != f"{SAM_BY_HAND}{AGAIN}"]
    by_hand = (("SAM", SAM_BY_HAND), ("ASAM", ASAM_BY_HAND))
    rows += [row_of(typical, name, baseline, HAND_BUDGET) for name, baseline in by_hand]
    return [*rows, row_of(typical, f"{SAM_BY_HAND}{AGAIN}", SAM_BY_HAND)]


def _steps(make: Callable[[], tuple[LightningModule, list[Callback]]], clock: Clock, pause: Any) -> list[float]:
    seed_everything(0, verbose=False)
    module, callbacks = make()
    return timed_fit(module, batch_of(), STEPS, callbacks, clock, pause)


def times_of(fits: Mapping[str, Timed], rounds: int) -> dict[str, float]:
    """Run all fits in turn, and return the mean over a cycle of the median times of its steps."""
    found: list[list[list[float]]] = [in_turns(list(fits.values())) for _ in range(rounds)]
    of_each = dict(zip(fits, zip(*found, strict=True), strict=True))
    return {name: cycle_mean(times) for name, times in of_each.items()}


def cycle_mean(fits: Sequence[Sequence[float]]) -> float:
    """Return the mean over a cycle of five steps; each step counts by its median over all cycles.

    >>> cycle_mean([[7.0, 1.0, 1.0, 1.0, 1.0, 6.0, 1.0, 1.0, 1.0, 9.0], [6.0, 1.0, 1.0, 1.0, 1.0]])
    2.0
    """
    steps = range(min(EVERY, *map(len, fits)))
    return mean(median(time for times in fits for time in times[step::EVERY]) for step in steps)


def row_of(typical: Mapping[str, float], name: str, baseline: str, budget: float | None = None) -> Row:
    """Return the row of a variant."""
    to = "" if name == baseline else baseline
    return Row(name, 1000 * typical[name], typical[name] / typical[baseline], budget, baseline=to)


# Steps without gradients.


class Tokens(SmallTransformer):
    """The transformer with an embedding and a head, trained with SGD on random tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 256), nn.Linear(256, VOCABULARY)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # type: ignore[override]
        logits = self.head(self.encoder(self.embedding(batch)))
        return F.cross_entropy(logits.flatten(0, 1), batch.flatten())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Compute the loss."""
        self.training_step(batch, batch_idx)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def tokens_of(sequences: int) -> Tensor:
    """Return a batch for it."""
    return torch.randint(VOCABULARY, (sequences, 256))


def without_rows(rounds: int, clock: Clock) -> list[Row]:
    """Time zeroth-order steps, passes without a graph, and plain steps with SGD in turn."""
    fits: dict[str, Timed] = {
        EVALUATION: partial(_by_hand, _pass, clock),
        ZEROTH_BY_HAND: partial(_by_hand, _zeroth_step, clock),
        "ZerothOrder": partial(_token_steps, lambda: [ZerothOrder(EPSILON)], clock),
        ROUNDED: partial(_token_steps, lambda: [ZerothOrder(EPSILON, bits=BITS)], clock),
        SGD_STEP: partial(_token_steps, list, clock),
        f"{EVALUATION}{AGAIN}": partial(_by_hand, _pass, clock),
        f"{ZEROTH_BY_HAND}{AGAIN}": partial(_by_hand, _zeroth_step, clock),
    }
    typical = times_of(fits, rounds)
    again = f"{ZEROTH_BY_HAND}{AGAIN}"
    rows = [row_of(typical, name, EVALUATION) for name in typical if name != again]
    return [
        *rows,
        row_of(typical, "ZerothOrder", ZEROTH_BY_HAND, HAND_BUDGET),
        row_of(typical, again, ZEROTH_BY_HAND),
    ]


def _token_steps(with_callbacks: Callable[[], list[Callback]], clock: Clock, pause: Any) -> list[float]:
    seed_everything(0, verbose=False)
    return timed_fit(Tokens(), tokens_of(4), STEPS, with_callbacks(), clock, pause)


def _by_hand(act: Callable[[Tokens, Tensor, int], None], clock: Clock, pause: Callable[[], None]) -> list[float]:
    """Time an act on the network, without a Trainer."""
    seed_everything(0, verbose=False)
    module, batch = Tokens().to(clock.device), tokens_of(4).to(clock.device)
    seconds = []
    for step in range(WARM_STEPS + STEPS):
        pause()
        seconds.append(clock.seconds(partial(act, module, batch, step)))
    return seconds[WARM_STEPS:]


@torch.no_grad()
def _pass(module: Tokens, batch: Tensor, step: int) -> None:
    module.training_step(batch, step)


@torch.no_grad()
def _zeroth_step(module: Tokens, batch: Tensor, step: int) -> None:
    """MeZO's algorithm 1."""
    weights = list(module.parameters())
    move_along_(weights, [EPSILON] * len(weights), step)
    plus = module.training_step(batch, step)
    move_along_(weights, [-2 * EPSILON] * len(weights), step)
    minus = module.training_step(batch, step)
    move_along_(weights, [EPSILON] * len(weights), step)
    derivative = (plus - minus) / (2 * EPSILON)
    move_along_(weights, [-RATE * derivative] * len(weights), step)


# Memory.


def memory_rows(sequences: int, device: str) -> list[Row]:
    """Compare peaks of processes that evaluate and that train, with one thread."""
    cases = (EVALUATION, f"{EVALUATION}{AGAIN}", SGD_STEP, "ZerothOrder", ROUNDED)
    peaks = {case: in_fresh_process(peak_memory, case.removesuffix(AGAIN), sequences, device) for case in cases}
    budgets = dict.fromkeys(("ZerothOrder", ROUNDED), MEMORY_BUDGET)
    return [
        Row(case, None, peak / peaks[EVALUATION], budgets.get(case), columns={"peak MB": peak / 1e6})
        for case, peak in peaks.items()
    ]


def peak_memory(case: str, sequences: int, device: str) -> float:
    """Return the peak memory of a process that evaluates or trains, in bytes.

    Args:
        case: Name of the row.
        sequences: Sequences of a batch.
        device: Device to run on.
    """
    silence()
    map_large_memory()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # fused layers, which torch uses in eval mode only
    # Code that is loaded on first use takes memory too, so load it before measuring.
    kept = [_work(case, Tokens(), torch.zeros(1, 2, dtype=torch.int64), device)]
    before = highest_memory(device)
    kept.append(_work(case, Tokens(), tokens_of(sequences), device))
    return highest_memory(device) - before


def _work(case: str, module: Tokens, batch: Tensor, device: str) -> object:
    seed_everything(0, verbose=False)
    loader: DataLoader[Any] = DataLoader(cast(Any, [batch] * 3), batch_size=None)
    acting = {"ZerothOrder": [ZerothOrder(EPSILON)], ROUNDED: [ZerothOrder(EPSILON, bits=BITS)]}
    callbacks: list[Callback] = list(acting.get(case, []))
    trainer = quiet_trainer(device, max_epochs=1, callbacks=callbacks)
    if case == EVALUATION:
        trainer.validate(module, loader, verbose=False)
    else:
        trainer.fit(module, loader)
    return trainer


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    assert __doc__ is not None
    options = speed_options(__doc__, arguments, quick="one round: a rough answer in a minute")
    silence()
    torch.set_num_threads(options.threads)
    clock = Clock(options.device)
    print(f"{machine(options.device)}; {options.rounds} rounds")
    tables = {STEPS_OF: step_rows(options.rounds, clock)}
    show("Steps of a transformer", tables[STEPS_OF])
    tables[WITHOUT] = without_rows(options.rounds, clock)
    show("Steps of a transformer on tokens, without gradients", tables[WITHOUT])
    tables[MEMORY] = memory_rows(SEQUENCES, options.device)
    show("Peak memory of its process", tables[MEMORY])
    show_missed(tables)
    write_tables(options, tables)


if __name__ == "__main__":
    main()
