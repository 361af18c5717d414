"""A probe of an author outside the package keeps the guarantees that every exported technique is held to."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_grad.testing import assert_identical, fit
from tests.contract import (
    test_checkpoints,
    test_composition,
    test_neutral,
    test_no_sync,
    test_no_trace,
    test_resume,
)
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

# Each with the arguments that its own parametrization gives it.
GUARANTEES: list[tuple[Callable[..., None], dict[str, Any]]] = [
    *((test_neutral.test_neutral_setting_is_bitwise_no_callback, {"accumulate": n}) for n in (1, 3)),
    *((test_no_trace.test_nothing_is_left, {"how": how}) for how in ("success", "exception", "interrupt")),
    *(
        (test_no_trace.test_another_fit_of_a_callback_equals_its_first, {"after": after})
        for after in ("after_an_exception", "after_a_validation")
    ),
    (test_no_trace.test_callback_pickles_and_copies_before_and_after_a_fit, {}),
    (test_no_trace.test_module_copied_in_mid_fit_is_plain_and_computes_the_same, {}),
    *((test_resume.test_resume_at_any_saved_step, {"accumulate": n}) for n in (1, 2)),
    (test_resume.test_resume_at_an_epochs_end, {}),
    *((test_resume.test_resume_from_an_exception, {"steps": steps}) for steps in ((3, 14), (6,))),
    (test_resume.test_looking_and_saving_change_nothing, {}),
    *((test_resume.test_resume_beside_weight_averaging, {"ema_first": first}) for first in (False, True)),
    (test_resume.test_a_checkpoint_of_a_run_without_the_technique_is_accepted, {}),
    (test_resume.test_a_run_without_the_technique_accepts_its_checkpoint, {}),
    (test_resume.test_validating_a_checkpoint_leaves_the_next_fit_alone, {}),
    (test_checkpoints.test_beside_weight_averaging_in_either_order, {}),
    (test_checkpoints.test_callback_state_is_made_of_plain_types, {}),
    *((test_composition.test_trainer_options, {"arguments": {"precision": p}}) for p in ("bf16-mixed", "bf16-true")),
    (test_composition.test_fp16_grad_scaler_with_overflow_at_the_start, {}),
    (test_composition.test_compiled_submodules_give_the_same_weights, {"how": "module.compile()"}),
    (test_composition.test_pytorch_lightning_trainer, {}),
    (test_composition.test_two_instances, {}),
    (test_composition.check_two_ranks_agree, {}),
    *(
        (test_composition.test_sharded_strategies_work_or_are_refused_before_the_first_batch, {"strategy": name})
        for name in ("FSDPStrategy", "ModelParallelStrategy")
    ),
]


def name_of(guarantee: tuple[Callable[..., None], dict[str, Any]]) -> str:
    test, arguments = guarantee
    return "-".join([test.__name__.removeprefix("test_"), *map(str, arguments.values())])


@pytest.mark.parametrize("guarantee", GUARANTEES, ids=name_of)
def test_guarantee(guarantee: tuple[Callable[..., None], dict[str, Any]], request: pytest.FixtureRequest) -> None:
    test, arguments = guarantee
    fixtures = set(inspect.signature(test).parameters) - {"technique", "techniques", *arguments}
    test(ENTRY, **arguments, **{name: request.getfixturevalue(name) for name in fixtures})


def test_a_step_without_a_look_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = ProbeEntry("ActivationNorm", arguments={"layer": "hidden", "every_n_steps": 1000})
    test_no_sync.test_hooks_of_a_step_do_not_wait(quiet, monkeypatch)


def test_looks_after_steps_resume_at_any_saved_step() -> None:
    test_resume.test_resume_at_any_saved_step(EVERY_STEP, 1)


def test_sparse_weights_are_seen_as_they_are_validated(tmp_path: Any) -> None:
    from lightning_grad.callbacks import NMSparsity

    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=3)
    plain, probed = [], []
    for found, probes in ((plain, []), (probed, [ENTRY.build()])):
        trainer, module = fit([NMSparsity("1:4", include=["hidden"], figure=False), *probes, saving])
        found += [dict(module.state_dict()), trainer.optimizers[0].state_dict()]
    assert_identical(plain, probed)
