"""Gradient techniques for any LightningModule: one line in the Trainer, nothing to change in the module.

Start with :mod:`lightning_grad.callbacks`; the mathematics behind each technique is in :mod:`lightning_grad.functional`.
"""

__version__ = "0.1.0"
