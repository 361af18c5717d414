"""How large attention and output logits are, read off the operators that a training step runs.

Used by ``gradient_monitor.py``. Logits that grow without bound are the first sign of two instabilities of transformers
(Wortsman et al., 2023, arXiv 2309.14322). No layer has to be named: what goes into a scaled dot product, a softmax or a
log-softmax is seen where torch dispatches it, whichever class has called it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_MOST_SCORES = 2**22  # of one attention that are computed; beyond, a part of the batch must do
_SCORES = "scaled_dot_product"


class LogitProbe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the largest magnitude of attention logits and of output logits while it is active.

    Attention logits are inputs of a softmax, and query times key of a fused attention; output logits are inputs of a
    log-softmax, as in cross entropy. The values stay on the device.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found: dict[str, list[Tensor]] = {"attention_logit_max": [], "output_logit_max": []}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        if "backward" not in name:
            if name in ("_softmax", "_safe_softmax"):
                self._found["attention_logit_max"].append(_largest(args[0]))
            elif name == "_log_softmax":
                self._found["output_logit_max"].append(_largest(args[0]))
            elif name.startswith(f"_{_SCORES}"):
                self._found["attention_logit_max"].append(_largest_score(args[0], args[1], (kwargs or {}).get("scale")))
        return func(*args, **(kwargs or {}))

    def read(self) -> dict[str, Tensor]:
        """Return what was seen, scalars by name; nothing where no such operator ran."""
        return {name: torch.stack(values).max() for name, values in self._found.items() if values}


def _largest(logits: Tensor) -> Tensor:
    """Return the largest magnitude that is finite: masks put infinities among the logits."""
    return torch.where(logits.isfinite(), logits, 0.0).abs().max().float()


def _largest_score(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    scores = query.shape[:-1].numel() * key.shape[-2]
    part = max(1, len(query) * _MOST_SCORES // max(scores, 1))
    query, key = query[:part].detach(), key[:part].detach()
    if query.shape[1] != key.shape[1]:  # grouped queries share their keys
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return (query @ key.transpose(-2, -1)).abs().max().float() * factor


def is_compiled(module: nn.Module) -> bool:
    """Say whether some part of a module is compiled; under the probe it would run uncompiled, with other roundings."""
    return any(
        isinstance(child, torch._dynamo.OptimizedModule) or getattr(child, "_compiled_call_impl", None) is not None
        for child in module.modules()
    )
