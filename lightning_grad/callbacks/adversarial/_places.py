"""Where a perturbation goes in: a tensor of the batch or, where a batch holds only integers, the output of an embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_grad.utilities.batches import (
    Path,
    copy_of,
    find_input,
    first_numbers,
    has_input,
    input_at,
    text_of,
    with_input,
)
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
        input_key: What was asked for, to find it in a batch of another form.
        needed_by: Who asks, for errors.
    """

    def __init__(self, path: Path, input_key: str | int | None, needed_by: str) -> None:
        self._path = path
        self._input_key = input_key
        self._needed_by = needed_by
        self._told = [path]

    def inputs(self, batch: Any, run: Run) -> Tensor:
        """Return the tensor."""
        return input_at(batch, self._path_in(batch)).detach()

    @contextmanager
    def shown(self, batch: Any, inputs: Tensor) -> Iterator[Any]:
        """Yield another batch that has the inputs."""
        yield with_input(batch, self._path_in(batch), inputs)

    def _path_in(self, batch: Any) -> Path:
        """Return where the input is: in a batch of another form it is looked for anew."""
        if has_input(batch, self._path):
            return self._path
        path = find_input(batch, self._input_key, self._needed_by)
        if path is None:
            raise TypeError(
                f"{self._needed_by} perturbs {text_of(self._path)}, and a later batch has no floating tensor there, and no "
                "other input that is clear. Name by input_key one that every batch has."
            )
        if path not in self._told:
            self._told.append(path)
            rank_zero_info(f"{self._needed_by} perturbs {text_of(path)} in batches without {text_of(self._path)}.")
        return path


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
            run(copy_of(batch))
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
        TypeError: If the batch holds no floating tensor of two dimensions, or integers before it, and the module no
            embedding that could take them.
    """
    wants_embedding = input_key == EMBEDDING and not (isinstance(batch, Mapping) and EMBEDDING in batch)
    path = None if wants_embedding else find_input(batch, input_key, needed_by)
    if path is not None:
        rank_zero_info(f"{needed_by} perturbs {text_of(path)}, of shape {tuple(input_at(batch, path).shape)}.")
        return BatchTensor(path, input_key, needed_by)
    has_embedding = any(isinstance(module, nn.Embedding) for module in pl_module.modules())
    if wants_embedding and not has_embedding:
        raise TypeError(f"{needed_by}: input_key='embedding', and the module has no nn.Embedding.")
    if not wants_embedding:
        _refuse_unclear(batch, has_embedding, needed_by)
    rank_zero_info(f"{needed_by} perturbs the output of the first nn.Embedding that a step calls.")
    return EmbeddingOutput(pl_module, needed_by)


def _refuse_unclear(batch: Any, has_embedding: bool, needed_by: str) -> None:
    path, value = first_numbers(batch)
    # No embedding takes bytes: those of more than two dimensions are images, and what is embedded is something else.
    is_image = value is not None and value.dtype == torch.uint8 and value.dim() > 2
    if has_embedding and not is_image:
        return
    why = (
        f"the first tensor of the batch with two or more dimensions, {text_of(path)}, is one of {value.dtype}"
        if path is not None and value is not None
        else "the batch holds no floating tensor with two or more dimensions (targets, masks and weights aside)"
    )
    but = "no nn.Embedding would take it" if has_embedding else "the module has no nn.Embedding"
    raise TypeError(
        f"{needed_by} needs an input with a gradient: {why}, and {but}. Convert integer images to floats in the data set or "
        "in on_after_batch_transfer, or name a tensor by input_key."
    )
