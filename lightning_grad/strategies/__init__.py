"""Communication schemes for ``Trainer(strategy=...)``: compressed gradients, and weights that are exchanged rarely.

``import lightning_grad`` registers them by name: ``ddp_dgc``, ``ddp_powersgd``, ``ddp_onebit_adam``, ``ddp_local_sgd`` and
``ddp_diloco``. The suffixes ``_spawn`` and ``_fork`` select how ranks are started. Start reading in ``compressed_ddp.py`` or
``_local_steps.py``.
"""

from lightning_grad.strategies.compressed_ddp import CompressedDDPStrategy
from lightning_grad.strategies.dgc import DGCStrategy
from lightning_grad.strategies.diloco import DiLoCoStrategy
from lightning_grad.strategies.local_sgd import LocalSGDStrategy
from lightning_grad.strategies.onebit_adam import OneBitAdamStrategy
from lightning_grad.strategies.powersgd import PowerSGDStrategy

__all__ = [
    "CompressedDDPStrategy",
    "DGCStrategy",
    "DiLoCoStrategy",
    "LocalSGDStrategy",
    "OneBitAdamStrategy",
    "PowerSGDStrategy",
]
