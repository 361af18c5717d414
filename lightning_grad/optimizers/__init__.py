"""Optimizers for matrices, as classes of torch that work without Lightning, and one that combines several classes.

With Lightning, :class:`lightning_grad.callbacks.OptimizerSwap` gives them the matrices of a module, and leaves the other
parameters to the module's own optimizer.
"""

from lightning_grad.optimizers.dct_adamw import DCTAdamW
from lightning_grad.optimizers.frugal import Frugal
from lightning_grad.optimizers.galore_adamw import GaLoreAdamW
from lightning_grad.optimizers.matrix_optimizer import MatrixOptimizer
from lightning_grad.optimizers.parted import Part, PartedOptimizer

__all__ = ["DCTAdamW", "Frugal", "GaLoreAdamW", "MatrixOptimizer", "Part", "PartedOptimizer"]
