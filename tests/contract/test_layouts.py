"""Every technique that chooses parameters meets a tied weight, a layer whose weight is (in, out), and names of modules."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.testing import BATCH, WIDTH, assert_identical, make_trainer
from tests.contract.settings import CHOOSING

CLASSES = 8
REFUSE_TIED = (
    "LoRA",
    "LowRankFinetuning",
)  # the other use of the weight would not see the adapter; its own tests cover the refusal


class InOut(nn.Module):
    """A square layer of another package that computes x W."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Language(pl.LightningModule):
    """A table of tokens that is the classifier too, and a body of blocks between them."""

    def __init__(self) -> None:
        super().__init__()
        pl.seed_everything(7, verbose=False)
        self.table = nn.Embedding(CLASSES, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Sequential(InOut(), nn.Linear(WIDTH, WIDTH)))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.head.weight = self.table.weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self.head(self.body(self.table(tokens))), targets)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trained(technique: Any, **changes: Any) -> Language:
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(0, CLASSES, (2, 6 * BATCH), generator=generator)
    module = Language()
    callback = technique.build(**{"exclude": None, **changes})
    make_trainer(callbacks=[callback], max_epochs=1).fit(module, DataLoader(TensorDataset(tokens, targets), BATCH))
    return module


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("technique", [t for t in CHOOSING if t.name not in REFUSE_TIED], ids=str)
def test_a_tied_weight_is_meant_by_each_of_its_names(technique: Any) -> None:
    """As chosen and as left out; a name that is not known would raise or be passed over."""
    first = trained(technique, include=["table"])
    assert_identical(dict(first.state_dict()), dict(trained(technique, include=["head.weight"]).state_dict()))
    assert first.head.weight is first.table.weight
    left_out = trained(technique, include=["body", "table"], exclude=["table"])
    assert_identical(
        dict(left_out.state_dict()), dict(trained(technique, include=["body"], exclude=["head"]).state_dict())
    )
    Language().load_state_dict(first.state_dict(), strict=True)


@pytest.mark.parametrize("technique", CHOOSING, ids=str)
def test_the_name_of_a_module_means_all_below_it(technique: Any) -> None:
    below = ["body.0.weight", "body.0.bias", "body.2.0.weight", "body.2.1.weight", "body.2.1.bias"]
    assert_identical(
        dict(trained(technique, include=["body"]).state_dict()), dict(trained(technique, include=below).state_dict())
    )
    inner = trained(technique, include=["body.2"])
    assert_identical(dict(inner.state_dict()), dict(trained(technique, include=below[2:]).state_dict()))
    if not technique.observes and technique.name != "MomentumReset":
        assert not same_weights(inner, trained(technique, include=["body.0"]))
