"""Measure in one training step what the training of each layer needs and promises."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_grad.core import LossRequest, quiet
from lightning_grad.core.losses.sample_losses import trained_loss
from lightning_grad.core.losses.scoring import indexed_loader, runner, to_device
from lightning_grad.core.probe_samples import ProbeSamples, chosen_samples
from lightning_grad.core.quiet import eager
from lightning_grad.core.undo import UndoList
from lightning_grad.data.random_streams import generators_kept
from lightning_grad.functional import LayerMemory, SavedActivations
from lightning_grad.utilities.batch_copies import copy_of


@contextmanager
def first_step(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loader_key: str | int | None, display_name: str
) -> Iterator[Callable[[], Tensor]]:
    """Yield a function that runs the training step on a batch in training mode and returns the loss; without a trace.

    The batch has the size of the loader's batches. Its samples are spread over the data set, the same on all ranks. Of a data
    set of whole batches, it is the first one.
    """
    trainer.fit_loop.setup_data()  # as estimated_stepping_batches does in configure_optimizers
    way_out = "choose the layers yourself: set layers= to their names, without budget="
    asked = LossRequest(display_name, way_out=way_out)
    samples, undo = ProbeSamples(trainer, 1, "train", loader_key, None, asked, at_most=True), UndoList()

    def loss() -> Tensor:
        try:
            return trained_loss(run(), f"{display_name} needs it to measure gradients. {asked.advice}")
        except Exception as error:
            error.add_note(
                f"{display_name} raised this when it ran training_step before the optimizers exist. If the step needs what "
                f"is made later, {way_out}."
            )
            raise

    stage = trainer.state.stage
    with ExitStack() as stack:
        stack.enter_context(quiet(trainer, pl_module, evaluate=False, display_name=display_name))
        stack.enter_context(eager())
        stack.enter_context(trainer.precision_plugin.forward_context())
        stack.callback(undo.run)
        stack.callback(setattr, trainer.state, "stage", stage)
        trainer.training = True  # hooks of the module may check the trainer's stage
        loader: Any = trainer.train_dataloader
        if _gives_whole_batches(loader):
            stack.enter_context(generators_kept([loader.dataset, loader.collate_fn]))
            batch = next(iter(indexed_loader(loader, None, cast(Any, [0]), 0)))
            run = runner(trainer, pl_module, to_device(trainer, copy_of(batch)))
        else:
            stack.enter_context(samples.kept())
            look = samples.look(pl_module, 0, 0, undo)
            indices = chosen_samples(look.batch_size, look.total, "train", display_name, at_most=True)
            run = look.on(look.read(indices)).run
        yield loss


def _gives_whole_batches(loader: Any) -> bool:
    """Return True for ``DataLoader(batch_size=None)`` of a data set whose items are batches."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return loader.batch_sampler is None and not isinstance(getattr(loader.sampler, "batch_size", None), int)


@dataclass(frozen=True)
class _Save:
    """A tensor that autograd saved.

    Args:
        call: Number of the module calls that had begun.
        layer: The innermost layer that was running.
        storage: Address of its memory.
        size: Bytes of its memory.
        kind: What it looks like, to find it again in another run.
    """

    call: int
    layer: nn.Module | None
    storage: int
    size: int
    kind: tuple[Any, ...]


@dataclass
class _Calls:
    """The calls of modules in one run, and what autograd saved in each.

    Args:
        layers: The modules whose own bytes are wanted.
    """

    layers: Collection[nn.Module]
    starts: dict[nn.Module, int] = field(default_factory=dict)
    saves: list[_Save] = field(default_factory=list)
    _running: list[nn.Module] = field(default_factory=list)
    _count: int = 0

    def enter(self, module: nn.Module, inputs: Any) -> None:
        self._count += 1
        self.starts.setdefault(module, self._count)
        self._running.append(module)

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()

    def save(self, tensor: Tensor) -> None:
        inside = next((module for module in reversed(self._running) if module in self.layers), None)
        storage = tensor.untyped_storage()
        kind = (self._count, tuple(tensor.shape), tensor.dtype)
        self.saves.append(_Save(self._count, inside, storage.data_ptr(), storage.nbytes(), kind))

    def split(self, other: _Calls) -> tuple[list[_Save], list[_Save]]:
        """Return what another run with fewer trained layers saves too, and the rest; both as saves of this run."""
        left = Counter(save.kind for save in other.saves)
        common: list[_Save] = []
        rest: list[_Save] = []
        for save in self.saves:
            (common if left[save.kind] > 0 else rest).append(save)
            left[save.kind] -= 1
        return common, rest


def _memories(saves: Iterable[_Save]) -> dict[int, int]:
    """Return the bytes of each memory, by its address."""
    return {save.storage: save.size for save in saves}


def _by_layer(saves: Iterable[_Save]) -> dict[nn.Module | None, dict[int, int]]:
    """Return the memories that were saved in each layer."""
    found: dict[nn.Module | None, dict[int, int]] = {}
    for save in saves:
        found.setdefault(save.layer, {})[save.storage] = save.size
    return found


def _bytes_behind(path: Sequence[_Save]) -> Callable[[int], int]:
    """Return a function of a call: the bytes that are saved from it on."""
    calls, totals, known = [0], [0], set[int]()  # from the last save to the first
    for save in reversed(path):
        calls.append(-save.call)
        totals.append(totals[-1] + (0 if save.storage in known else save.size))
        known.add(save.storage)
    return lambda start: totals[bisect_right(calls, -start, lo=1) - 1]


class LayerMeter:
    """Measures the memory and the gradient of layers.

    Args:
        pl_module: The module.
        layers: Parameters of each layer that may be chosen, by the name of the layer.
        trainable: All parameters that a dense fit would train.
        run: Runs the training step and returns the loss.
        state: Values of optimizer state for each weight.
    """

    def __init__(
        self,
        pl_module: nn.Module,
        layers: Mapping[str, Sequence[nn.Parameter]],
        trainable: Sequence[nn.Parameter],
        run: Callable[[], Tensor],
        state: float,
    ) -> None:
        self.layers = layers
        self.state = state
        self._module, self._run = pl_module, run
        self._owners = {name: pl_module.get_submodule(name) for name in layers}
        self._trainable = trainable
        self._present = [*pl_module.parameters(), *pl_module.buffers()]

    def weight_bytes(self, names: Collection[str] | None) -> tuple[int, int]:
        """Return the bytes of the gradients and of the optimizer state of some layers; ``None`` for all parameters."""
        gradients = sum(p.numel() * p.element_size() for p in self._parameters(names))
        return gradients, round(gradients * self.state)

    def _parameters(self, names: Collection[str] | None) -> Sequence[nn.Parameter]:
        return self._trainable if names is None else list(chain(*(self.layers[name] for name in names)))

    def saved_bytes(self, names: Collection[str] | None, calls: _Calls | None = None, backward: bool = False) -> int:
        """Return the bytes that autograd saves in a step in which only some layers train; ``None`` for all parameters."""
        trained = {id(parameter) for parameter in self._parameters(names)}
        if not trained:
            return 0
        for parameter in self._trainable:
            parameter.requires_grad_(id(parameter) in trained)
        handles = [] if calls is None else list(self._watch(calls))
        try:
            with torch.enable_grad(), SavedActivations(self._present, None if calls is None else calls.save) as saved:
                loss = self._run()
            if backward:
                torch.autograd.backward(loss)
            return saved.bytes
        finally:
            for handle in handles:
                handle.remove()
            for parameter in self._trainable:
                parameter.requires_grad_(True)

    def needed(self, names: Collection[str]) -> int:
        """Return all bytes that the training of some layers needs, measured."""
        return sum(self.weight_bytes(names)) + self.saved_bytes(names)

    def measure(self) -> tuple[list[LayerMemory], int]:
        """Return what each layer needs, in the order of their calls, and the bytes of a dense fit.

        Two steps tell it for all layers: one in which all train, and one in which only the first does. What autograd saves
        in both is the path: it is there for the gradients of the layers before. The rest is for the layers themselves.
        """
        dense, first = (_Calls(set(self._owners.values())) for _ in range(2))
        total = sum(self.weight_bytes(None)) + self.saved_bytes(None, dense, backward=True)
        gains = {name: self._gain(name) for name in self.layers}
        for parameter in self._trainable:
            parameter.grad = None
        starts = {name: self._start(name, dense) for name in self.layers}
        ordered = sorted((name for name in self.layers if gains[name] > 0), key=starts.__getitem__)
        self.saved_bytes(ordered[:1], first)
        path, own = dense.split(first)
        behind, on_path, inside = _bytes_behind(path), _memories(path), _by_layer(own)
        return [
            self._memory(name, gains[name], behind(starts[name]), inside.get(self._owners[name], {}), on_path)
            for name in ordered
        ], total

    def _memory(
        self, name: str, gain: float, behind: int, inside: Mapping[int, int], path: Mapping[int, int]
    ) -> LayerMemory:
        # A layer's input may be saved on the path too, by the layer before: then it is not yet in the path from the start
        # of this layer, but it is in that of every earlier one.
        shared = sum(size for storage, size in inside.items() if storage in path)
        return LayerMemory(name, sum(self.weight_bytes([name])) + sum(inside.values()) - shared, behind + shared, gain)

    def _watch(self, calls: _Calls) -> Iterator[Any]:
        for module in self._module.modules():
            yield module.register_forward_pre_hook(calls.enter)
            yield module.register_forward_hook(calls.leave, always_call=True)

    def _gain(self, name: str) -> float:
        """Return the squared norm of a layer's gradient; 0 if it has none or it is not finite."""
        squares = [_square(p.grad) for p in self.layers[name] if p.grad is not None]
        gain = float(torch.stack(squares).sum()) if squares else 0.0
        return gain if gain < float("inf") else 0.0  # nan compares as False

    def _start(self, name: str, calls: _Calls) -> int:
        """Return when a layer is called first; for a layer that its parent reads, when the parent is."""
        levels = name.split(".") if name else []
        above = (self._module.get_submodule(".".join(levels[:depth])) for depth in range(len(levels), -1, -1))
        return next((calls.starts[module] for module in above if module in calls.starts), 0)


def _square(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.complex128 if values.is_complex() else torch.float64)
    return norm.square()
