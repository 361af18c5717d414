"""Helpers that need no Trainer.

For users: :func:`sparsity_report`, :func:`export_semi_structured`, :func:`apply_activation_quantization` and
:func:`optimizer_report`. The other modules are building blocks of callbacks: checks of arguments, selection of parameters by
name, thresholds, batches and their inputs, and reporting.
"""

from lightning_grad.utilities.activation_quantization import apply_activation_quantization
from lightning_grad.utilities.optimizer_report import MovedGroup, OptimizerReport, optimizer_report
from lightning_grad.utilities.sparsity import ExportedLayer, LayerSparsity, export_semi_structured, sparsity_report

__all__ = [
    "ExportedLayer",
    "LayerSparsity",
    "MovedGroup",
    "OptimizerReport",
    "apply_activation_quantization",
    "export_semi_structured",
    "optimizer_report",
    "sparsity_report",
]
