"""Files of other programs hold our integers and scales, and compute what the module computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_grad.functional import quantize_weight
from lightning_grad.utilities import (
    apply_activation_quantization,
    export_onnx_int8,
    quantization_report,
    round_weights,
    to_torchao,
)
from lightning_grad.utilities.quantization import quantized_weights


class Network(nn.Module):
    """A convolution with its batch norm, attention and Linear layers on sequences, as a plain module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 64, 5, stride=2)
        self.norm = nn.BatchNorm2d(64)
        self.encoder = nn.TransformerEncoderLayer(64, 2, 256, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images)).flatten(2).mT
        return self.head(self.encoder(x).mean(1))  # type: ignore[no-any-return]


GRIDS: dict[str, tuple[int, Any]] = {
    "conv.weight": (8, "ste"),
    "encoder.self_attn.in_proj_weight": (4, "ste"),
    "encoder.self_attn.out_proj.weight": (1, "statsq"),
    "encoder.linear1.weight": (8, "ste"),
    "encoder.linear2.weight": (7, "quest"),
    "head.weight": (2, "ste"),
}


def quantized() -> tuple[Network, dict[str, Any]]:
    net = Network().eval()
    report = {}
    for name, (bits, quantizer) in GRIDS.items():
        weight = net.get_parameter(name)
        report[name] = quantize_weight(weight, bits, quantizer)
        weight.data = report[name].dequantize()
    return net, report


def test_a_report_finds_the_grids_from_the_values_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = Network().requires_grad_(False)
    net, report = quantized()
    net.requires_grad_(False)
    rows = quantization_report(net, before)
    table = capsys.readouterr().out.splitlines()
    assert [row.name for row in rows] == list(GRIDS)
    for row, line in zip(rows, table[1:], strict=True):
        bits, quantizer = GRIDS[row.name]
        assert row.quantized is not None
        assert row.bits == bits, row.name
        assert torch.equal(row.quantized.dequantize(), report[row.name].dequantize())
        assert row.levels <= 2**bits - (quantizer == "ste")
        weight, dense = net.get_parameter(row.name), before.get_parameter(row.name)
        assert row.error == pytest.approx(float((weight - dense).norm() / dense.norm()), rel=1e-4)
        assert line.split()[2] == str(bits)
    assert rows[2].saturated == 1.0, "two levels, both at the end"
    assert rows[0].saturated == pytest.approx(1 / 25, abs=0.01), "the largest of each channel"
    dense_rows = quantization_report(before, verbose=False)
    assert [(row.bits, row.quantized, row.saturated, row.error) for row in dense_rows] == [(None,) * 4] * 6


def test_reports_of_callbacks_and_functions_are_accepted() -> None:
    net, report = quantized()
    formats = {name: {"bits": b, "quantizer": q, "dim": 0, "hadamard": False} for name, (b, q) in GRIDS.items()}
    for each in (report, formats, quantization_report(net, verbose=False)):
        found = quantized_weights(net, each, "export")
        assert all(torch.equal(found[name].dequantize(), net.get_parameter(name)) for name in GRIDS)


def test_what_cannot_be_exported_is_refused_with_words(tmp_path: Path) -> None:
    net, report = quantized()

    def refused(words: str, changed: Any, module: Any = net) -> None:
        with pytest.raises(ValueError, match=words):
            quantized_weights(module, changed, "export")

    hadamard = quantize_weight(net.head.weight, 4, "quest", hadamard=True)
    refused(r"Train with QuantizationAwareTraining\(hadamard=False\)", {"head.weight": hadamard})
    form = {"bits": 4, "quantizer": "quest", "dim": 0, "hadamard": True}
    refused("hadamard=False", {"head.weight": form})
    refused("which the module does not have", {"foot.weight": report["head.weight"]})
    refused("no weight of the report", quantization_report(Network(), verbose=False), Network())
    refused("differs from the report", report, Network())
    double = copy.deepcopy(net).double()
    refused(r"head.weight is torch.float64.*module.float\(\)", {"head.weight": report["head.weight"]}, double)
    refused("not on the grid of the report", {"head.weight": {**form, "hadamard": False, "bits": 2}}, Network())


def test_what_int8_cannot_hold_is_refused_with_words() -> None:
    pytest.importorskip("torchao")
    net, _ = quantized()
    wide = quantize_weight(Network().head.weight, 8, "statsq")
    net.head.weight.data = wide.dequantize()
    with pytest.raises(ValueError, match=r"256 levels without 0.*7 bits"):
        to_torchao(net, {"head.weight": wide})


def test_outliers_are_in_the_file_and_not_in_torchao(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.Conv1d(4, 8, 3, padding=1), nn.Linear(64, 8))
    rows = torch.randn(9, 4, 16)
    report = round_weights(
        net, [rows], 2, include=["*"], steps=1, outliers=0.05, outlier_score="magnitude", verbose=False
    )
    assert [row.converted for row in to_torchao(copy.deepcopy(net), report)] == [False] * 3
    file = export_onnx_int8(net, report, tmp_path / "net.onnx", rows)
    assert file.difference is not None
    assert file.difference < 1e-6
    with torch.no_grad():
        for name, quantized in report.items():
            net.get_parameter(name)[quantized.kept] = 0.0  # type: ignore[attr-defined]
        assert (net(rows) - torch.from_numpy(run(file.path, rows))).abs().max() > 0.1, "the outliers matter"


def run(path: Path, inputs: Tensor) -> Any:
    """Return the output of a file."""
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("onnxscript")
    net, report = quantized()
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    return net, report, export_onnx_int8(net.train(), report, path, torch.randn(2, 1, 12, 12))


def test_onnx_holds_our_integers_and_is_small(exported: Any) -> None:
    onnx = pytest.importorskip("onnx")
    net, _, file = exported
    assert net.training
    assert net.encoder.dropout.training
    graph = onnx.load(file.path).graph
    tensors = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    for name in GRIDS:
        assert name not in tensors
        shape = [-1, *[1] * (net.get_parameter(name).ndim - 1)]
        product = torch.tensor(tensors[f"{name}_int8"]).float() * torch.tensor(tensors[f"{name}_scale"]).reshape(shape)
        assert torch.equal(product, net.get_parameter(name))
    assert file.path.stat().st_size == file.size
    assert file.size < 0.35 * file.float_size
    assert file.float_size < 1.1 * sum(value.nbytes for value in net.state_dict().values()) + 20_000


def test_onnxruntime_computes_what_the_plain_module_computes(exported: Any) -> None:
    net, _, file = exported
    assert file.difference < 1e-6
    images = torch.randn(7, 1, 12, 12)
    output = run(file.path, images)
    with torch.no_grad():
        expected = net.eval()(images)
    net.train()
    assert (torch.from_numpy(output) - expected).abs().max() < 1e-6


def test_a_file_can_round_activations_too(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8))
    for layer in (net[0], net[3]):
        layer.weight.data = quantize_weight(layer.weight, 4).dequantize()
    images = torch.randn(16, 1, 8, 8)
    with torch.no_grad():
        plain = net(images)
    undo = apply_activation_quantization(net, {"0": {"bits": 3}, "3": {"bits": 4, "quantizer": "quest"}})
    file = export_onnx_int8(net, quantization_report(net, verbose=False), tmp_path / "net.onnx", images)
    with torch.no_grad():
        assert (net(images) - plain).abs().max() > 1e-4, "the inputs are rounded"
    undo()
    assert file.difference is not None
    assert file.difference < 1e-6


class Outputs(nn.Module):
    """Two layers with one weight, and outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.second(torch.relu(self.first(x)))
        return {"logits": x, "more": (x.argmax(-1), x > 0)}


def test_tied_weights_and_nested_outputs(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    net = Outputs()
    net.first.weight.data = quantize_weight(net.first.weight, 8).dequantize()
    rows = quantization_report(net, verbose=False)
    assert [row.name for row in rows] == ["first.weight", "second.weight"]
    for report in (rows, rows[1:]):
        file = export_onnx_int8(net, report, tmp_path / "net.onnx", torch.randn(3, 16))
        assert file.difference is not None
        assert file.difference < 1e-6
        assert file.float_size - file.size > 500, "int8 takes 768 bytes less"


def test_onnx_needs_an_example_of_the_inputs(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    net, report = quantized()
    with pytest.raises(ValueError, match="example_input_array"):
        export_onnx_int8(net, report, tmp_path / "net.onnx")


def test_torchao_computes_with_our_weights() -> None:
    pytest.importorskip("torchao")
    net, report = quantized()
    plain = copy.deepcopy(net)
    rows = to_torchao(net, report)
    converted = {row.name: row.converted for row in rows}
    assert converted == {
        name: name in ("encoder.linear1.weight", "encoder.linear2.weight", "head.weight") for name in GRIDS
    }
    assert "Conv2d" in rows[0].reason
    for name in converted:
        if converted[name]:
            weight: Any = net.get_parameter(name)
            assert type(weight).__name__ == "Int8Tensor"
            assert torch.equal(weight.dequantize(), plain.get_parameter(name))
    images = torch.randn(5, 1, 12, 12)
    with torch.no_grad():
        assert (net(images) - plain(images)).abs().max() < 1e-6
