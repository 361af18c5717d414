"""The table of losses and techniques in docs/data_pruning.md is what these fits do.

``python -m tests.callbacks.data_pruning.test_loss_table`` prints it.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_grad.callbacks import InfoBatch, LossReweighting
from lightning_grad.functional import InseparableLossError
from tests.callbacks.data_pruning.test_any_loss import Foreign, loader_of
from tests.callbacks.data_pruning.test_data_pruning import train
from tests.callbacks.data_pruning.test_rows import pruning
from tests.functional.gradients.steps import PROJECTS, Batch, Project

PAGE = Path(__file__).parents[3] / "docs" / "data_pruning.md"


class Points(Project):
    """Two numbers and a mask for each point."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)
        self.log_variance = nn.Parameter(torch.zeros(()))

    def dataset(self) -> list[Batch]:
        return [{"x": torch.randn(5), "y": (torch.rand(3) > 0.5).float()} for _ in range(6)]


class BatchDice(Points):
    def training_step(self, batch: Batch) -> Tensor:
        found, truth = self.net(batch["x"]).sigmoid(), batch["y"]
        return 1 - (2 * (found * truth).sum() + 1) / ((found + truth).sum() + 1)


class Rmse(Points):
    def training_step(self, batch: Batch) -> Tensor:
        return (self.net(batch["x"]) - batch["y"]).square().mean().sqrt()


class HardestHalf(Points):
    def training_step(self, batch: Batch) -> Tensor:
        losses = (self.net(batch["x"]) - batch["y"]).square().mean(1)
        return losses.topk(max(1, len(losses) // 2)).values.mean()


class LearnedVariance(Points):
    def training_step(self, batch: Batch) -> Tensor:
        error = (self.net(batch["x"]) - batch["y"]).square().mean()
        return (-self.log_variance).exp() * error + self.log_variance


KINDS: dict[str, tuple[str, type[Project]]] = {
    "quantiles of a horizon, padded, with weights of the series": (
        "QuantileForecaster",
        PROJECTS["QuantileForecaster"],
    ),
    "MAE of scaled series, observed in part": ("ScaledForecaster", PROJECTS["ScaledForecaster"]),
    "properties of molecules, some not measured": ("MoleculeNetwork", PROJECTS["MoleculeNetwork"]),
    "ELBO of counts: likelihood and KL of a drawn latent": ("CellAutoencoder", PROJECTS["CellAutoencoder"]),
    "three heads, L1 of a layer": ("TabularHeads", PROJECTS["TabularHeads"]),
    "tokens in chunks, ignored ones, balance of a router": ("LanguageModel", PROJECTS["LanguageModel"]),
    "masked patches of a series": ("MaskedForecaster", PROJECTS["MaskedForecaster"]),
    "REINFORCE, advantage by the batch, entropy": ("PolicyGradient", PROJECTS["PolicyGradient"]),
    "PPO: clipped ratio and value, entropy": ("ProximalPolicy", PROJECTS["ProximalPolicy"]),
    "detection: a loop over images, two losses": ("Detector", PROJECTS["Detector"]),
    "a learned variance that divides the loss": ("LearnedVariance", LearnedVariance),
    "Dice over the batch": ("BatchDice", BatchDice),
    "root of the mean": ("Rmse", Rmse),
    "mean of the hardest half": ("HardestHalf", HardestHalf),
}
TECHNIQUES: dict[str, Callable[[], Any]] = {
    '`score="loss"`': lambda: pruning("loss"),
    '`score="grand"`': lambda: pruning("grand"),
    '`scores_by="sample"`': lambda: pruning("loss", scores_by="sample"),
    "`InfoBatch`": lambda: InfoBatch(0.5, prune_until=1.0),
    "`LossReweighting`": lambda: LossReweighting(warmup_fraction=0.0),
}
NOISY = "draws random numbers in eval mode"


def cell(kind: str, technique: str) -> str:
    """Return what a fit does: "yes", "yes, warns" of noise, or the way it is refused."""
    name, project = KINDS[kind]
    module = Foreign(name, project)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            train(TECHNIQUES[technique](), module, loader=loader_of(module))
    except InseparableLossError as error:
        return f"`{error.function}`"
    except ValueError as error:
        if "The two must be equal" in str(error) or "are not finite" in str(error):
            return "differs"
        raise
    except RuntimeError as error:
        if "fails on sample" in str(error):
            return "fails"
        if "tensors of different lengths" in str(error):
            return "size"
        raise
    return "yes, warns" if any(NOISY in str(warning.message) for warning in told) else "yes"


def table() -> str:
    rows = [["Loss", *TECHNIQUES], ["---"] * (len(TECHNIQUES) + 1)]
    rows += [[kind, *(cell(kind, technique) for technique in TECHNIQUES)] for kind in KINDS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def written() -> dict[str, dict[str, str]]:
    lines = PAGE.read_text().partition("<!-- losses -->\n")[2].partition("\n<!-- end -->")[0].splitlines()
    cells = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_table_says_what_happens(kind: str, technique: str) -> None:
    assert written()[kind][technique] == cell(kind, technique)


if __name__ == "__main__":
    print(table())
