"""Finished weights are looked at and exported as they are."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightning_grad.core.views.weight_view import InPlaceView, attach_view
from lightning_grad.functional import nm_mask, prune_weight
from lightning_grad.utilities import ExportedLayer, LayerSparsity, export_semi_structured, sparsity, sparsity_report
from lightning_grad.utilities.sparsity import sparsest_pattern


class Masked:
    """A view that prunes to N:M."""

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = n, m

    def value(self, dense: Tensor) -> Tensor:
        return dense * nm_mask(dense, self.n, self.m)

    def stored(self, dense: Tensor) -> Tensor:
        return prune_weight(dense, nm_mask(dense, self.n, self.m))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pruned(module: nn.Module, n: int, m: int) -> nn.Module:
    with torch.no_grad():
        module.weight.mul_(nm_mask(module.weight, n, m))
    return module


def network() -> nn.Sequential:
    return nn.Sequential(
        pruned(nn.Conv2d(8, 16, 3), 1, 4),
        nn.BatchNorm2d(16),
        pruned(nn.Linear(64, 32), 2, 16),
        nn.Linear(32, 10),
    )


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "3:4", "3:8", "1:8", "2:16", "1:64", "33:64"])
@pytest.mark.parametrize("shape", [(32, 128), (8, 64, 3, 3)])
def test_sparsest_pattern_is_the_one_pruned_to(pattern: str, shape: tuple[int, ...]) -> None:
    n, m = map(int, pattern.split(":"))
    weight = torch.randn(shape)
    assert str(sparsest_pattern(prune_weight(weight, nm_mask(weight, n, m)))) == pattern
    assert sparsest_pattern(weight) is None


def test_weight_of_zeros_satisfies_the_sparsest_pattern_that_fits() -> None:
    assert str(sparsest_pattern(torch.zeros(2, 24))) == "1:8"
    assert sparsest_pattern(torch.zeros(2, 3)) is None


def test_report_has_one_row_a_weight_in_the_order_of_the_module() -> None:
    rows = sparsity_report(network(), verbose=False)
    assert rows == [
        LayerSparsity("0.weight", (16, 8, 3, 3), "1:4", 0.75, True),
        LayerSparsity("2.weight", (32, 64), "2:16", 0.875, True),
        LayerSparsity("3.weight", (10, 32), None, 0.0, False),
    ]


def test_report_against_a_pattern_says_where_it_holds() -> None:
    rows = sparsity_report(network(), pattern="2:8", verbose=False)
    assert [(row.pattern, row.exact) for row in rows] == [("2:8", True), ("2:8", True), ("2:8", False)]


def test_report_of_chosen_names_alone() -> None:
    assert [row.name for row in sparsity_report(network(), include=["2"], verbose=False)] == ["2.weight"]
    assert sparsity_report(network(), include=["head"], verbose=False) == []


def test_report_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    sparsity_report(network())
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["layer", "shape", "pattern", "zeros", "exact"],
        ["0.weight", "16x8x3x3", "1:4", "75.0", "%", "yes"],
        ["2.weight", "32x64", "2:16", "87.5", "%", "yes"],
        ["3.weight", "10x32", "dense", "0.0", "%", "no"],
    ]
    sparsity_report(network(), verbose=False)
    assert capsys.readouterr().out == ""


def test_report_of_a_compiled_module_has_the_names_users_know() -> None:
    module = nn.Sequential(torch.compile(network(), backend="eager"))
    assert [row.name for row in sparsity_report(module, verbose=False)] == ["0.0.weight", "0.2.weight", "0.3.weight"]


def test_report_during_a_view_is_of_the_weight_that_inference_uses() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    undo = attach_view(module[0], "weight", Masked(1, 8))
    in_place = InPlaceView(module[1], "weight", Masked(2, 4))
    assert [(row.pattern, row.exact) for row in sparsity_report(module, verbose=False)] == [
        ("1:8", True),
        ("2:4", True),
    ]
    undo()
    in_place.detach()
    assert [row.pattern for row in sparsity_report(module, verbose=False)] == [None, None]


@pytest.mark.parametrize("pattern", ["5:4", "2", ""])
def test_report_refuses_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(ValueError, match="N:M pattern"):
        sparsity_report(network(), pattern=pattern)


# Export.


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(sparsity, "rank_zero_info", messages.append)
    return messages


def mixed() -> nn.Sequential:
    return nn.Sequential(pruned(nn.Linear(8, 8), 2, 4), nn.Linear(8, 8), pruned(nn.Conv1d(8, 8, 1), 2, 4))


def test_export_on_a_cpu_says_why_not_and_changes_nothing(said: list[str]) -> None:
    module = mixed()
    before = module[0].weight
    rows = export_semi_structured(module)
    why = "semi-structured kernels need an NVIDIA GPU, but it is on cpu"
    assert rows == [
        ExportedLayer("0.weight", False, why),
        ExportedLayer("1.weight", False, "it is not 2:4 sparse"),
    ]
    assert said == [
        f"export_semi_structured did not convert 0.weight: {why}.",
        "export_semi_structured did not convert 1.weight: it is not 2:4 sparse.",
    ]
    assert module[0].weight is before


@pytest.mark.parametrize("include", [None, ["1"], ["2"], ["nothing"]])
def test_nothing_to_export_is_an_error(include: list[str] | None) -> None:
    module = mixed()
    if include is None:
        module[0] = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"No Linear weight of this module is 2:4 sparse.*NMSparsity\(pattern='2:4'\)"):
        export_semi_structured(module, include=include)


def test_export_converts_in_place_where_the_hardware_can(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    module, converted = mixed(), []

    def convert(weight: Tensor) -> Tensor:
        converted.append(weight)
        return 2 * weight

    monkeypatch.setattr(sparsity, "_why_not", lambda weight: "")
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    dense, other = module[0].weight.detach().clone(), module[1].weight
    rows = export_semi_structured(module)
    assert rows == [ExportedLayer("0.weight", True, ""), ExportedLayer("1.weight", False, "it is not 2:4 sparse")]
    assert len(converted) == 1
    assert not converted[0].requires_grad
    assert torch.equal(module[0].weight, 2 * dense)
    assert not module[0].weight.requires_grad
    assert module[1].weight is other
    assert len(said) == 1


def test_export_names_what_the_kernels_refuse(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    def refuse(weight: Tensor) -> Tensor:
        raise RuntimeError("Error original_tensor.shape is not supported!\nBoth dimensions must be larger")

    monkeypatch.setattr(sparsity, "_why_not", lambda weight: "")
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", refuse)
    module = nn.Sequential(pruned(nn.Linear(8, 8), 2, 4))
    before = module[0].weight
    reason = "Error original_tensor.shape is not supported!"
    assert export_semi_structured(module) == [ExportedLayer("0.weight", False, reason)]
    assert module[0].weight is before


@pytest.mark.parametrize(
    ("capability", "dtype", "why"),
    [
        ((7, 5), torch.float16, "compute capability 8.0 or later"),
        ((8, 0), torch.float32, "float16 or bfloat16, but it is torch.float32"),
        ((8, 0), torch.float16, ""),
        ((9, 0), torch.bfloat16, ""),
    ],
)
def test_reason_on_a_gpu(
    capability: tuple[int, int], dtype: torch.dtype, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = sparsity._why_not(SimpleNamespace(device=torch.device("cuda:0"), dtype=dtype))
    assert found.endswith(why)
    assert bool(found) == bool(why)
