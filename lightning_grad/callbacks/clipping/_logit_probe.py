"""How large attention and output logits are, read off the operators that a training step runs.

Used by ``gradient_monitor.py``. Logits that grow without bound are the first sign of two instabilities of transformers
(Wortsman et al., 2023, arXiv 2309.14322). No layer has to be named: what goes into a scaled dot product, a softmax or a
log-softmax is seen where torch dispatches it, whichever class has called it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_grad.utilities.forward_order import is_compiled

_MOST_SCORES = 2**22  # of one attention that are computed; beyond, a part of the batch must do
_SCORES = "_scaled_dot_product"


class LogitProbe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the largest attention logit, and the largest magnitude of an output logit, while it is active.

    Attention logits are inputs of a softmax, and query times key of a fused attention; output logits are inputs of a
    log-softmax, as in cross entropy. What is masked does not count. The values stay on the device.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found: dict[str, list[Tensor]] = {"attention_logit_max": [], "output_logit_max": []}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = "" if isinstance(func, HigherOrderOperator) else func._schema.name.partition("::")[2]
        if "backward" not in name:
            if name in ("_softmax", "_safe_softmax"):
                self._keep("attention_logit_max", args[0], _largest)
            elif name == "_log_softmax":
                self._keep("output_logit_max", args[0], _largest_magnitude)
            elif name.startswith(_SCORES):
                given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
                self._keep("attention_logit_max", {**given, **kwargs}, _largest_score)
        return func(*args, **kwargs)

    def _keep(self, name: str, given: Any, measure: Callable[[Any], Tensor]) -> None:
        tensor = given["query"] if isinstance(given, dict) else given
        if tensor.numel():
            self._found[name].append(measure(given))

    def read(self) -> dict[str, Tensor]:
        """Return what was seen, scalars by name; nothing where no such operator ran."""
        return {name: torch.stack(values).max() for name, values in self._found.items() if values}


def _largest(logits: Tensor) -> Tensor:
    return torch.where(logits.isfinite(), logits, -torch.inf).amax().float()


def _largest_magnitude(logits: Tensor) -> Tensor:
    masked = ~logits.isfinite() | (logits <= torch.finfo(logits.dtype).min / 2)
    return torch.where(masked, 0.0, logits).abs().amax().float()


def _largest_score(given: Mapping[str, Any]) -> Tensor:
    query, key = given["query"].detach(), given["key"].detach()
    whole, scale = len(query), given.get("scale")
    scores = query.shape[:-1].numel() * key.shape[-2]
    part = max(1, whole * _MOST_SCORES // max(scores, 1))
    query, key = query[:part], key[:part]
    if query.shape[1] != key.shape[1]:  # grouped queries share their keys
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


def has_compiled(module: nn.Module) -> bool:
    """Say whether some part of a module is compiled; under the probe it would run uncompiled, with other roundings."""
    return any(is_compiled(child) for child in module.modules())


def compiled_graphs() -> int:
    """Return how many graphs ``torch.compile`` has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
