"""Helpers that need no Trainer.

For users: :func:`sparsity_report`, :func:`export_semi_structured`, :func:`quantization_report`, :func:`export_onnx_int8`,
:func:`to_torchao`, :func:`round_weights`, :func:`apply_activation_quantization`, :func:`optimizer_report`,
:func:`save_adapters` and :func:`load_adapters`. The other modules are building blocks of callbacks: checks of arguments,
selection of parameters by name, thresholds, batches and their inputs, and reporting.
"""

from lightning_grad.utilities.activation_quantization import apply_activation_quantization
from lightning_grad.utilities.adapters import load_adapters, save_adapters
from lightning_grad.utilities.optimizer_report import MovedGroup, OptimizerReport, optimizer_report
from lightning_grad.utilities.quantization import LayerQuantization, quantization_report
from lightning_grad.utilities.quantized_export import OnnxFile, export_onnx_int8, to_torchao
from lightning_grad.utilities.rounding import round_weights
from lightning_grad.utilities.sparsity import ExportedLayer, LayerSparsity, export_semi_structured, sparsity_report

__all__ = [
    "ExportedLayer",
    "LayerQuantization",
    "LayerSparsity",
    "MovedGroup",
    "OnnxFile",
    "OptimizerReport",
    "apply_activation_quantization",
    "export_onnx_int8",
    "export_semi_structured",
    "load_adapters",
    "optimizer_report",
    "quantization_report",
    "round_weights",
    "save_adapters",
    "sparsity_report",
    "to_torchao",
]
