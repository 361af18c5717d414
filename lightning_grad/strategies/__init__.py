"""Communication schemes for ``Trainer(strategy=...)``: DDP with compressed gradients.

``import lightning_grad`` registers them by name: ``ddp_dgc`` and ``ddp_powersgd``. The suffixes ``_spawn`` and
``_fork`` select how ranks are started. Start reading in ``compressed_ddp.py``.
"""

from lightning_grad.strategies.compressed_ddp import CompressedDDPStrategy
from lightning_grad.strategies.dgc import DGCStrategy
from lightning_grad.strategies.powersgd import PowerSGDStrategy

__all__ = ["CompressedDDPStrategy", "DGCStrategy", "PowerSGDStrategy"]
