"""The cost of adversarial training: ratios to a plain step, to a validation pass and to a plain epoch.

Steps run in ``Trainer.fit``, from the start of one batch to the start of the next, with all hooks and the optimizer. An attack
of k steps adds k forward passes and k backward passes to the input. These do not compute gradients of the weights, which
take a third of a plain step. The same attack in a few lines of plain torch is the second baseline. The small convnet and the
network of 400 small layers show the overhead of the callback, which is hidden in larger networks. An
evaluation is a validation pass, an attack, and a validation pass on the attacked inputs; a loop that does the same by hand
is its baseline.

All variants are interleaved with their baseline in rotating order, and the median over the rounds counts. With one
thread the script measures processor time, which excludes the time that other processes get. With more threads or on a GPU
it measures wall-clock time.

::

    python benchmarks/adversarial.py --quick
    python benchmarks/adversarial.py --out adversarial.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from plain_project import ResidualConvNet

from benchmarks.common import (
    Clock,
    convnet,
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
from benchmarks.data_pruning import EpochTimer, against, medians
from benchmarks.rows import Row
from benchmarks.sparsity import many_layers
from lightning_grad.callbacks import AccuracyGradientLR, AdversarialEvaluation, AdversarialTraining

PGD_STEPS = (2, 5, 10)
EVALUATION_STEPS = (1, 20)
PLAIN, BY_HAND, FGSM, VALIDATION = "plain", "FGSM by hand", "FGSM", "validation"
EPSILON = 0.03
FGSM_BUDGET, PGD_OVERHEAD, EPOCH_BUDGET = 1.95, 1.1, 1.05
MANY_LAYERS_BUDGET = 1.1  # of the same attack by hand
EVALUATION_BUDGET = 1.12
CONVNET, SMALL, TRANSFORMER = "a residual convnet", "a small convnet", "a transformer"
MANY_LAYERS = "400 linear layers of 32x32"
EPOCHS = 8


@dataclass(frozen=True)
class Sizes:
    """Sizes of networks, data and fits.

    Args:
        steps: Timed steps in each fit of a large network.
        small_steps: Timed steps in each fit of the small network.
        many_layers_steps: Timed steps in each fit of the network of many layers.
        samples: Samples of the validation set.
        epoch: Samples of the training set whose epochs are timed; half as many are validated.
        width: Channels of the small convnet.
    """

    steps: int
    small_steps: int
    many_layers_steps: int
    samples: int
    epoch: int
    width: int


SIZES = {"cpu": Sizes(3, 60, 20, 128, 1024, 8), "cuda": Sizes(50, 100, 50, 4096, 8192, 32)}


def small_convnet(sizes: Sizes) -> tuple[LightningModule, Any]:
    """Build a convnet whose plain step takes about 5 ms, and a batch of 64 images for it."""
    module = ResidualConvNet(1, sizes.width, (1,), schedule="constant", optimizer="sgd", lr=0.01)
    return module, images(64, 1, 8)


def images(samples: int, channels: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise and labels."""
    return torch.randn(samples, channels, size, size), torch.randint(10, (samples,))


# Steps.


class AttackedByHand(Callback):
    """FGSM around the module's step, without restoring anything that the step changes."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step: Any = pl_module.training_step

        def attacked(batch: Any, batch_idx: int) -> Any:
            clean, labels = batch
            moved = (clean + torch.empty_like(clean).uniform_(-EPSILON, EPSILON)).requires_grad_()
            (gradient,) = torch.autograd.grad(step((moved, labels), batch_idx), moved)
            change = moved.detach() - clean + 1.25 * EPSILON * gradient.sign()
            return step((clean + change.clamp(-EPSILON, EPSILON), labels), batch_idx)

        vars(pl_module)["training_step"] = attacked

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del vars(pl_module)["training_step"]


def attacking(attack: Literal["fgsm", "pgd"], steps: int | None = None) -> list[Callback]:
    """Return the callback of an attack."""
    return [AdversarialTraining(EPSILON, attack, steps, check_every_n_epochs=None)]


def step_rows(
    build: Callable[[], tuple[LightningModule, Any]],
    steps: int,
    rounds: int,
    clock: Clock,
) -> list[Row]:
    """Time steps with attacks and plain steps."""
    used: dict[str, Callable[[], list[Callback]]] = {PLAIN: list, f"{PLAIN}, again": list}
    used |= {BY_HAND: lambda: [AttackedByHand()], FGSM: partial(attacking, "fgsm")}
    used |= {f"PGD-{k}": partial(attacking, "pgd", k) for k in PGD_STEPS}
    budgets = {FGSM: FGSM_BUDGET, **{f"PGD-{k}": k + PGD_OVERHEAD for k in PGD_STEPS}}
    typical = typical_steps(build, used, steps, rounds, clock)
    return [against(name, typical, PLAIN, budgets.get(name)) for name in used]


def many_layers_rows(steps: int, rounds: int, clock: Clock) -> list[Row]:
    """Time steps of many small layers, whose attributes, buffers and gradients the callback restores."""
    again = f"{BY_HAND}, again"
    used: dict[str, Callable[[], list[Callback]]] = {PLAIN: list, FGSM: partial(attacking, "fgsm")}
    used |= dict.fromkeys((BY_HAND, again), lambda: [AttackedByHand()])
    typical = typical_steps(many_layers, used, steps, rounds, clock)
    rows: list[Row] = [against(name, typical, PLAIN) for name in used]
    return [*rows, against(again, typical, BY_HAND), against(FGSM, typical, BY_HAND, MANY_LAYERS_BUDGET)]


def typical_steps(
    build: Callable[[], tuple[LightningModule, Any]],
    used: Mapping[str, Callable[[], list[Callback]]],
    steps: int,
    rounds: int,
    clock: Clock,
) -> dict[str, float]:
    """Return the median seconds of a step with each list of callbacks."""
    found: dict[str, list[float]] = {name: [] for name in used}
    for i in range(rounds):
        for name in rotated(list(used), i):
            seed_everything(0, verbose=False)
            found[name] += timed_fit(*build(), steps, used[name](), clock)
    return {name: median(seconds) for name, seconds in found.items()}


# Evaluation.


def evaluation_rows(sizes: Sizes, rounds: int, clock: Clock) -> list[Row]:
    """Time attacked validation passes and a plain one."""
    seed_everything(0, verbose=False)
    module, _ = convnet()
    loader = DataLoader(TensorDataset(*images(sizes.samples, 3, 32)), 32)
    baselines = {f"by hand, steps={k}": k for k in EVALUATION_STEPS}
    names = {f"AdversarialEvaluation(steps={k})": k for k in EVALUATION_STEPS}

    def validation(*callbacks: Callback) -> Callable[[], object]:
        trainer: Trainer = quiet_trainer(clock.device, callbacks=list(callbacks))
        return lambda: trainer.validate(module, loader, verbose=False)

    calls = {VALIDATION: validation(), f"{VALIDATION}, again": validation()}
    calls |= {name: partial(evaluate_by_hand, module, loader, k, clock.device) for name, k in baselines.items()}
    calls |= {name: validation(AdversarialEvaluation(EPSILON, k)) for name, k in names.items()}
    typical = medians(calls, rounds, clock)
    rows: list[Row] = [against(name, typical, VALIDATION) for name in calls]
    pairs = zip(names, baselines, strict=True)
    return [*rows, *(against(name, typical, baseline, EVALUATION_BUDGET) for name, baseline in pairs)]


def evaluate_by_hand(module: LightningModule, loader: DataLoader[Any], steps: int, device: str) -> None:
    """Evaluate a network on clean and on attacked images, in a loop of plain torch."""
    module.eval().to(device)
    for batch in loader:
        clean, labels = (part.to(device) for part in batch)
        moved = clean + torch.empty_like(clean).uniform_(-EPSILON, EPSILON)
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(F.cross_entropy(module(moved.requires_grad_()), labels), moved)
            moved = moved.detach() + 2.5 * EPSILON / steps * gradient.sign()
            moved = clean + (moved - clean).clamp(-EPSILON, EPSILON)
        with torch.no_grad():
            for inputs in (clean, moved):
                F.cross_entropy(module(inputs), labels).item()


# Epochs.


def epoch_rows(sizes: Sizes, rounds: int, clock: Clock) -> list[Row]:
    """Time epochs with a validation each, with and without AccuracyGradientLR."""
    followed = "AccuracyGradientLR()"
    used: dict[str, Callable[[], list[Callback]]] = {
        PLAIN: list,
        f"{PLAIN}, again": list,
        followed: lambda: [AccuracyGradientLR(figure=False)],
    }
    found: dict[str, list[float]] = {name: [] for name in used}
    for i in range(rounds):
        for name in rotated(list(used), i):
            found[name] += epochs_with(used[name](), sizes, clock)
    typical = {name: median(seconds) for name, seconds in found.items()}
    return [against(name, typical, PLAIN, EPOCH_BUDGET if name == followed else None) for name in used]


def epochs_with(callbacks: Sequence[Callback], sizes: Sizes, clock: Clock) -> list[float]:
    """Train the small convnet, and return the seconds of each epoch except the first and the last."""
    seed_everything(0, verbose=False)
    module, _ = small_convnet(sizes)
    training, validation = (
        DataLoader(TensorDataset(*images(samples, 1, 8)), 64) for samples in (sizes.epoch, sizes.epoch // 2)
    )
    timer = EpochTimer(clock)
    trainer = quiet_trainer(clock.device, max_epochs=EPOCHS, callbacks=[timer, *callbacks])
    trainer.fit(module, training, validation)
    return timer.periods[1:]


# Command line.


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    assert __doc__ is not None
    options = speed_options(__doc__, arguments, quick="one round: a rough answer in two minutes")
    silence()
    torch.set_num_threads(options.threads)
    rounds, clock, sizes = options.rounds, Clock(options.device), SIZES[options.device]
    print(f"{machine(options.device)}; {rounds} rounds")
    tables: dict[str, list[Row]] = {}

    def add(title: str, rows: list[Row]) -> None:
        tables[title] = rows
        show(title, rows)

    add(f"A step of {SMALL}", step_rows(lambda: small_convnet(sizes), sizes.small_steps, rounds, clock))
    add(f"A step of {CONVNET}", step_rows(convnet, sizes.steps, rounds, clock))
    add(f"A step of {TRANSFORMER}", step_rows(transformer, sizes.steps, rounds, clock))
    add(f"A step of {MANY_LAYERS}", many_layers_rows(sizes.many_layers_steps, rounds, clock))
    add("A validation pass", evaluation_rows(sizes, rounds, clock))
    add("An epoch", epoch_rows(sizes, rounds, clock))
    show_missed(tables)
    write_tables(options, tables)


if __name__ == "__main__":
    main()
