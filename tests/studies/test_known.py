"""The claims of papers: every arm of each of them trains, and the arms differ as they say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_grad.callbacks import LearnedRounding
from studies.arms import Arm, Use
from studies.claim import Run
from studies.claims import CLAIMS
from studies.claims.known.adversarial import under_autopgd
from studies.common import hush
from studies.on_task import OnTask, look
from studies.pretrained import FromPretrained
from studies.tasks import TASKS

KNOWN = {name: claim for name, claim in CLAIMS.items() if isinstance(claim, OnTask)}


def short(claim: OnTask, folder: Path) -> OnTask:
    """Return a claim with trainings of a few batches of small networks, and few steps of what learns by itself."""
    table = {name: small(arm, claim.task) for name, arm in claim.table.items()}
    start = {"before": 4, "model": width(claim.task)} if isinstance(claim, FromPretrained) else {}
    return replace(claim, length=4, limit_batches=1, output=folder, table=table, **start)


def width(task: str) -> dict[str, int]:
    """Return the arguments of the module that make a small network."""
    return {"width": 16, "depth": 3} if task == "text" else {}


def small(arm: Arm, task: str) -> Arm:
    """Return an arm with a small network, and with less work after the training."""
    uses = [
        Use(each.cls, *each.arguments, **{**each.options, "samples": 8, "steps": 2})
        if each.cls is LearnedRounding and "steps" not in each.options
        else each
        for each in arm.uses
    ]
    return Arm(*uses, longer=arm.longer, module={**arm.module, **width(task)}, trainer=arm.trainer)


def trained(claim: OnTask, arm: str) -> Any:
    """Return the result of a short training."""
    seed_everything(0, verbose=False)
    hush()
    return claim.train(Run(arm, 0, claim.rates[0] if claim.rates else None))


def distinct() -> list[tuple[str, str]]:
    """Return each arm of the claims once, though several claims have it with other numbers."""
    found = {}
    for name, claim in KNOWN.items():
        for arm in claim.arms:
            found.setdefault((type(claim), claim.task, re.sub(r"[\d.]+", "", str(claim.table[arm]))), (name, arm))
    return list(found.values())


@pytest.mark.parametrize(("name", "arm"), distinct())
def test_every_arm_trains(name: str, arm: str, tmp_path: Path) -> None:
    claim = short(KNOWN[name], tmp_path)
    claim.check()
    result = trained(claim, arm)
    score = claim.score(result)
    assert torch.isfinite(torch.tensor(score)) or score == -torch.inf


@pytest.mark.parametrize("name", KNOWN)
def test_a_claim_names_its_paper_and_compares_arms_that_it_has(name: str) -> None:
    claim = KNOWN[name]
    assert claim.paper is not None
    assert claim.comparisons()
    assert {arm for pair in claim.comparisons() for arm in pair} <= set(claim.arms)
    assert claim.settings_of(claim.arms[-1])["arm"] == str(claim.table[claim.arms[-1]])
    assert claim.settings["data"] in ("digits", "Python sources")


def test_an_arm_with_another_line_does_not_take_the_results_of_the_old_one() -> None:
    claim = KNOWN["infobatch-images"]
    changed = replace(claim, table={**claim.table, "infobatch": claim.table["all"]})
    assert claim.settings_of("infobatch") != changed.settings_of("infobatch")
    assert claim.settings_of("all") == changed.settings_of("all")


@pytest.mark.parametrize("task", TASKS)
def test_other_data_must_be_there(task: str, tmp_path: Path) -> None:
    claim = replace(next(each for each in KNOWN.values() if each.task == task), data=tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path)):
        claim.check()


def test_sensitivity_is_the_mean_loss_above_the_best_rate_and_a_diverged_training_counts_as_none(
    tmp_path: Path,
) -> None:
    claim = replace(short(KNOWN["rate-sensitivity-text"], tmp_path), swept=(1e-3, 1e-2, 1e30))
    result = trained(claim, "plain")
    start, _ = untrained_loss(claim)
    assert result.losses[2] == pytest.approx(start, rel=1e-6)
    assert result.best_loss == min(result.losses) < start
    assert result.sensitivity == pytest.approx(sum(result.losses) / 3 - result.best_loss)


def untrained_loss(claim: Any) -> tuple[float, float]:
    """Return the loss and the accuracy of a new module on the test data, of as many batches as the claim looks at."""
    data = TASKS["text"].data(None, 0, 0.0)
    data.setup("fit")
    trainer = claim.trainer(Run("plain", 0), [], limit_val_batches=claim.limit_batches)
    return look(trainer, claim.untrained(Run("plain", 0), data), data.test_dataloader())


def test_autopgd_moves_pixels_by_epsilon_and_no_further() -> None:
    module = pl.LightningModule()
    module.forward = lambda images: images.mean((1, 2, 3))[:, None] * torch.tensor([-1.0, 1.0])  # type: ignore[method-assign]
    labels = torch.tensor([0, 1] * 8)
    pixels = 0.5 + 0.05 * (2.0 * labels - 1)[:, None, None, None].expand(-1, 1, 4, 4)
    for epsilon, withstand in ((0.04, 1.0), (0.06, 0.0)):
        images = (pixels - 0.5) / 0.25
        found = under_autopgd(module, [(images, labels)], epsilon, bounds=(0.0, 1.0), mean=[0.5], std=[0.25])
        assert found == withstand
