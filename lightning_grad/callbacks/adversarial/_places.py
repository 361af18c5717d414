"""Where a perturbation goes in: a tensor of the batch or, where a batch holds only integers, the output of an embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_grad.utilities.batches import Path, find_input, input_at, with_input
from lightning_grad.utilities.forward_order import is_compiled

Run = Callable[[Any], Any]


class Place(Protocol):
    """What is perturbed."""

    def inputs(self, batch: Any, run: Run) -> Tensor:
        """Return what is there now, (B, ...), without graph; ``run`` runs a step on a batch."""

    def shown(self, batch: Any, inputs: Tensor) -> Any:
        """Return a context in which other inputs are there; it yields the batch to run."""


class BatchTensor:
    """A tensor of the batch.

    Args:
        path: Where in the batch it is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def inputs(self, batch: Any, run: Run) -> Tensor:
        """Return the tensor."""
        return input_at(batch, self._path).detach()

    @contextmanager
    def shown(self, batch: Any, inputs: Tensor) -> Iterator[Any]:
        """Yield another batch that has the inputs."""
        yield with_input(batch, self._path, inputs)


class EmbeddingOutput:
    """The output of the first ``nn.Embedding`` that a step calls, the first time it calls it.

    The weights of the embedding are trained as ever: what is added to its output is a constant.

    Args:
        pl_module: The module.
        needed_by: Who asks, for errors.
    """

    def __init__(self, pl_module: pl.LightningModule, needed_by: str) -> None:
        self._embeddings = [module for module in pl_module.modules() if isinstance(module, nn.Embedding)]
        self._needed_by = needed_by
        if any(is_compiled(module) for module in pl_module.modules()):
            raise ValueError(
                f"{needed_by} perturbs the output of an nn.Embedding by a hook, and compiled code does not run hooks. Train "
                "uncompiled, or name a floating tensor of the batch by input_key."
            )

    def inputs(self, batch: Any, run: Run) -> Tensor:
        """Run the step, and return what the embedding gives."""
        seen: list[Tensor] = []
        with self._hooked(lambda output: seen.append(output.detach())), torch.no_grad():
            run(batch)
        if not seen:
            raise RuntimeError(f"{self._needed_by}: the step calls none of the module's nn.Embedding layers.")
        return seen[0]

    @contextmanager
    def shown(self, batch: Any, inputs: Tensor) -> Iterator[Any]:
        """Have the embedding give the inputs, and yield the batch as it is."""
        with self._hooked(lambda output: output + (inputs - output.detach())):
            yield batch

    @contextmanager
    def _hooked(self, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        called: list[nn.Module] = []

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            called.append(module)
            return change(output) if len(called) == 1 else None

        handles = [module.register_forward_hook(hook) for module in self._embeddings]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


EMBEDDING = "embedding"


def find_place(pl_module: pl.LightningModule, batch: Any, input_key: str | int | None, needed_by: str) -> Place:
    """Return where to perturb what a module gets, and tell it.

    Args:
        pl_module: The module.
        batch: A batch of it.
        input_key: A key of the batch, ``"embedding"`` for the output of the first embedding, or ``None``.
        needed_by: Who asks.

    Raises:
        ValueError: If ``input_key`` leads to no floating tensor, or the embedding is compiled.
        TypeError: If the batch holds no floating tensor of two dimensions, and the module no embedding.
    """
    wants_embedding = input_key == EMBEDDING and not (isinstance(batch, Mapping) and EMBEDDING in batch)
    path = None if wants_embedding else find_input(batch, input_key, needed_by)
    if path is not None:
        where = "".join(f"[{key!r}]" for key in path)
        rank_zero_info(f"{needed_by} perturbs batch{where}, of shape {tuple(input_at(batch, path).shape)}.")
        return BatchTensor(path)
    if not any(isinstance(module, nn.Embedding) for module in pl_module.modules()):
        if wants_embedding:
            raise TypeError(f"{needed_by}: input_key='embedding', and the module has no nn.Embedding.")
        raise TypeError(
            f"{needed_by} needs an input with a gradient: the batch holds no floating tensor with two or more dimensions, and "
            "the module has no nn.Embedding. Convert integer images to floats in the data set or in "
            "on_after_batch_transfer, or name a tensor by input_key."
        )
    rank_zero_info(f"{needed_by} perturbs the output of the first nn.Embedding that a step calls.")
    return EmbeddingOutput(pl_module, needed_by)
