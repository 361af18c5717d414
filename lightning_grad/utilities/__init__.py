"""Helpers that belong to no technique.

For users: :func:`sparsity_report` and :func:`export_semi_structured`. The modules beside this file are what callbacks
are built of: the undo list, method dispatch, choosing parameters, views of weights, portable checkpoints, progress,
checks and reporting.
"""

from lightning_grad.utilities.sparsity import ExportedLayer, LayerSparsity, export_semi_structured, sparsity_report

__all__ = ["ExportedLayer", "LayerSparsity", "export_semi_structured", "sparsity_report"]
