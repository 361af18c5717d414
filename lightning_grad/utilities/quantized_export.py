"""Export quantized modules with their own integers and scales, to ONNX files and to torchao."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grad.functional import MixedTensor, QuantizedTensor
from lightning_grad.utilities.batches import tensors_in
from lightning_grad.utilities.modes import evaluated
from lightning_grad.utilities.parameters import clean_name, named_owners
from lightning_grad.utilities.quantization import Report, int8_grid, quantized_weights
from lightning_grad.utilities.sparsity import ExportedLayer


@dataclass(frozen=True)
class OnnxFile:
    """The result of :func:`export_onnx_int8`.

    Args:
        path: The file.
        size: Its size in bytes.
        float_size: Size of the same file with float weights.
        difference: Largest difference between the outputs of onnxruntime and of the module; ``None`` if onnxruntime is not
            installed.
    """

    path: Path
    size: int
    float_size: int
    difference: float | None


def export_onnx_int8(module: nn.Module, report: Report, path: str | Path, inputs: Any = None) -> OnnxFile:
    """Write an ONNX file whose quantized weights are int8 integers and scales.

    Other exporters compute new scales, or write the weights as floats. Here each weight of the report becomes an int8
    tensor with a ``DequantizeLinear`` node and the scales of the training, so a runtime computes with exactly the module's
    weights. Outliers that keep their values are stored with their positions, and the graph inserts them. Everything else
    stays as it is, in eval mode, and so do inputs that
    :func:`~lightning_grad.utilities.apply_activation_quantization` rounds. Needs onnx and onnxscript.

    Args:
        module: The module after the fit, in float32.
        report: Grids of the weights to write as integers: :func:`quantization_report` of the module, the result of
            :func:`round_weights`, or ``formats`` of ``QuantizationAwareTraining``.
        path: File to write.
        inputs: Example of the arguments of ``forward``: a tensor or a tuple. Their first dimension is the batch, of at
            least 2 samples; the file then accepts any number. Default: ``module.example_input_array``.

    Returns:
        OnnxFile: Sizes, and the difference to the module if onnxruntime is installed.

    Raises:
        ValueError: If there is no example of the inputs, no weight in the report is quantized, a weight differs from the
            report, is in a Hadamard basis, has 256 levels without 0, or the exporter dropped it.
    """
    import onnx

    needed_by = "export_onnx_int8"
    grids = quantized_weights(module, report, needed_by)
    integers = {name: int8_grid(name, grid, needed_by) for name, grid in grids.items()}
    example = _example(module, inputs)
    with evaluated(module), _exporting():
        batch = tuple(
            {0: torch.export.Dim.AUTO} if isinstance(each, Tensor) and each.ndim else None for each in example
        )
        program = torch.onnx.export(module, example, dynamo=True, verbose=False, optimize=False, dynamic_shapes=batch)
        assert program is not None
        model = program.model_proto
        with torch.no_grad():
            expected = module(*example)
    _strip(model)
    float_size = model.ByteSize()
    names = _names_in(model.graph, module)
    missing = [name for name in grids if name not in names]
    if missing:
        raise ValueError(
            f"{needed_by}: the graph has no {missing[0]}, because forward() does not use it. Remove it from the report."
        )
    for name, grid in grids.items():
        _replace(model.graph, names[name], *integers[name], grid)
    onnx.save(model, str(path))
    return OnnxFile(Path(path), model.ByteSize(), float_size, _difference(path, example, expected))


def _example(module: nn.Module, inputs: Any) -> tuple[Any, ...]:
    given = getattr(module, "example_input_array", None) if inputs is None else inputs
    if given is None:
        raise ValueError(
            "export_onnx_int8 needs an example of the inputs. Pass inputs=, or set self.example_input_array in the module."
        )
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)


@contextmanager
def _exporting() -> Iterator[None]:
    """Silence what torch and onnxscript say about their own code."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _strip(model: Any) -> None:
    """Remove the stack traces that torch attaches to each node, which can be larger than the weights."""
    for part in (model.graph, *model.functions):
        for node in part.node:
            del node.metadata_props[:]
            node.ClearField("doc_string")
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]


def _names_in(graph: Any, module: nn.Module) -> dict[str, str]:
    """Return the name of each parameter in a graph by its first name in the module; a tied one may have another name."""
    written = {initializer.name for initializer in graph.initializer}
    named = [*module.named_parameters(remove_duplicate=False)]
    first = {id(parameter): clean_name(name) for name, parameter in reversed(named)}
    return {first[id(parameter)]: name for name, parameter in named if name in written}


def _replace(graph: Any, name: str, integers: Tensor, scales: Tensor, grid: QuantizedTensor) -> None:
    """Replace a float weight by integers, scales, the node that multiplies them, and those that insert outliers."""
    from onnx import helper

    graph.initializer.remove(next(each for each in graph.initializer if each.name == name))
    parts = [
        _store(graph, f"{name}_int8", integers.to(torch.int8)),
        _store(graph, f"{name}_scale", scales.flatten().float()),
    ]
    result = f"{name}_rounded" if isinstance(grid, MixedTensor) else name
    nodes = [helper.make_node("DequantizeLinear", parts, [result], axis=grid.dim)]
    if isinstance(grid, MixedTensor):
        nodes += _insert_outliers(graph, name, result, grid)
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)


def _insert_outliers(graph: Any, name: str, rounded: str, grid: MixedTensor) -> list[Any]:
    """Return the nodes that put outliers into a rounded weight."""
    from onnx import helper

    indices = grid.kept.flatten().nonzero().flatten()
    flat = _store(graph, f"{name}_flat", torch.tensor([-1]))
    shape = _store(graph, f"{name}_shape", torch.tensor(grid.kept.shape))
    stored = [_store(graph, f"{name}_places", indices), _store(graph, f"{name}_outliers", grid.outliers.float())]
    return [
        helper.make_node("Reshape", [rounded, flat], [f"{rounded}_flat"]),
        helper.make_node("ScatterElements", [f"{rounded}_flat", *stored], [f"{name}_mixed"], axis=0),
        helper.make_node("Reshape", [f"{name}_mixed", shape], [name]),
    ]


def _store(graph: Any, name: str, value: Tensor) -> str:
    """Add a tensor to a graph, and return its name."""
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(value.detach().cpu().contiguous().numpy(), name))
    return name


def _difference(path: str | Path, example: Sequence[Any], expected: Any) -> float | None:
    """Return the largest difference between the file and the module."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    arrays = [each.detach().cpu().numpy() for each in tensors_in(example)]
    fed = {node.name: array for node, array in zip(session.get_inputs(), arrays, strict=True)}
    outputs = map(torch.from_numpy, session.run(None, fed))
    pairs = zip(outputs, tensors_in(expected), strict=True)
    return max(float((own.double() - other.cpu().double()).abs().max()) for own, other in pairs)


def to_torchao(module: nn.Module, report: Report) -> list[ExportedLayer]:
    """Convert the quantized weights of Linear layers to torchao's int8 tensors, in place.

    torchao's own conversion computes other scales, and rounds the weights again. Here its tensors get the integers and
    scales of the training, so the module computes with exactly the same weights. Needs torchao.

    Args:
        module: The module after the fit.
        report: As for :func:`export_onnx_int8`.

    Returns:
        list[ExportedLayer]: One row for each weight in the report; other layers than Linear, and weights with outliers, are
        not converted.

    Raises:
        ValueError: If no weight in the report is quantized, or a weight differs from the report, is in a Hadamard basis, or
            has 256 levels without 0.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about extensions for other machines
        from torchao.quantization import Int8Tensor

    grids = quantized_weights(module, report, "to_torchao")
    integers = {name: int8_grid(name, grid, "to_torchao") for name, grid in grids.items()}
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    names = {
        id(owner._parameters[attribute]): clean_name(name)
        for name, owner, attribute in reversed([*named_owners(module)])
    }
    for _, owner, attribute in named_owners(module):
        owners.setdefault(names[id(owner._parameters[attribute])], []).append((owner, attribute))
    rows = []
    for name, (values, scales) in integers.items():
        uses = owners.get(name, [])
        reason = _why_not(uses, grids[name])
        if not reason:
            owner = uses[0][0]
            weight: Any = owner.weight
            tensor = Int8Tensor(values, scales.to(weight.dtype), block_size=[1, values.shape[1]], dtype=weight.dtype)
            owner.weight = nn.Parameter(tensor, requires_grad=False)
        rows.append(ExportedLayer(name, not reason, reason))
    return rows


def _why_not(uses: Sequence[tuple[nn.Module, str]], grid: QuantizedTensor) -> str:
    if isinstance(grid, MixedTensor):
        return "it has outliers that keep their values, which integers cannot hold; round it with outliers=0"
    if len(uses) != 1:
        return "it is a tied weight"
    owner, attribute = uses[0]
    if not isinstance(owner, nn.Linear) or attribute != "weight" or grid.dim:
        return f"torchao has int8 weights for Linear layers, but it belongs to {type(owner).__name__}"
    if type(owner) is not nn.Linear:
        return f"{type(owner).__name__} may read its weight in other ways than Linear"
    return ""
