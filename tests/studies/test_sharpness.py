"""The studies of SAM, ASAM and TrAct: they run through the runner, measure what they say, and write their figures."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from studies import __main__ as command
from studies.claims import CLAIMS
from studies.claims.sharpness import build_module, measure
from studies.results import Store

# What Lightning and torch say about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


def run(folder: Path, name: str, *settings: str) -> list[dict[str, float]]:
    """Run a claim from the command line, rates included, and return what it measured."""
    options = ["--results", str(folder / "results"), "--output", str(folder / "output"), "--seeds", "1", "--figures"]
    assert command.main(["--only", name, *options, "--set", "rates=0.01,0.1", *settings]) == 0
    claim = command.change(CLAIMS[name], ["rates=0.01,0.1", *settings])
    lines = Store(folder / "results").read(claim)
    assert len(lines) == 3 * len(claim.arms), "two rates on another seed, and one seed"
    assert [path.name for path in (folder / "output").glob("*/*.png")] == ["comparison.png"]
    return [{**line.metrics, "arm": line.arm, "seed": line.seed} for line in lines if line.seed == 0]


def test_sharp_steps_are_compared_at_equal_steps_and_at_equal_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path, "sharpness-wrong-labels", "steps=3", "width=8")
    assert len({each["test_accuracy"] for each in found} | {each["training_loss"] for each in found}) > len(found)
    assert len({each["eigenvalue"] for each in found}) == 4
    assert all(each["rise"] > 0 for each in found)
    printed = capsys.readouterr().out
    for arm in ("sam", "asam"):
        for other in ("plain-long", "plain"):
            assert any(line.split()[:2] == [arm, other] for line in printed.splitlines())
    assert "eigenvalue: the largest of the Hessian" in printed
    steps = {path.parent.name.split("_")[0]: path for path in tmp_path.glob("output/*/*_seed0/metrics.csv")}
    assert set(steps) == {"plain", "plain-long", "sam", "asam"}


def test_the_largest_eigenvalue_is_that_of_the_whole_hessian() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(20, 1, 8, 8), torch.randint(10, (20,))
    module = build_module(width=2)
    loss, rise, eigenvalue = measure(module, images, labels)
    weights = dict(module.named_parameters())
    sizes = [weight.numel() for weight in weights.values()]

    def at(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        parts = {name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)}
        return module.loss(torch.func.functional_call(module, parts, (images,)), labels)

    flat = torch.cat([weight.detach().flatten() for weight in weights.values()])
    exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(at, flat))
    assert eigenvalue == pytest.approx(exact[exact.abs().argmax()].item(), rel=1e-2)
    (gradient,) = torch.autograd.grad(at(flat.requires_grad_()), flat)
    flat = flat.detach()
    assert loss == pytest.approx(at(flat).item())
    assert rise == pytest.approx((at(flat + 0.05 * gradient / gradient.norm()) - at(flat)).item(), rel=1e-3)


@pytest.mark.parametrize("name", ["tract", "tract-convolutional"])
def test_tract_is_compared_by_the_steps_to_an_accuracy(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path, name, "steps=8", "every=2", "target=0.05")
    assert [each["steps_to_target"] for each in found] == [6.0, 6.0]
    assert found[0]["validation_loss"] != found[1]["validation_loss"]
    printed = capsys.readouterr().out
    assert "steps: until the mean of three validations is 5 %" in printed


def test_an_accuracy_that_is_not_reached_takes_for_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, "tract-convolutional", "steps=3", "every=1", "target=1.0")
    assert {each["steps_to_target"] for each in found} == {math.inf}
    assert "1 of 1 did not reach it" in capsys.readouterr().out
