"""Gradient techniques for any LightningModule: add one line to the Trainer and leave the module unchanged.

Start with :mod:`lightning_grad.callbacks` and :mod:`lightning_grad.strategies`. Importing this package registers the
strategy names for ``Trainer(strategy="...")``. The mathematics of each technique is in
:mod:`lightning_grad.functional`.
"""

from lightning_grad.strategies.registry import register_strategies

__version__ = "0.2.0"

register_strategies()
