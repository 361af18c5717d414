"""Gradient techniques for any LightningModule: one line in the Trainer, nothing to change in the module.

Start with :mod:`lightning_grad.callbacks` and :mod:`lightning_grad.strategies`, which are known to
``Trainer(strategy="...")`` by name once this is imported; the mathematics behind each technique is in
:mod:`lightning_grad.functional`.
"""

from lightning_grad.strategies.registry import register_strategies

__version__ = "0.2.0"

register_strategies()
