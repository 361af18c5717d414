"""Where a perturbation goes in: a tensor of the batch or, where a batch holds only integers, the output of an embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_grad.callbacks.adversarial._pieces import joined, parted, support_of
from lightning_grad.core.compatibility import yes
from lightning_grad.functional.plain_tensors import dressed, is_opaque, plain_tensor
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.batches import EVERY, Path, first_numbers, input_at, text_of, with_input
from lightning_grad.utilities.forward_order import is_compiled
from lightning_grad.utilities.input_patterns import are_samples, expanded, find_inputs, has_inputs, neighbours

COMPILED = yes("Attacks run compiled modules. Where the output of an embedding is attacked, compiled modules raise.")
Run = Callable[[Any], Any]


class Place(Protocol):
    """What is perturbed. What it returns is plain: attacks compute on no tensor of another class."""

    @property
    def names(self) -> list[str]:
        """What is perturbed, as one would write it."""

    def inputs(self, batch: Any, run: Run) -> Tensor:
        """Return what is there now, (B, ...), without graph; ``run`` runs a step on a batch."""

    def support(self, batch: Any) -> Tensor | None:
        """Return where inputs may change, 1 there and 0 elsewhere; ``None`` for everywhere."""
        return None

    def shown(self, batch: Any, inputs: Tensor) -> AbstractContextManager[Any]:
        """Return a context in which a copy of other inputs is there; it yields the batch to run."""


class BatchTensor(Place):
    """A tensor of the batch, or several: those of all samples where a batch is a list.

    Args:
        pattern: Where in the batch it is.
        samples: Whether each tensor is one sample.
        input_key: What was asked for, to find it in a batch of another form.
        needed_by: Who asks, for errors.
    """

    def __init__(self, pattern: Path, samples: bool, input_key: str | int | None, needed_by: str) -> None:
        self._pattern, self._samples = pattern, samples
        self._input_key = input_key
        self._needed_by = needed_by
        self._told = [pattern]

    @property
    def names(self) -> list[str]:
        """Where in the batch it was found so far."""
        return [text_of(pattern) for pattern in self._told]

    def inputs(self, batch: Any, run: Run) -> Tensor:
        paths, samples = self._found_in(batch)
        pieces = [plain_tensor(input_at(batch, path)).detach() for path in paths]
        return pieces[0] if samples is None else joined(pieces, samples)

    def support(self, batch: Any) -> Tensor | None:
        paths, samples = self._found_in(batch)
        return None if samples is None else support_of([plain_tensor(input_at(batch, path)) for path in paths], samples)

    @contextmanager
    def shown(self, batch: Any, inputs: Tensor) -> Iterator[Any]:
        paths, samples = self._found_in(batch)
        olds = [input_at(batch, path) for path in paths]
        parts = [inputs] if samples is None else parted(inputs, olds, samples)
        for path, old, part in zip(paths, olds, parts, strict=True):
            batch = with_input(batch, path, _in_place_of(old, part))
        yield batch

    def _found_in(self, batch: Any) -> tuple[list[Path], bool | None]:
        """Return where the tensors are, and whether each is a sample; ``None`` for a single one."""
        pattern, samples = self._pattern_in(batch)
        return expanded(batch, pattern), samples if EVERY in pattern else None

    def _pattern_in(self, batch: Any) -> tuple[Path, bool]:
        """Return where the input is, and whether each is a sample: in a batch of another form it is looked for again."""
        if has_inputs(batch, self._pattern):
            return self._pattern, self._samples
        found = find_inputs(batch, self._input_key, self._needed_by)
        if found is None:
            raise TypeError(
                f"{self._needed_by} perturbs {text_of(self._pattern)}, and a later batch has no floating tensor there, and "
                "no other input that is clear. Name by input_key one that every batch has."
            )
        if found not in self._told:
            self._told.append(found)
            rank_zero_info(f"{self._needed_by} perturbs {text_of(found)} in batches without {text_of(self._pattern)}.")
        return found, are_samples(batch, found)


def _in_place_of(old: Tensor, new: Tensor) -> Tensor:
    """Return a copy of plain inputs, of the class and with the attributes of those that they replace."""
    own = plain_tensor(old)
    if own.grad_fn is not None:  # what a network before the step has made, which learns by it
        return dressed(own + (new - own.detach()), old, copy_of)
    shown = dressed(new.clone(), old, copy_of)
    # A step may differentiate by an input that a hook before it has prepared for that.
    return shown.requires_grad_() if own.requires_grad and not shown.requires_grad else shown


class EmbeddingOutput(Place):
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

    @property
    def names(self) -> list[str]:
        """One for all embeddings: the step says which it calls first."""
        return ["the output of the first nn.Embedding"]

    def inputs(self, batch: Any, run: Run) -> Tensor:
        """Run the step, and return what the embedding gives."""
        seen: list[Tensor] = []
        # A copy: layers behind the embedding may work in place.
        with self._hooked(lambda output: seen.append(plain_tensor(output).detach().clone())), torch.no_grad():
            run(copy_of(batch))
        if not seen:
            raise RuntimeError(
                f"{self._needed_by} perturbs the output of an nn.Embedding, and the step calls none of the module's. Call the "
                "embedding as a module, embedding(x), or name a floating tensor of the batch by input_key."
            )
        return seen[0]

    @contextmanager
    def shown(self, batch: Any, inputs: Tensor) -> Iterator[Any]:
        """Have the embedding give the inputs, and yield the batch as it is."""

        def exchanged(output: Tensor) -> Tensor:
            own = plain_tensor(output)
            return dressed(own + (inputs - own.detach()), output)

        with self._hooked(exchanged):
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
    pattern = None if wants_embedding else find_inputs(batch, input_key, needed_by)
    if pattern is not None:
        _refuse_kinds(batch, pattern, needed_by)
        rank_zero_info(f"{needed_by} perturbs {_described(batch, pattern)}.")
        return BatchTensor(pattern, are_samples(batch, pattern), input_key, needed_by)
    has_embedding = any(isinstance(module, nn.Embedding) for module in pl_module.modules())
    if wants_embedding and not has_embedding:
        raise TypeError(
            f"{needed_by}(input_key='embedding') perturbs the output of an nn.Embedding, and {type(pl_module).__name__} has "
            "none. Leave input_key out, or name a floating tensor of the batch by it."
        )
    if not wants_embedding:
        _refuse_unclear(batch, has_embedding, needed_by)
    rank_zero_info(f"{needed_by} perturbs the output of the first nn.Embedding that a step calls.")
    return EmbeddingOutput(pl_module, needed_by)


def _described(batch: Any, pattern: Path) -> str:
    """Return which tensors are perturbed and, if others alike in their list are not, how to include them."""
    shapes = list(dict.fromkeys(tuple(input_at(batch, path).shape) for path in expanded(batch, pattern)))
    if EVERY in pattern:
        several = len(expanded(batch, pattern))
        each = f"of shape {shapes[0]} each" if len(shapes) == 1 else f"of shapes such as {shapes[0]} and {shapes[1]}"
        return f"{text_of(pattern)}, {several} tensors {each}"
    wider = neighbours(batch, pattern)
    only = ""
    if wider is not None:
        key = ".".join(map(str, wider))
        only = f", and none of the others in {text_of(wider)}; input_key={key!r} perturbs all {len(expanded(batch, wider))}"
    return f"{text_of(pattern)}, of shape {shapes[0]}{only}"


def _refuse_kinds(batch: Any, pattern: Path, needed_by: str) -> None:
    for path in expanded(batch, pattern):
        value = input_at(batch, path)
        if is_opaque(value) or value.is_nested or value.layout != torch.strided:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            raise TypeError(
                f"{needed_by} cannot perturb {text_of(path)}: it is a {type(value).__name__} ({kind}), not dense. Make it "
                "dense in the data set or in on_after_batch_transfer, or name another input by input_key."
            )


def _refuse_unclear(batch: Any, has_embedding: bool, needed_by: str) -> None:
    path, value = first_numbers(batch)
    # No embedding takes bytes: those of more than two dimensions are images, and what is embedded is something else.
    is_image = value is not None and value.dtype == torch.uint8 and value.dim() > 2
    if has_embedding and not is_image:
        return
    why = "the batch holds no floating tensor with two or more dimensions (targets, masks and weights aside)"
    if path is not None and value is not None:
        why = f"the first tensor of the batch with two or more dimensions, {text_of(path)}, is one of {value.dtype}"
    but = "no nn.Embedding would take it" if has_embedding else "the module has no nn.Embedding"
    raise TypeError(
        f"{needed_by} needs an input with a gradient: {why}, and {but}. Convert integer images to floats in the data set or "
        "in on_after_batch_transfer, or name a tensor by input_key."
    )
