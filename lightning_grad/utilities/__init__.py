"""Helpers that need no Trainer.

For users: :func:`sparsity_report`, :func:`export_semi_structured`, :func:`optimizer_report` and :func:`round_weights`.
The other modules are
building blocks of callbacks: checks of arguments, selection of parameters by name, thresholds, batches and their inputs,
and reporting.
"""

from lightning_grad.utilities.optimizer_report import MovedGroup, OptimizerReport, optimizer_report
from lightning_grad.utilities.rounding import round_weights
from lightning_grad.utilities.sparsity import ExportedLayer, LayerSparsity, export_semi_structured, sparsity_report

__all__ = [
    "ExportedLayer",
    "LayerSparsity",
    "MovedGroup",
    "OptimizerReport",
    "export_semi_structured",
    "optimizer_report",
    "round_weights",
    "sparsity_report",
]
