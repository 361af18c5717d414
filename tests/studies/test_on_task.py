"""Claims on the shared tasks: length, time, data and the line of an arm."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback, seed_everything
from typing_extensions import override

from lightning_grad.callbacks import NMSparsity
from studies import tasks
from studies.arms import PLAIN, Arm, Length, OfEpochs, OfSteps, Use
from studies.claim import Run
from studies.common import hush
from studies.on_task import FitClock, OnTask
from studies.tasks import TASKS, FewImages


def toy(folder: Path, **settings: Any) -> OnTask:
    """Return a claim of two short arms on the digits."""
    hush()
    table = {"plain": PLAIN, "long": Arm(longer=2.0), "sparse": Arm(Use(NMSparsity, "1:8", figure=False))}
    given: dict[str, Any] = {
        "table": table,
        "arms": tuple(table),
        "length": 2,
        "limit_batches": 3,
        **TASKS["images"].metric,
    }
    return OnTask(name="toy", text="", reference="plain", budget=1, output=folder, **{**given, **settings})


def trained(claim: OnTask, arm: str, rate: float = 0.1) -> Any:
    """Return the result of a training with seed 0."""
    seed_everything(0, verbose=False)
    return claim.train(Run(arm, 0, rate))


def test_arms_differ_only_by_their_line(tmp_path: Path) -> None:
    claim = toy(tmp_path)
    plain, again, sparse = (trained(claim, arm) for arm in ("plain", "plain", "sparse"))
    assert {**plain.metrics, "cpu_seconds": 0} == {**again.metrics, "cpu_seconds": 0}
    assert plain.test_loss != sparse.test_loss
    assert trained(claim, "plain", 0.01).test_loss != plain.test_loss


def test_a_longer_arm_takes_as_many_times_the_steps(tmp_path: Path) -> None:
    claim = toy(tmp_path)
    assert [trained(claim, arm).steps for arm in ("plain", "long")] == [6, 12]
    text = replace(claim, task="text", length=4, limit_batches=1, table={"plain": tiny(1.0), "long": tiny(2.0)})
    assert [trained(text, arm).steps for arm in ("plain", "long")] == [4, 8]


def tiny(longer: float) -> Arm:
    """Return an arm with a tiny character model."""
    return Arm(longer=longer, module={"width": 8, "depth": 1})


def test_options_follow_the_length_of_the_training() -> None:
    use = Use(Remembering, OfSteps(0.5), nested={"epochs": OfEpochs(0.26)})
    made: Any = use.build(Length(steps=80, epochs=8))
    assert made.given == (40, {"epochs": 2})
    assert str(use) == "Remembering(0.5 * steps, nested={'epochs': 0.26 * epochs})"


class Remembering(Callback):
    """Keeps its arguments."""

    def __init__(self, steps: int, nested: dict[str, int]) -> None:
        self.given = steps, nested


class Busy(Callback):
    """Works in each validation, and a little in each training batch."""

    @override
    def on_validation_epoch_start(self, *args: Any) -> None:
        work(0.5)

    @override
    def on_train_epoch_end(self, *args: Any) -> None:
        work(0.1)


def work(seconds: float) -> None:
    """Use the processor for some time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_clock_counts_what_a_technique_does_between_epochs_but_not_validation(tmp_path: Path) -> None:
    claim = toy(tmp_path)
    data = TASKS["images"].data(None, 0, 0.0)
    clock = FitClock()
    start = time.process_time()
    trainer = claim.trainer(Run("plain", 0), [clock, Busy()], max_epochs=2, limit_train_batches=1, limit_val_batches=1)
    trainer.fit(TASKS["images"].module(data, 0.1, {}), data)
    whole = time.process_time() - start
    assert 0.2 <= clock.seconds <= whole - 1.0


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder with archives of a few images whose first pixel tells their number."""
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 60), ("test", 20)):
        files = []
        for number in range(count):
            file = io.BytesIO()
            image.fromarray(np.full((32, 32, 3), 4 * number, np.uint8)).save(file, "JPEG")
            files.append(np.frombuffer(file.getvalue(), np.uint8))
        offsets = np.cumsum([0, *map(len, files)])
        labels = np.arange(count) % 10
        np.savez(tmp_path / f"cifar10_{split}.npz", jpeg=np.concatenate(files), offsets=offsets, labels=labels)
    return tmp_path


def test_training_and_validation_images_differ_and_the_test_images_are_whole(images: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("studies.tasks.TRAINING_IMAGES", 40)
    monkeypatch.setattr("studies.tasks.VALIDATION_IMAGES", 10)
    seen = []
    for seed in (0, 0, 1):
        data = FewImages(images, seed, flip=0.25)
        data.setup("fit")
        train, val = ([tuple(image.flatten().tolist()) for image, _ in part] for part in (data.train_set, data.val_set))
        assert (len(train), len(val)) == (40, 10)
        assert not set(train) & set(val)
        assert len(data.flipped) == 10
        seen.append(train)
    assert seen[0] == seen[1] != seen[2]
    assert len(data.test_dataloader().dataset) == 20  # type: ignore[arg-type]


def test_validation_and_test_text_do_not_overlap(tmp_path: Path) -> None:
    path = tmp_path / "tinyshakespeare.txt"
    path.write_text("".join(chr(97 + number % 26) + str(number) for number in range(20_000)))
    data = TASKS["text"].data(tmp_path, 0, 0.0)
    assert isinstance(data, tasks.TestedText)
    data.setup("fit")
    val, tested = ({tuple(ids.tolist()) for ids, _ in part} for part in (data.val_set, data.test_set))
    assert val
    assert tested
    assert not val & tested
