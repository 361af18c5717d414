"""Cost and gain of data pruning: ratios to a plain backward pass, an evaluation pass, a full epoch, a plain step.

Norms of per-sample gradients are computed in eval mode on the same batch, next to other methods for the same norms. Peak
memory is that of a process of its own; a batch of two samples comes first, because the first batch has additional costs. The
other tables come from a real ``Trainer.fit``, except for traced steps: these are forward and backward alone, with budgets of
one millisecond more for weights and two with values, or 5 %.

All variants are interleaved with their baseline in rotating order, and the median over the rounds counts. For steps that are
read or traced it is the smallest median of a round, because other processes only add time. With one thread the script
measures processor time, which excludes the time that other processes get. With more threads or on a GPU it measures
wall-clock time.

::

    python benchmarks/data_pruning.py --quick
    python benchmarks/data_pruning.py --out data_pruning.json
"""

from __future__ import annotations

import copy
import ctypes
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.overrides import BaseTorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from plain_project import ResidualConvNet, VisionTransformer

from benchmarks.common import (
    WARM_STEPS,
    Clock,
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
from lightning_grad.callbacks import DataPruning, RepeatedRandomSubset
from lightning_grad.core import Look, LossRequest, look_at_all, read_losses, reweight_losses
from lightning_grad.functional import LossCapture, LossTrace, PerSampleGradientNorms, el2n

GHOST_CONVNET, GHOST_RESNET, GHOST_TRANSFORMER, VMAP_FACTOR = 1.2, 1.15, 1.2, 3.0
GHOST_MEMORY, VMAP_MEMORY_FACTOR = 1.2, 3.5
SCORING, SCORING_GRAND, HALF, READING, TRACED = 1.1, 4.5, 0.55, 1.06, 1.05
PLAIN, GHOST, VMAP, ONE_BY_ONE = "plain forward and backward", "ghost norms", "vmap(grad)", "one by one"
OPACUS, FIRST = "Opacus GradSampleModule", "ghost norms, first batch"
CONVNET, RESNET, TRANSFORMER = "a residual convnet", "a network like ResNet-18", "a transformer"
TURNS = 11  # repetitions of each traced step in a round
EPOCHS, STEADY = 5, 2  # epochs of a fit, and the first one that counts


@dataclass(frozen=True)
class Sizes:
    """Sizes of networks and data.

    Args:
        width: Channels of the first stage of the convnets.
        image: Height and width of their images.
        batch: Samples of a batch.
        crowd: Samples of the batch for the memory.
        samples: Samples of a training set.
        steps: Steps of a fit whose losses are read.
        reading: Channels of the network whose losses are read, about 4 ms a step.
        stages: Stages of the network that is trained, see :func:`residual`.
    """

    width: int
    image: int
    batch: int
    crowd: int
    samples: int
    steps: int
    reading: int
    stages: int


SIZES = {"cpu": Sizes(32, 32, 32, 64, 512, 500, 8, 3), "cuda": Sizes(64, 32, 512, 512, 51200, 500, 32, 4)}


def residual(sizes: Sizes, stages: int) -> ResidualConvNet:
    """Build the project's residual network, with three stages of one block or, like ResNet-18, four of two."""
    blocks = (1,) * 3 if stages == 3 else (2,) * stages
    return ResidualConvNet(3, sizes.width, blocks, schedule="constant", optimizer="sgd", lr=0.01)


# Networks, and methods to compute the norms.


@dataclass(frozen=True)
class Problem:
    """A network in eval mode, a batch, and a loss that returns one value for each sample, (B,)."""

    network: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]

    def losses(self) -> Tensor:
        """Return the loss of each sample."""
        return self.loss(self.network(self.inputs), self.targets)

    def part(self, samples: slice) -> Problem:
        """Return the problem with some of the samples."""
        return replace(self, inputs=self.inputs[samples], targets=self.targets[samples])


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the losses of a classifier."""
    return F.cross_entropy(logits, labels, reduction="none")


def squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the losses of a regression."""
    return F.mse_loss(outputs, targets, reduction="none").flatten(1).mean(1)


def problem(name: str, sizes: Sizes, samples: int, device: str) -> Problem:
    """Build one of the problems."""
    torch.manual_seed(0)
    if name == TRANSFORMER:
        module, (inputs, targets) = transformer()
        network = cast(nn.Module, module.encoder)
        return Problem(network.eval().to(device), inputs.to(device), targets.to(device), squared_errors)
    network = residual(sizes, 4 if name == RESNET else 3).net.eval().to(device)
    inputs, targets = images(sizes, samples)
    return Problem(network, inputs.to(device), targets.to(device), cross_entropies)


def images(sizes: Sizes, samples: int) -> tuple[Tensor, Tensor]:
    """Return noise and labels."""
    return torch.randn(samples, 3, sizes.image, sizes.image), torch.randint(10, (samples,))


Way = Callable[[nn.Module], Callable[[Problem], Any]]


def plain(network: nn.Module) -> Callable[[Problem], None]:
    """Return a function that computes the mean loss and its gradient, as a training step does."""

    def run(of: Problem) -> None:
        network.zero_grad()
        of.losses().mean().backward()  # type: ignore[no-untyped-call]

    return run


def ghost(network: nn.Module) -> Callable[[Problem], Tensor]:
    """Return ghost norms, which keep the traced network between calls."""
    norms = PerSampleGradientNorms(network)
    return lambda of: norms(of.losses)


def by_vmap(network: nn.Module) -> Callable[[Problem], Tensor]:
    """Return the method of torch.func: all gradients at once."""
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    buffers = dict(network.named_buffers())

    def run(of: Problem) -> Tensor:
        def loss(parameters: dict[str, Tensor], inputs: Tensor, target: Tensor) -> Tensor:
            outputs = functional_call(network, (parameters, buffers), (inputs.unsqueeze(0),))
            return of.loss(outputs, target.unsqueeze(0))[0]

        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, of.inputs, of.targets)
        return joined_norms(gradients.values())

    return run


def joined_norms(gradients: Iterable[Tensor]) -> Tensor:
    """Return the joint norm of gradients that have one row for each sample."""
    norms = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients]
    joined: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return joined


def one_by_one(network: nn.Module) -> Callable[[Problem], Tensor]:
    """Return a loop over the samples, with a forward and a backward pass for each."""
    parameters = list(network.parameters())

    def norm(of: Problem) -> Tensor:
        gradients = torch.autograd.grad(of.losses()[0], parameters)
        joined: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return joined

    return lambda of: torch.stack([norm(of.part(slice(i, i + 1))) for i in range(len(of.inputs))])


def by_opacus(network: nn.Module) -> Callable[[Problem], Tensor]:
    """Return the method of Opacus, a package for differential privacy: all gradients, by hooks on modules.

    Raises:
        ImportError: If it is not installed.
        NotImplementedError: If it does not support the network.
    """
    from opacus import GradSampleModule  # type: ignore[import-untyped, import-not-found, unused-ignore]
    from opacus.validators import ModuleValidator  # type: ignore[import-untyped, import-not-found, unused-ignore]

    # Its hooks record in training mode only, which changes nothing else without dropout. It needs its own attention: that
    # of 1.6.0 mixes up the heads with batch_first, so its norms differ from the others, but the cost is the same.
    network = copy.deepcopy(network).train()
    if any(isinstance(module, nn.MultiheadAttention) for module in network.modules()):
        network = ModuleValidator.fix(network)
    wrapped = GradSampleModule(network, loss_reduction="sum")

    def run(of: Problem) -> Tensor:
        wrapped.zero_grad()
        of.loss(wrapped(of.inputs), of.targets).sum().backward()  # type: ignore[no-untyped-call]
        return joined_norms(parameter.grad_sample for parameter in wrapped.parameters())

    return run


WAYS: dict[str, Way] = {PLAIN: plain, GHOST: ghost, VMAP: by_vmap, ONE_BY_ONE: one_by_one, OPACUS: by_opacus}


def norm_rows(name: str, sizes: Sizes, rounds: int, clock: Clock) -> list[Row]:
    """Time all methods on one network."""
    of = problem(name, sizes, sizes.batch, clock.device)
    calls: dict[str, Callable[[], Any]] = {}
    missing: list[Row] = []
    for way, build in WAYS.items():
        try:
            calls[way] = partial(build(of.network), of)
        except ImportError:
            missing.append(Row(f"{way} (not installed)", None, None))
        except NotImplementedError:
            missing.append(Row(f"{way} (refuses BatchNorm)", None, None))
    calls[f"{PLAIN}{AGAIN}"] = calls[PLAIN]
    typical = medians(calls, rounds, clock)
    is_transformer = name == TRANSFORMER
    budgets = {GHOST: {CONVNET: GHOST_CONVNET, RESNET: GHOST_RESNET, TRANSFORMER: GHOST_TRANSFORMER}[name]}
    rows = [against(way, typical, PLAIN, budgets.get(way)) for way in calls]
    factor = against(VMAP, typical, GHOST, None if is_transformer else VMAP_FACTOR, at_least=True)
    return [*rows, *missing, factor]


def medians(calls: Mapping[str, Callable[[], Any]], rounds: int, clock: Clock) -> dict[str, float]:
    """Time calls in turn, and return the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name in rotated(list(calls), i):
            seconds = clock.seconds(calls[name])
            if i:  # the first round warms up, and ghost norms trace the network in it
                times[name].append(seconds)
    return {name: median(seconds) for name, seconds in times.items()}


def against(
    name: str, typical: Mapping[str, float], baseline: str, budget: float | None = None, at_least: bool = False
) -> Row:
    """Return one line of a table of times."""
    ratio = typical[name] / typical[baseline]
    return Row(name, 1000 * typical[name], ratio, budget, at_least, "" if baseline == name else baseline)


# Memory.


def memory_rows(name: str, sizes: Sizes, threads: int, device: str) -> list[Row]:
    """Measure the peak memory of the methods, each in a process of its own."""
    cases = {PLAIN: (PLAIN, True), f"{PLAIN}{AGAIN}": (PLAIN, True), GHOST: (GHOST, True)}
    cases |= {FIRST: (GHOST, False), VMAP: (VMAP, True)}
    peaks = {row: in_fresh_process(peak_memory, *case, name, sizes, threads, device) for row, case in cases.items()}

    def row(case: str, baseline: str, budget: float | None = None, at_least: bool = False) -> Row:
        ratio, to = peaks[case] / peaks[baseline], "" if case == baseline else baseline
        return Row(case, None, ratio, budget, at_least, to, {"peak MB": round(peaks[case] / 1e6)})

    rows = [row(case, PLAIN, GHOST_MEMORY if case == GHOST else None) for case in cases]
    return [*rows, row(VMAP, GHOST, VMAP_MEMORY_FACTOR, at_least=True)]


def in_fresh_process(function: Callable[..., float], *arguments: Any) -> float:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(way: str, traced: bool, name: str, sizes: Sizes, threads: int, device: str) -> float:
    """Return the peak memory of one call in bytes, in addition to network and batch.

    Args:
        way: Name of the method.
        traced: Whether to call it on two samples first, on which ghost norms trace the network.
        name: Name of the problem.
        sizes: Sizes of the problem.
        threads: Threads of torch.
        device: Device to run on.
    """
    torch.set_num_threads(threads)
    # Code that torch loads on first use takes memory too, so load it before measuring. Keep this problem alive: its freed
    # memory would be reused and not counted.
    other = problem(name, sizes, 2, device)
    plain(other.network)(other)
    of = problem(name, sizes, sizes.crowd, device)
    run = WAYS[way](of.network)
    before = highest_memory(device)
    if traced:
        run(of.part(slice(0, 2)))
    run(of)
    return highest_memory(device) - before


def highest_memory(device: str) -> float:
    """Return the peak memory of this process in bytes."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():  # the resource module also counts the memory of the parent on Linux
        lines = status.read_text().splitlines()
        return 1024 * float(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
    import resource  # which Windows lacks

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes, on a Mac


# A scoring pass.


def grand_alone(look: Look) -> dict[str, Tensor]:
    """Return the norm of the gradient of the loss of a batch of one sample, and the loss."""
    with torch.enable_grad():
        loss = cast(Tensor, look.run())
        found = torch.autograd.grad(loss, list(look.pl_module.parameters()))
    return {"score": torch.nn.utils.get_total_norm(found).reshape(1), "loss": loss.detach().reshape(1)}


# Measures of a pass, as in DataPruning.
MEASURES: dict[str, Callable[[Look], dict[str, Tensor]]] = {
    "el2n": lambda look: {"score": el2n(look.loss())},
    "loss": lambda look: {"score": look.losses().losses},
    "grand": lambda look: {"score": look.gradient_norms()[0]},
    "loss, one by one": lambda look: {"score": cast(Tensor, look.run()).reshape(1)},
    "grand, one by one": grand_alone,
}


def training_set(sizes: Sizes) -> DataLoader[Any]:
    """Return a shuffled loader of noise."""
    return DataLoader(TensorDataset(*images(sizes, sizes.samples)), sizes.batch, shuffle=True)


def scoring_rows(sizes: Sizes, rounds: int, clock: Clock) -> list[Row]:
    """Time passes of EL2N, of ghost norms and of evaluation, all within one fit."""
    seed_everything(0, verbose=False)
    module, loader, subset = residual(sizes, sizes.stages), training_set(sizes), RepeatedRandomSubset(0.0)
    rows: list[Row] = []

    def measure(trainer: Trainer, pl_module: LightningModule) -> None:
        def look(score: str) -> Callable[[], Any]:
            assert subset.training_set is not None
            memory: dict[str, Any] = {}
            return partial(look_at_all, trainer, pl_module, subset.training_set, MEASURES[score], score, memory=memory)

        calls = {
            "evaluation": lambda: evaluate(module, loader, clock.device),
            "evaluation, again": lambda: evaluate(module, loader, clock.device),
            "el2n": look("el2n"),
            "grand": look("grand"),
        }
        typical = medians(calls, rounds, clock)
        budgets = {"el2n": SCORING, "grand": SCORING_GRAND}
        rows.extend(against(name, typical, "evaluation", budgets.get(name)) for name in calls)

    callbacks = [subset, LambdaCallback(on_train_epoch_start=measure)]
    quiet_trainer(clock.device, max_steps=1, callbacks=callbacks).fit(module, loader)
    return rows


# One sample at a time.


class Perceptron(LightningModule):
    """A network whose step takes a fraction of a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def single_modules(sizes: Sizes) -> dict[str, tuple[LightningModule, tuple[Tensor, Tensor]]]:
    """Return modules with their data, images of 8x8 for the first two."""
    digits = torch.randn(sizes.samples, 1, 8, 8), torch.randint(10, (sizes.samples,))
    return {
        "a perceptron": (Perceptron(), digits),
        "a vision transformer on 8x8 images": (VisionTransformer(), digits),
        CONVNET: (residual(sizes, sizes.stages), images(sizes, sizes.samples)),
    }


def single_rows(
    module: LightningModule, data: tuple[Tensor, Tensor], sizes: Sizes, rounds: int, clock: Clock
) -> list[Row]:
    """Time passes of one sample at a time and passes of batches, all within one fit."""
    seed_everything(0, verbose=False)
    loader, subset = DataLoader(TensorDataset(*data), sizes.batch, shuffle=True), RepeatedRandomSubset(0.0)
    rows: list[Row] = []

    def measure(trainer: Trainer, pl_module: LightningModule) -> None:
        def look(score: str, one_by_one: bool = False) -> Callable[[], Any]:
            measure = MEASURES[f"{score}, one by one" if one_by_one else score]
            return partial(look_at_all, trainer, pl_module, subset.training_set, measure, score, one_by_one=one_by_one)

        calls = {"loss": look("loss"), "loss, again": look("loss"), "loss, one by one": look("loss", True)}
        calls |= {"grand": look("grand"), "grand, one by one": look("grand", True)}
        typical = medians(calls, rounds, clock)
        rows.extend(against(name, typical, name.split(", ")[0]) for name in calls)

    callbacks = [subset, LambdaCallback(on_train_epoch_start=measure)]
    quiet_trainer(clock.device, max_steps=1, callbacks=callbacks).fit(module, loader)
    return rows


@torch.no_grad()
def evaluate(module: ResidualConvNet, shuffled: DataLoader[Any], device: str) -> float:
    """Return the mean loss over a data set, in eval mode."""
    module.eval()
    total = torch.zeros((), device=device)
    for inputs, labels in DataLoader(shuffled.dataset, shuffled.batch_size):
        total += cross_entropies(module(inputs.to(device)), labels.to(device)).sum()
    module.train()
    return float(total) / len(cast(Any, shuffled.dataset))


# Epochs.


class EpochTimer(Callback):
    """Record when each epoch starts. Must be the first callback, so the epochs include all other callbacks.

    Args:
        clock: The clock.
    """

    def __init__(self, clock: Clock) -> None:
        self._starts: list[float] = []
        self._clock = clock

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._starts.append(self._clock.now())

    @property
    def periods(self) -> list[float]:
        """Seconds from the start of each epoch to the start of the next."""
        return [end - start for start, end in pairwise(self._starts)]


def epochs_with(callbacks: Sequence[Callback], sizes: Sizes, clock: Clock) -> list[float]:
    """Train, and return the seconds of each epoch except the last."""
    seed_everything(0, verbose=False)
    timer = EpochTimer(clock)
    trainer = quiet_trainer(clock.device, max_epochs=EPOCHS + 1, callbacks=[timer, *callbacks])
    trainer.fit(residual(sizes, sizes.stages), training_set(sizes))
    return timer.periods


def epoch_rows(sizes: Sizes, rounds: int, clock: Clock) -> list[Row]:
    """Time epochs of half the data and full ones. Scoring and pruning happen when the second epoch begins."""
    scored = "DataPruning(prune=0.5)"
    used: dict[str, Callable[[], list[Callback]]] = {
        "full": list,
        "full, again": list,
        'DataPruning(prune=0.5, keep="random")': lambda: [DataPruning(0.5, epoch=1, keep="random")],
        scored: lambda: [DataPruning(0.5, epoch=1)],
        "RepeatedRandomSubset(prune=0.5)": lambda: [RepeatedRandomSubset(0.5)],
    }
    steady: dict[str, list[float]] = {name: [] for name in used}
    extra: list[float] = []
    for i in range(rounds):
        for name in rotated(list(used), i):
            periods = epochs_with(used[name](), sizes, clock)
            steady[name].append(median(periods[STEADY:]))
            if name == scored:
                extra.append(periods[1] - steady[name][-1])
    typical = {name: median(seconds) for name, seconds in steady.items()}
    scoring = f"{scored}, its scoring, once"
    typical[scoring] = median(extra)
    halves = [name for name in used if not name.startswith("full")]
    return [against(name, typical, "full", HALF if name in halves else None) for name in typical]


# Steps whose losses are read.

# Starts something and returns a function that ends it.
SetUp = Callable[[LightningModule], Callable[[], object]]


class ReadInTurns:
    """Run each step of a fit in the next of several variants.

    Args:
        module: Module of the fit.
        ways: Functions that set up a variant before a step and return a function that ends it.
    """

    def __init__(self, module: LightningModule, ways: Sequence[SetUp]) -> None:
        self._module = module
        self._ways = ways
        self._steps = 0
        self._end: Callable[[], object] = lambda: None

    def __call__(self) -> None:
        """Switch to the next variant; call it between steps."""
        self.close()
        self._end = self._ways[self._steps % len(self._ways)](self._module)
        self._steps += 1

    def close(self) -> None:
        """End the variant of the last step."""
        self._end()
        self._end = lambda: None


def under_an_empty_mode(module: LightningModule) -> Callable[[], None]:
    """Run the steps in a context of torch that intercepts every function and does nothing: the lower bound."""

    def step(*args: Any) -> Any:
        with BaseTorchFunctionMode():
            return type(module).training_step(module, *args)

    return in_place_of(module, step)


def left_alone(module: LightningModule) -> Callable[[], None]:
    """Run the module's own training step without anything wrapped around it."""
    return in_place_of(module, type(module).training_step.__get__(module))


def in_place_of(module: LightningModule, step: Callable[..., Any]) -> Callable[[], None]:
    """Replace a module's training step; return a function that restores it."""
    before = module.__dict__.get("training_step")
    module.training_step = step  # type: ignore[method-assign]

    def end() -> None:
        del module.training_step
        if before is not None:
            module.training_step = before  # type: ignore[method-assign]

    return end


class LossByHand(ResidualConvNet):
    """The network with a focal loss written by hand."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        likelihoods = self(images).log_softmax(1).gather(1, labels[:, None])[:, 0]
        loss: Tensor = -((1 - likelihoods.exp()) ** 2 * likelihoods).mean()
        return loss


def reading_rows(kind: type[ResidualConvNet], sizes: Sizes, rounds: int, clock: Clock) -> list[Row]:
    """Time steps of one fit whose losses are unread, read, or read and weighted, in turn."""
    module = kind(1, sizes.reading, (1,), schedule="constant", optimizer="sgd", lr=0.01)
    batch = (torch.randn(64, 1, 8, 8), torch.randint(10, (64,)))
    is_weighted: list[bool] = []

    def weighted(module: LightningModule) -> Callable[[], None]:
        is_weighted.append(True)
        return is_weighted.clear

    ways: dict[str, SetUp] = {
        "unread": left_alone,
        "weights not needed": lambda module: lambda: None,
        "weighted": weighted,
        "an empty mode of torch": under_an_empty_mode,
        "unread, again": left_alone,
    }
    if kind is not LossByHand:
        ways["read"] = lambda module: cast(Any, read_losses(module, lambda call: None))
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        asked = LossRequest("weighted")
        remove = reweight_losses(
            module, lambda found: torch.ones_like(found.losses), asked, needs=lambda: bool(is_weighted)
        )
        turns = ReadInTurns(module, list(ways.values()))
        periods = timed_fit(module, batch, sizes.steps, [], clock, turns)
        turns.close()
        remove()
        for i, name in enumerate(ways):
            found[name].append(median(periods[(i - WARM_STEPS) % len(ways) :: len(ways)]))
    typical = {name: min(medians) for name, medians in found.items()}
    return [against(name, typical, "unread", READING if name == "read" else None) for name in ways]


# Steps that are traced.


def traced_networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Return the traced networks with their inputs. Their steps take a fraction of a millisecond, and about 70 ms."""
    small = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
    layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
    large = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return {"a small network": (small, torch.randn(64, 64)), "a transformer": (large, torch.randn(24, 64, 128))}


def traced_rows(network: nn.Module, inputs: Tensor, rounds: int, clock: Clock) -> list[Row]:
    """Time forward and backward with a loss by hand and one of torch, unchanged, weighted, and weighted and read."""
    network, inputs = network.to(clock.device), inputs.to(clock.device)
    parameters, samples = list(network.parameters()), len(inputs)
    targets, weights = torch.randn_like(network(inputs)), torch.ones(samples, device=clock.device)

    def by_hand() -> Tensor:
        outputs = network(inputs)
        loss: Tensor = F.mse_loss(outputs, targets) + 0.1 * (outputs - targets).abs().mean()
        return loss

    def of_torch() -> Tensor:
        return F.mse_loss(network(inputs), targets)

    def plain_step(loss: Callable[[], Tensor]) -> None:
        torch.autograd.grad(loss(), parameters)

    def within(context: Callable[[], AbstractContextManager[Any]], loss: Callable[[], Tensor]) -> None:
        with context():
            value = loss()
        torch.autograd.grad(value, parameters)

    def weighted(values: bool, loss: Callable[[], Tensor]) -> Tensor:
        with LossTrace(samples, values=values) as trace:
            value = loss()
        trace.terms(value, check=False).weight_(weights)
        return value

    def traced(values: bool, loss: Callable[[], Tensor]) -> None:
        # As in a training step, the trace is gone before backward runs; only its hooks remain.
        torch.autograd.grad(weighted(values, loss), parameters)

    calls: dict[str, Callable[[], Any]] = {}
    for kind, loss in {"by hand": by_hand, "of torch": of_torch}.items():
        calls[f"loss {kind}"] = partial(plain_step, loss)
        calls[f"loss {kind}, again"] = partial(plain_step, loss)
        calls[f"loss {kind}, an empty mode of torch"] = partial(within, BaseTorchFunctionMode, loss)
        if kind == "of torch":
            calls["loss of torch, LossCapture"] = partial(within, partial(LossCapture, samples), loss)
        calls[f"loss {kind}, weights"] = partial(traced, False, loss)
        calls[f"loss {kind}, weights and values"] = partial(traced, True, loss)
    repeats = 1 if clock.seconds(calls["loss by hand"]) > 0.01 else 20
    repeating = {name: partial(repeated, call, repeats) for name, call in calls.items()}
    found = [medians(repeating, TURNS, clock) for _ in range(rounds)]
    typical = {name: min(each[name] for each in found) / repeats for name in calls}

    def row(name: str) -> Row:
        baseline = name.split(", ")[0]
        added = 0.002 if "values" in name else 0.001 if "weights" in name else None
        budget = None if added is None else max(TRACED, 1 + added / typical[baseline])
        return against(name, typical, baseline, budget)

    return [row(name) for name in calls]


def keep_freed_memory() -> None:
    """Stop glibc from returning freed memory: otherwise thousands of page faults a step dominate the noise."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**25)


def repeated(call: Callable[[], Any], times: int) -> None:
    """Call a function repeatedly, because one call is too short for the clock."""
    for _ in range(times):
        call()


# Command line.


def prepare() -> None:
    """Silence warnings of vmap and Opacus, and turn off the attention fast path, which vmap does not support."""
    silence()
    for message in (".*have not yet implemented the batching rule.*", ".*Full backward hook is firing.*"):
        warnings.filterwarnings("ignore", message)
    torch.backends.mha.set_fastpath_enabled(False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    assert __doc__ is not None
    options = speed_options(__doc__, arguments, quick="one round, one convnet: a rough answer in two minutes")
    prepare()
    torch.set_num_threads(options.threads)
    rounds, clock, sizes = options.rounds, Clock(options.device), SIZES[options.device]
    print(f"{machine(options.device)}; {rounds} rounds")
    tables: dict[str, list[Row]] = {}

    def add(title: str, rows: list[Row]) -> None:
        tables[title] = rows
        show(title, rows)

    for name in (CONVNET, TRANSFORMER) if options.quick else (CONVNET, RESNET, TRANSFORMER):
        add(f"Norms, {name}", norm_rows(name, sizes, 2 * rounds, clock))
    for name in (CONVNET,) if options.quick else (CONVNET, RESNET):
        add(f"Memory, {name}", memory_rows(name, sizes, options.threads, options.device))
    add("A scoring pass", scoring_rows(sizes, rounds, clock))
    for name, (module, data) in single_modules(sizes).items():
        add(f"One sample at a time, {name}", single_rows(module, data, sizes, max(1, rounds // 2), clock))
    add("Epochs", epoch_rows(sizes, max(1, rounds // 2), clock))
    add("Steps read", reading_rows(ResidualConvNet, sizes, rounds, clock))
    add("Steps read, loss by hand", reading_rows(LossByHand, sizes, rounds, clock))
    keep_freed_memory()
    for name, (network, inputs) in traced_networks().items():
        add(f"Steps traced, {name}", traced_rows(network, inputs, rounds, clock))
    show_missed(tables)
    write_tables(options, tables)


if __name__ == "__main__":
    main()
