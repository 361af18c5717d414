"""The domains of a claim have the shares and the numbers of classes that it says, and the target is left as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from studies.claims import CLAIMS
from studies.domains import NAMES, Data
from studies.pretrained import tensors_of
from studies.tasks import CLASSES, TASKS


def test_domains_shift_the_classes_of_different_images() -> None:
    source = TASKS["images"].data(None, 0, 0.0)
    source.setup("fit")
    data = Data(source, 0.4, seed=0)
    parts = [tensors_of(part) for part in data.train_set.datasets]
    images, labels = tensors_of(source.train_set)
    assert len(parts) == len(NAMES)
    sizes = [len(targets) for _, targets in parts]
    assert sum(sizes) == len(labels)
    assert sizes[0] == round(0.4 * len(labels))
    assert max(sizes[1:]) - min(sizes[1:]) <= 1
    keys = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    for shift, (inputs, targets) in enumerate(parts):
        own = torch.tensor([keys[image.numpy().tobytes()] for image in inputs])
        known = (own + shift) % CLASSES
        assert (targets == known).float().mean() > 0.99  # two digits may be the same picture
    assert data.val_set is source.val_set


def test_a_share_of_all_is_refused() -> None:
    with pytest.raises(ValueError, match="percent must be at most 99; got 100"):
        replace(CLAIMS["domain-reweighting-images"], percent=100).check()
