"""Measure attention logits and output logits at the operators that a training step runs.

Used by ``gradient_monitor.py``. Logits that grow without bound are the first sign of two
instabilities of transformers (Wortsman et al., 2023, arXiv 2309.14322). The user names no layers:
the probe sees the inputs of every scaled dot product, softmax and log-softmax where torch
dispatches it. The results of the step do not change. ``_attention_tracks.py`` finds the softmaxes
that belong to attention.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_grad.callbacks.diagnostics._attention_tracks import AttentionTracks
from lightning_grad.functional.plain_tensors import PlainTensors, plain_tensor
from lightning_grad.functional.torch_version import TORCH
from lightning_grad.utilities.reporting import is_log_step

_MOST_SCORES = 2**22  # computed for one attention; if it has more, only a part of the batch is used
_FUSED_ATTENTION = "_scaled_dot_product"
_NOT_CONSTRUCTED = "Creating a new Tensor subclass"  # torch's error for a class without a constructor begins so


class LogitProbe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the largest attention logit, and the largest magnitude of an output logit, while it is active.

    Attention logits are products of queries and keys: the input of a softmax that weights values,
    or query times key in a fused attention. Output logits are the inputs of a log-softmax, as in
    cross entropy. Masked logits do not count. The values stay on the device.

    Args:
        module: Module whose buffers are not activations. Parameters are recognized without it.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = () if module is None else itertools.chain(module.parameters(), module.buffers())
        with PlainTensors():
            self._tracks: AttentionTracks | None = AttentionTracks(tensors)
        self._attention: list[Tensor] = []
        self._softmaxes: list[Tensor] = []  # the largest logit of each softmax that may turn out to be attention
        self._outputs: list[Tensor] = []

    def __enter__(self) -> LogitProbe:
        if TORCH < (2, 9):  # older versions ignore supports_higher_order_operators
            _admit_control_flow()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._tracks is not None and not isinstance(func, HigherOrderOperator):
            name = func._schema.name.partition("::")[2]
            if "backward" not in name:
                # A tensor subclass may raise when it is inspected.
                with PlainTensors():
                    self._see(self._tracks, name, func, args, kwargs, result)
        return result

    def _see(
        self, tracks: AttentionTracks, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Record the logits of one operator, if it has any, and track its result."""
        if name in ("_softmax", "_safe_softmax") and args[0].numel() and tracks.are_scores(args[0]):
            self._softmaxes.append(_largest(plain_tensor(args[0])))
            tracks.note_softmax(len(self._softmaxes) - 1, result)
            return
        if name == "_log_softmax" and args[0].numel():
            self._outputs.append(_largest_magnitude(plain_tensor(args[0])))
        elif name.startswith(_FUSED_ATTENTION):
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            if given["query"].numel():
                self._attention.append(_largest_score({**given, **kwargs}))
        # The result of any other softmax, and of fused attention, is an ordinary activation.
        tracks.note(name, () if name.endswith("softmax") or name.startswith(_FUSED_ATTENTION) else args, result)

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        if self._tracks is not None:
            self._attention += [self._softmaxes[number] for number in sorted(self._tracks.attending)]
        self._tracks, self._softmaxes = None, []

    def read(self) -> dict[str, Tensor]:
        """Return the largest values by name. Kinds of logits that did not occur are missing."""
        found = {"attention_logit_max": self._attention, "output_logit_max": self._outputs}
        return {name: torch.stack(values).max() for name, values in found.items() if values}


class LogitWatch:
    """Run ``training_step`` under a :class:`LogitProbe` at log steps.

    Args:
        trainer: The trainer.
        pl_module: A module without compiled parts.
        advice: Note for the error of a step that cannot run under the probe.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, advice: str) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._advice = advice
        self._graphs = _compiled_graphs()
        self._probe: LogitProbe | None = None

    def around(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a training step, and record its logits if the step is logged."""
        # A compiled function that is not a module would run uncompiled under the probe.
        if not is_log_step(self._trainer) or _compiled_graphs() > self._graphs:
            return inner(*args, **kwargs)
        self._probe = LogitProbe(self._module)
        try:
            with _constructors_unwatched(), self._probe:
                return inner(*args, **kwargs)
        except RuntimeError as error:
            if _NOT_CONSTRUCTED in str(error):
                error.add_note(self._advice)
            raise

    def read(self) -> dict[str, Tensor]:
        """Return the largest logits of this batch."""
        return {} if self._probe is None else self._probe.read()

    def forget(self) -> None:
        """Drop the probe at the end of a batch."""
        self._probe = None


def _largest(logits: Tensor) -> Tensor:
    return torch.where(logits.isfinite(), logits, -torch.inf).amax().float()


def _largest_magnitude(logits: Tensor) -> Tensor:
    masked = ~logits.isfinite() | (logits <= torch.finfo(logits.dtype).min / 2)
    return torch.where(masked, 0.0, logits).abs().amax().float()


def _largest_score(given: Mapping[str, Any]) -> Tensor:
    """Return the largest unmasked score of a fused attention, which does not return its scores, from its arguments."""
    query, key = plain_tensor(given["query"]).detach(), plain_tensor(given["key"]).detach()
    whole, scale = len(query), given.get("scale")
    scores = query.shape[:-1].numel() * key.shape[-2]
    part = max(1, whole * _MOST_SCORES // max(scores, 1))
    query, key = query[:part], key[:part]
    if query.shape[1] != key.shape[1]:  # grouped queries share keys
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    mask = next((given[name] for name in ("attn_bias", "attn_mask") if given.get(name) is not None), None)
    if mask is not None:
        mask = mask[:part] if mask.ndim == logits.ndim and len(mask) == whole else mask
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if given.get("is_causal"):
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    return _largest(logits)


def _compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _admit_control_flow() -> None:
    """Register operators that take functions (``torch.cond``) for :class:`LogitProbe`, which ignores them."""

    def unseen(operator: Any, mode: LogitProbe, *args: Any, **kwargs: Any) -> Any:
        return operator(*args, **kwargs)

    for operator in torch._ops._higher_order_ops.values():
        if LogitProbe not in operator.python_key_table:
            operator.py_impl(LogitProbe)(functools.partial(unseen, operator))


@contextmanager
def _constructors_unwatched() -> Iterator[None]:
    """Run constructors of tensor subclasses from other libraries outside of dispatch modes.

    torch creates an object of a subclass from a tensor that no Python object wraps yet. A dispatch
    mode wraps every result, so ``super().__new__(cls, tensor)`` fails under it ("already associated
    to a python object").
    """
    originals = [(cls, vars(cls)["__new__"]) for cls in _derived(Tensor) if _constructs_itself(cls)]
    try:
        for cls, original in originals:
            cls.__new__ = staticmethod(_unwatched(original.__func__))
        yield
    finally:
        for cls, original in originals:
            cls.__new__ = original


def _derived(cls: type) -> set[Any]:
    direct: set[Any] = set(cls.__subclasses__())
    return direct.union(*map(_derived, direct))


def _constructs_itself(cls: Any) -> bool:
    """Return True for a class with its own constructor, unless it is torch's or written for dispatch modes."""
    is_torchs = cls.__module__.partition(".")[0] == "torch"
    is_plain = cls.__torch_dispatch__ is Tensor.__torch_dispatch__
    return not is_torchs and is_plain and isinstance(vars(cls).get("__new__"), staticmethod)


def _unwatched(constructor: Any) -> Any:
    @functools.wraps(constructor)
    def construct(*args: Any, **kwargs: Any) -> Any:
        with torch._C._DisableTorchDispatch():
            return constructor(*args, **kwargs)

    return construct
