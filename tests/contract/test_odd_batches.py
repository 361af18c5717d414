"""G1 and G6: steps that write into their batch, and inputs of classes of their own."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from lightning_grad.core import ProbeCallback
from lightning_grad.testing import (
    BATCH,
    WIDTH,
    assert_identical,
    make_classifier,
    make_data,
    make_trainer,
    state_of,
)
from tests.contract.settings import CANONICAL
from tests.contract.test_composition import assert_trained, start_of
from tests.labelled import KINDS, labelled

EPOCHS = 3  # so that whoever decides by validations has two to compare
TRAINED = 3  # batches of an epoch


pytestmark = pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection")


class Batches(list):
    """Whole batches that the data set holds, so that a step writes into the data itself."""

    def __init__(self, seed: int) -> None:
        x, y = make_data(seed, TRAINED).tensors
        parts = zip(x.split(BATCH), y.split(BATCH), strict=True)
        super().__init__({"x": a.clone(), "y": b.clone(), "meta": {"seen": [0]}} for a, b in parts)

    def tensors(self) -> list[Tensor]:
        return [batch[key].clone() for batch in self for key in ("x", "y")]


def as_dict(samples: list[Any]) -> dict[str, Any]:
    x, y = default_collate(samples)
    return {"x": x, "y": y, "meta": {"seen": [0]}}


def make_writing() -> Any:
    """Build the contract's classifier, with steps that change what they get."""
    module = make_classifier()

    class Writing(type(module)):
        def taken(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
            assert batch["meta"]["seen"] == [0], "shown before"
            batch["x"].sub_(0.1).mul_(1.1)
            batch["y"].add_(1).remainder_(4)
            return batch["x"], batch["y"]

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            return super().training_step(self.taken(batch), batch_idx)

        def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            super().validation_step(self.taken(batch), batch_idx)

    module.__class__ = Writing
    return module


def run(callbacks: list[Any], needs_indices: bool) -> tuple[Any, Any, list[Tensor]]:
    """Fit the writing module, and return the trainer, the module and what is left of the data."""
    module, train, validation = make_writing(), Batches(0), Batches(1)
    loader = (
        DataLoader(make_data(0, TRAINED), BATCH, collate_fn=as_dict)
        if needs_indices
        else DataLoader(train, batch_size=None)
    )
    validating = (
        DataLoader(make_data(1, TRAINED), BATCH, collate_fn=as_dict)
        if needs_indices
        else DataLoader(validation, batch_size=None)
    )
    trainer = make_trainer(callbacks=callbacks, max_epochs=EPOCHS)
    trainer.fit(module, loader, validating)
    return trainer, module, [*train.tensors(), *validation.tensors()]


def left_by(trainer: Any, module: Any) -> dict[str, Any]:
    metrics = {key: value for key, value in trainer.callback_metrics.items() if "/" not in key}
    return {**state_of(trainer, module), "metrics": metrics, "validated": module.validated}


@functools.cache
def plain(needs_indices: bool) -> tuple[dict[str, Any], list[Tensor]]:
    trainer, module, data = run([], needs_indices)
    return left_by(trainer, module), data


@pytest.mark.parametrize("technique", [t for t in CANONICAL if t.has_neutral], ids=str)
def test_at_its_neutral_setting_a_step_that_writes_into_its_batch_does_what_it_did(technique):
    needs_indices = technique.kind.namespace == "data" or issubclass(technique.kind, ProbeCallback)
    trainer, module, data = run([technique.build_neutral()], needs_indices)
    expected, expected_data = plain(needs_indices)
    assert_identical(left_by(trainer, module), expected)
    assert_identical(data, expected_data)


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_data_are_changed_by_the_step_alone(technique):
    reads_samples = issubclass(technique.kind, ProbeCallback) or technique.name in (
        "LearnedRounding",
        "SaliencyUnlearning",
    )
    needs_indices = technique.kind.namespace == "data" or reads_samples
    start = start_of(make_writing())
    trainer, module, data = run([technique.build()], needs_indices)
    assert_trained(module, start)
    expected, expected_data = plain(needs_indices)
    originals = [*Batches(0).tensors(), *Batches(1).tensors()]
    for own, changed, original in zip(data, expected_data, originals, strict=True):
        assert torch.equal(own, changed) or torch.equal(own, original)
    if not technique.observes:
        with pytest.raises(AssertionError):
            assert_identical(left_by(trainer, module), expected)


def make_labelled(kind: str) -> Any:
    """Build the contract's classifier on inputs that have labels, and asks for them in each step."""
    module = make_classifier()

    class Asks(type(module)):
        def taken(self, batch: Any) -> tuple[Tensor, Tensor]:
            x, y = batch
            assert type(x) is KINDS[kind]
            assert len(x.labels) == WIDTH
            assert kind != "slotted" or x.domain == "unit"
            return x, y

        def forward(self, x: Any) -> Tensor:
            # Some networks work on the tensors as they are, and label what they give; others take the columns out.
            goes_through = kind in ("labelled", "fussy")
            logits = super().forward(x if goes_through else x.values_of(x.labels))
            return labelled(kind, logits) if goes_through else logits

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(self.taken(batch), batch_idx)
            return Tensor.as_subclass(loss, Tensor) if kind == "fussy" else loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(self.taken(batch), batch_idx)

        def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            value = Tensor.as_subclass(value, Tensor) if isinstance(value, Tensor) else value
            super().log(name, value, *args, **kwargs)

    module.__class__ = Asks
    return module


def run_labelled(kind: str, callbacks: list[Any]) -> tuple[Any, Any]:
    def collate(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return labelled(kind, x), y

    module = make_labelled(kind)
    trainer = make_trainer(callbacks=callbacks, max_epochs=EPOCHS)
    trainer.fit(
        module, *(DataLoader(data, BATCH, collate_fn=collate) for data in (make_data(0, TRAINED), make_data(1, 2)))
    )
    return trainer, module


@functools.cache
def plain_labelled(kind: str) -> dict[str, Any]:
    return left_by(*run_labelled(kind, []))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_inputs_of_a_class_of_their_own(technique, kind):
    start = start_of(make_labelled(kind))
    trainer, module = run_labelled(kind, [technique.build()])
    assert_trained(module, start)
    if not technique.observes:
        with pytest.raises(AssertionError):
            assert_identical(left_by(trainer, module), plain_labelled(kind))
    else:
        assert_identical(left_by(trainer, module), plain_labelled(kind))
