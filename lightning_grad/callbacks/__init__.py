"""Callbacks: each is one line in ``Trainer(callbacks=[...])``.

Each family has a folder and each technique a file. All classes can be imported from here. Their base
classes are in :mod:`lightning_grad.core`.
"""

from lightning_grad.callbacks import (
    adversarial,
    batch_size,
    clipping,
    data_pruning,
    diagnostics,
    fine_tuning,
    optimizers,
    quantization,
    schedules,
    sharpness,
    sparsity,
)
from lightning_grad.callbacks.adversarial import *
from lightning_grad.callbacks.batch_size import *
from lightning_grad.callbacks.clipping import *
from lightning_grad.callbacks.data_pruning import *
from lightning_grad.callbacks.diagnostics import *
from lightning_grad.callbacks.fine_tuning import *
from lightning_grad.callbacks.optimizers import *
from lightning_grad.callbacks.quantization import *
from lightning_grad.callbacks.schedules import *
from lightning_grad.callbacks.sharpness import *
from lightning_grad.callbacks.sparsity import *

__all__: list[str] = []
__all__ += adversarial.__all__
__all__ += batch_size.__all__
__all__ += clipping.__all__
__all__ += data_pruning.__all__
__all__ += diagnostics.__all__
__all__ += fine_tuning.__all__
__all__ += optimizers.__all__
__all__ += quantization.__all__
__all__ += schedules.__all__
__all__ += sharpness.__all__
__all__ += sparsity.__all__
