"""Names by which ``Trainer(strategy="...")`` knows the strategies."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_grad.strategies.dgc import DGCStrategy
from lightning_grad.strategies.powersgd import PowerSGDStrategy

_NAMES = {"ddp_dgc": DGCStrategy, "ddp_powersgd": PowerSGDStrategy}
_STARTS = {"": "popen", "_spawn": "spawn", "_fork": "fork"}


def register_strategies() -> None:
    """Make every strategy known under its name, once for each way to start ranks."""
    for name, strategy in _NAMES.items():
        for suffix, start in _STARTS.items():
            description = f"{strategy.__name__} with start_method '{start}'"
            StrategyRegistry.register(name + suffix, strategy, description, override=True, start_method=start)
