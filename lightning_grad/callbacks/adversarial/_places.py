"""Places to perturb: a tensor of the batch, or the output of an embedding if a batch holds only integers."""

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

COMPILED = yes("Attacks run compiled modules. If the output of an embedding is attacked, compiled modules raise.")
Run = Callable[[Any], Any]


class Place(Protocol):
    """The inputs that an attack perturbs. It returns plain tensors: attacks do not work on tensor subclasses."""

    @property
    def names(self) -> list[str]:
        """Readable names of the perturbed inputs."""

    def inputs(self, batch: Any, run: Run) -> Tensor:
        """Return the current inputs, (B, ...), without graph; ``run`` runs a step on a batch."""

    def support(self, batch: Any) -> Tensor | None:
        """Return a mask of the inputs, 1 where they may change and 0 elsewhere; ``None`` for everywhere."""
        return None

    def shown(self, batch: Any, inputs: Tensor) -> AbstractContextManager[Any]:
        """Return a context that replaces the inputs with a copy of the given ones and yields the batch to run."""


class BatchTensor(Place):
    """One tensor of the batch, or the tensors of all samples if a batch is a list.

    Args:
        pattern: Path of the input in the batch.
        samples: Whether each tensor is one sample.
        input_key: The user's ``input_key``, to find the input in batches of another form.
        needed_by: Name of the callback in errors.
    """

    def __init__(self, pattern: Path, samples: bool, input_key: str | int | None, needed_by: str) -> None:
        self._pattern, self._samples = pattern, samples
        self._input_key = input_key
        self._needed_by = needed_by
        self._reported = [pattern]

    @property
    def names(self) -> list[str]:
        """Paths in the batch where the input has been found so far."""
        return [text_of(pattern) for pattern in self._reported]

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
        """Return the paths of the tensors, and whether each is a sample (``None`` for a single tensor)."""
        pattern, samples = self._pattern_in(batch)
        return expanded(batch, pattern), samples if EVERY in pattern else None

    def _pattern_in(self, batch: Any) -> tuple[Path, bool]:
        """Return the path of the input and whether each tensor is a sample; search again in a batch of another form."""
        if has_inputs(batch, self._pattern):
            return self._pattern, self._samples
        found = find_inputs(batch, self._input_key, self._needed_by)
        if found is None:
            raise TypeError(
                f"{self._needed_by} perturbs {text_of(self._pattern)}, but a later batch has no floating-point "
                "tensor there and no other clear input. Set input_key to a tensor that every batch has."
            )
        if found not in self._reported:
            self._reported.append(found)
            rank_zero_info(f"{self._needed_by} perturbs {text_of(found)} in batches without {text_of(self._pattern)}.")
        return found, are_samples(batch, found)


def _in_place_of(old: Tensor, new: Tensor) -> Tensor:
    """Return a copy of plain inputs with the class and the attributes of those that they replace."""
    own = plain_tensor(old)
    if own.grad_fn is not None:  # the output of a network that runs before the step and trains through it
        return dressed(own + (new - own.detach()), old, copy_of)
    shown = dressed(new.clone(), old, copy_of)
    # A hook before the step may have set requires_grad, for a step that differentiates with respect to its input.
    return shown.requires_grad_() if own.requires_grad and not shown.requires_grad else shown


class EmbeddingOutput(Place):
    """The output of the first call of an ``nn.Embedding`` in a step.

    The weights of the embedding are still trained: the perturbation added to its output is a constant.

    Args:
        pl_module: The module.
        needed_by: Name of the callback in errors.
    """

    def __init__(self, pl_module: pl.LightningModule, needed_by: str) -> None:
        self._embeddings = [module for module in pl_module.modules() if isinstance(module, nn.Embedding)]
        self._needed_by = needed_by
        if any(is_compiled(module) for module in pl_module.modules()):
            raise ValueError(
                f"{needed_by} perturbs the output of an nn.Embedding with a hook, but compiled code does not run "
                "hooks. Train uncompiled, or set input_key to a floating-point tensor of the batch."
            )

    @property
    def names(self) -> list[str]:
        """A single name, because only the step shows which embedding it calls first."""
        return ["the output of the first nn.Embedding"]

    def inputs(self, batch: Any, run: Run) -> Tensor:
        """Run the step and return the output of the embedding."""
        seen: list[Tensor] = []
        # Clone, because layers after the embedding may work in place.
        with self._hooked(lambda output: seen.append(plain_tensor(output).detach().clone())), torch.no_grad():
            run(copy_of(batch))
        if not seen:
            raise RuntimeError(
                f"{self._needed_by} perturbs the output of an nn.Embedding, but the step calls none. Call the "
                "embedding as a module, embedding(x), or set input_key to a floating-point tensor of the batch."
            )
        return seen[0]

    @contextmanager
    def shown(self, batch: Any, inputs: Tensor) -> Iterator[Any]:
        """Replace the output of the embedding with the inputs, and yield the batch unchanged."""

        def exchanged(output: Tensor) -> Tensor:
            own = plain_tensor(output)
            return dressed(own + (inputs - own.detach()), output)

        with self._hooked(exchanged):
            yield batch

    @contextmanager
    def _hooked(self, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Return a context in which ``change`` is applied to the first output of any embedding."""
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
    """Find the input to perturb, and print which it is.

    Args:
        pl_module: The module.
        batch: A batch for the module.
        input_key: A key of the batch, ``"embedding"`` for the output of the first embedding, or ``None``.
        needed_by: Name of the callback in messages.

    Raises:
        ValueError: If ``input_key`` leads to no floating-point tensor, or the embedding is compiled.
        TypeError: If the batch has no floating-point tensor of at least two dimensions, or an integer tensor
            comes first, and the module has no embedding for it.
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
            f"{needed_by}(input_key='embedding') perturbs the output of an nn.Embedding, but {type(pl_module).__name__} "
            "has none. Leave input_key at None, or set it to a floating-point tensor of the batch."
        )
    if not wants_embedding:
        _refuse_unclear(batch, has_embedding, needed_by)
    rank_zero_info(f"{needed_by} perturbs the output of the first nn.Embedding that a step calls.")
    return EmbeddingOutput(pl_module, needed_by)


def _described(batch: Any, pattern: Path) -> str:
    """Return which tensors are perturbed and, if similar ones in the same list are not, how to include them."""
    shapes = list(dict.fromkeys(tuple(input_at(batch, path).shape) for path in expanded(batch, pattern)))
    if EVERY in pattern:
        several = len(expanded(batch, pattern))
        each = f"of shape {shapes[0]} each" if len(shapes) == 1 else f"of shapes such as {shapes[0]} and {shapes[1]}"
        return f"{text_of(pattern)}, {several} tensors {each}"
    wider = neighbours(batch, pattern)
    only = ""
    if wider is not None:
        key = ".".join(map(str, wider))
        only = f", but not the others in {text_of(wider)}; input_key={key!r} perturbs all {len(expanded(batch, wider))}"
    return f"{text_of(pattern)}, of shape {shapes[0]}{only}"


def _refuse_kinds(batch: Any, pattern: Path, needed_by: str) -> None:
    for path in expanded(batch, pattern):
        value = input_at(batch, path)
        if is_opaque(value) or value.is_nested or value.layout != torch.strided:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            raise TypeError(
                f"{needed_by} cannot perturb {text_of(path)}, because it is not dense: it is a {type(value).__name__} "
                f"({kind}). Make it dense in the data set or in on_after_batch_transfer, or set input_key to another "
                "input."
            )


def _refuse_unclear(batch: Any, has_embedding: bool, needed_by: str) -> None:
    """Raise if neither the batch nor an embedding provides an input with a gradient."""
    path, value = first_numbers(batch)
    # Bytes with more than two dimensions are images: they are not the input of the module's embedding.
    is_image = value is not None and value.dtype == torch.uint8 and value.dim() > 2
    if has_embedding and not is_image:
        return
    why = "the batch has no floating-point tensor with two or more dimensions (except targets, masks and weights)"
    if path is not None and value is not None:
        why = f"the first tensor of the batch with two or more dimensions, {text_of(path)}, has dtype {value.dtype}"
    but = "an nn.Embedding cannot take it" if has_embedding else "the module has no nn.Embedding"
    raise TypeError(
        f"{needed_by} needs an input with a gradient, but {why}, and {but}. Convert integer images to floats in the "
        "data set or in on_after_batch_transfer, or set input_key to a floating-point tensor."
    )
