"""What each operation of torch contributes to the per-sample gradients of its parameters.

A rule takes the arguments of an operation, exactly as the operation does, and returns a :class:`Binding`: which of them may be
parameters, and how, once the gradient of the output is known, each one's contribution follows. It returns None for options
that it does not cover. :data:`RULES` maps operations to rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.functional.gradients._ghost.binding import Binding
from lightning_grad.functional.gradients._ghost.convolutions import convolution, transposed_convolution
from lightning_grad.functional.gradients._ghost.elementwise import (
    IsSource,
    add,
    add_,
    divide,
    expand,
    multiply,
    prelu,
    repeat,
    subtract,
    subtract_,
)
from lightning_grad.functional.gradients._ghost.layers import (
    addmm,
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    linear,
    matmul,
    rms_norm,
)
from lightning_grad.functional.gradients._ghost.tables import embedding, embedding_bag, getitem

Rule = Callable[..., Binding | None]


def _table() -> Mapping[Any, Rule]:
    rules: dict[Any, Rule] = {
        F.linear: linear,
        torch.addmm: addmm,
        F.batch_norm: batch_norm,
        F.instance_norm: instance_norm,
        F.group_norm: group_norm,
        F.layer_norm: layer_norm,
        F.rms_norm: rms_norm,
        F.embedding: embedding,
        F.embedding_bag: embedding_bag,
        F.prelu: prelu,
        torch.prelu: prelu,
        Tensor.__getitem__: getitem,
        Tensor.expand: expand,
        Tensor.expand_as: expand,
        torch.broadcast_to: expand,
        Tensor.broadcast_to: expand,
        Tensor.repeat: repeat,
    }
    rules |= dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), convolution)
    rules |= dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), transposed_convolution)
    rules |= dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), matmul)
    return rules


def _two_sided() -> Mapping[Any, Callable[..., Binding | None]]:
    names = {
        add: "add __add__ __radd__",
        add_: "add_ __iadd__",
        subtract_: "sub_ __isub__",
        subtract: "sub subtract __sub__",
        multiply: "mul multiply __mul__ __rmul__",
        divide: "div divide true_divide __truediv__",
    }
    found: dict[Any, Callable[..., Binding | None]] = {}
    for rule, spellings in names.items():
        for home in (torch, Tensor):
            found |= {getattr(home, name): rule for name in spellings.split() if hasattr(home, name)}
    return found


RULES = _table()
TWO_SIDED_RULES = _two_sided()


def bind(function: Any, is_source: IsSource, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Binding | None:
    """Return how a call depends on its parameters, or None where no rule covers it.

    Args:
        function: The operation.
        is_source: Tells which arguments are parameters, or derived from parameters alone.
        args: The positional arguments of the call.
        kwargs: The named ones.
    """
    if function in TWO_SIDED_RULES:
        rule: Rule = partial(TWO_SIDED_RULES[function], is_source)
    elif function in RULES:
        rule = RULES[function]
    else:
        return None
    try:
        return rule(*args, **kwargs)
    except TypeError:  # a spelling that the rule does not know
        return None
