"""Names by which ``Trainer(strategy="...")`` knows the strategies."""

import inspect

from lightning.pytorch.strategies import StrategyRegistry

from lightning_grad import strategies

_STARTS = {"": "popen", "_spawn": "spawn", "_fork": "fork"}


def register_strategies() -> None:
    """Make every exported strategy known by its word, ``ddp_dgc`` say, once for each way to start ranks."""
    exported = [getattr(strategies, name) for name in strategies.__all__]
    for strategy in exported:
        word = strategy.__module__.rpartition(".")[2]
        for suffix, start in _STARTS.items() if not inspect.isabstract(strategy) else ():
            description = f"{strategy.__name__} with start_method '{start}'"
            StrategyRegistry.register(f"ddp_{word}{suffix}", strategy, description, override=True, start_method=start)
