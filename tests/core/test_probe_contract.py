"""A probe of an author outside the package keeps the guarantees that every exported technique is held to."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_grad.testing import assert_identical, fit
from lightning_grad.testing.checks import CHECKS, Check
from tests.contract import test_checkpoints as checkpoints
from tests.contract import test_composition as composition
from tests.contract import test_guarantees as guarantees
from tests.contract import test_resume as resume
from tests.contract.settings import Technique
from tests.core.activation_norm import ActivationNorm

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:.*the best checkpoint"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]


class ProbeEntry(Technique):
    """The entry of a class that is not exported."""

    kind = ActivationNorm

    def build_neutral(self) -> Any:
        return self.build()


ENTRY = ProbeEntry(
    "ActivationNorm",
    arguments={"layer": "hidden"},
    neutral={},
    second={"layer": "head", "name": "second"},
)
EVERY_STEP = ProbeEntry("ActivationNorm", arguments={"layer": "hidden", "every_n_steps": 2}, neutral={})

QUIET = ProbeEntry("ActivationNorm", arguments={"layer": "hidden", "every_n_steps": 1000}, neutral={})


# Its looks are no steps, and it learns only at its first look that it cannot run the training step of a manual loop.
ELSEWHERE = {"g7_no_host_sync", "g6_manual_optimization_with_two_optimizers"}


@pytest.mark.parametrize("check", [check for check in CHECKS.values() if check.name not in ELSEWHERE], ids=str)
def test_guarantee(check: Check) -> None:
    guarantees.test_guarantee(ENTRY, check)


def test_a_step_without_a_look_does_not_wait() -> None:
    guarantees.test_guarantee(QUIET, CHECKS["g7_no_host_sync"])


def test_looks_after_steps_resume_within_an_epoch() -> None:
    guarantees.test_guarantee(EVERY_STEP, CHECKS["g5_resumes_within_an_epoch"])


@pytest.mark.parametrize("ema_first", [False, True])
def test_resume_beside_weight_averaging(ema_first: bool, tmp_path: Path) -> None:
    resume.test_resume_beside_weight_averaging(ENTRY, ema_first, tmp_path)


def test_state_instances_and_shards() -> None:
    checkpoints.test_callback_state_is_made_of_plain_types(ENTRY)
    composition.test_two_instances(ENTRY)
    for strategy in ("FSDPStrategy", "ModelParallelStrategy"):
        composition.test_sharded_strategies_work_or_are_refused_before_the_first_batch(ENTRY, strategy)


def test_sparse_weights_are_seen_as_they_are_validated(tmp_path: Any) -> None:
    from lightning_grad.callbacks import NMSparsity

    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=3)
    plain, probed = [], []
    for found, probes in ((plain, []), (probed, [ENTRY.build()])):
        trainer, module = fit([NMSparsity("1:4", include=["hidden"], figure=False), *probes, saving])
        found += [dict(module.state_dict()), trainer.optimizers[0].state_dict()]
    assert_identical(plain, probed)
