"""Communication schemes for ``Trainer(strategy=...)``: DDP with compressed gradients.

``import lightning_grad`` registers them by name: ``ddp_dgc`` and ``ddp_powersgd``, with ``_spawn`` and ``_fork``
after it for the way in which ranks are started. Start reading in ``compressed_ddp.py``.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_grad.strategies.compressed_ddp import CompressedDDPStrategy
from lightning_grad.strategies.dgc import DGCStrategy
from lightning_grad.strategies.powersgd import PowerSGDStrategy

__all__ = ["CompressedDDPStrategy", "DGCStrategy", "PowerSGDStrategy"]

_NAMES = {"ddp_dgc": DGCStrategy, "ddp_powersgd": PowerSGDStrategy}
_STARTS = {"": "popen", "_spawn": "spawn", "_fork": "fork"}


def register_strategies() -> None:
    """Make every strategy known to a Trainer under its name, once for each way to start ranks."""
    for name, strategy in _NAMES.items():
        for suffix, start in _STARTS.items():
            description = f"{strategy.__name__} with start_method '{start}'"
            StrategyRegistry.register(name + suffix, strategy, description, override=True, start_method=start)
