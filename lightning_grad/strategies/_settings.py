"""The settings of a strategy: its own ones, and those that decide what is sent."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning_grad.utilities.arguments import plain

_OF_DDP = (
    "self",
    "start_method",
    "static_graph",
    "gradient_as_bucket_view",
    "broadcast_buffers",
    "find_unused_parameters",
    "process_group_backend",
    "timeout",
)
_OF_THE_LAUNCH = ("residual_policy", "gradient_noise")  # may differ at each start, and change no message


def own_settings(strategy: object, base: type) -> dict[str, Any]:
    """Return the constructor arguments of a strategy, without those that only DDP uses.

    Args:
        strategy: Holds each as an attribute of the same name.
        base: The class at which constructors stop being of this package.
    """
    constructors = [vars(cls)["__init__"] for cls in type(strategy).__mro__ if "__init__" in vars(cls)]
    ours = constructors[: constructors.index(vars(base)["__init__"]) + 1]
    names = dict.fromkeys(name for init in reversed(ours) for name in inspect.signature(init).parameters)
    return {name: getattr(strategy, name) for name in names if name not in _OF_DDP and hasattr(strategy, name)}


def of_messages(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide what is sent, in types that a checkpoint holds."""
    return {name: plain(value) for name, value in settings.items() if name not in _OF_THE_LAUNCH}
