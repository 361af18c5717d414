"""Helpers that need no Trainer.

For users: :func:`sparsity_report` and :func:`export_semi_structured`. The other modules are building blocks of
callbacks: checks of arguments, selection of parameters by name, thresholds, batches and their inputs, and reporting.
"""

from lightning_grad.utilities.sparsity import ExportedLayer, LayerSparsity, export_semi_structured, sparsity_report

__all__ = ["ExportedLayer", "LayerSparsity", "export_semi_structured", "sparsity_report"]
