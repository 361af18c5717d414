"""Registers the strategies under their names, for ``Trainer(strategy="...")``."""

import inspect

from lightning.pytorch.strategies import StrategyRegistry

from lightning_grad import strategies

_STARTS = {"": "popen", "_spawn": "spawn", "_fork": "fork"}


def register_strategies() -> None:
    """Register every exported strategy as ``ddp_<word>``, for example ``ddp_dgc``, once per start method."""
    exported = [getattr(strategies, name) for name in strategies.__all__]
    for strategy in exported:
        word = strategy.__module__.rpartition(".")[2]
        for suffix, start in _STARTS.items() if not inspect.isabstract(strategy) else ():
            description = f"{strategy.__name__} with start_method '{start}'"
            StrategyRegistry.register(f"ddp_{word}{suffix}", strategy, description, override=True, start_method=start)
