"""A copy of a batch shares nothing with it that a step could change, and is otherwise the same."""

from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.data import TensorDataset

from lightning_grad.utilities.batch_copies import copy_of
from tests.labelled import KINDS, labelled
from tests.utilities.test_batches import FORMS, parts


@pytest.mark.parametrize("form", FORMS)
def test_tensors_are_copies_in_containers_of_the_same_class(form: str) -> None:
    batch = FORMS[form][0]()
    before = [tensor.clone() for tensor in parts(batch)]
    other = copy_of(batch)
    assert type(other) is type(batch)
    for tensor in parts(other):
        tensor.zero_()
    for tensor, was in zip(parts(batch), before, strict=True):
        assert torch.equal(tensor, was)


@dataclass
class Meta:
    names: list[str] = field(default_factory=lambda: ["a", "b"])
    sizes: Any = None


class Drawing:
    """An object without any tensor."""

    def __init__(self) -> None:
        self.strokes, self.count = [1, 2], 0


class Compact:
    """An object without a dictionary."""

    __slots__ = ("names", "x")

    def __init__(self) -> None:
        self.names, self.x = ["a"], torch.zeros(1)


PAIR = namedtuple("PAIR", "left right")


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: {"meta": {"ids": [1, 2]}}, lambda batch: batch["meta"].pop("ids")),
        (lambda: [["a", "b"]], lambda batch: batch[0].sort(reverse=True)),
        (lambda: ({"deep": [{"er": [1]}]}, 2), lambda batch: batch[0]["deep"][0]["er"].append(2)),
        (lambda: PAIR([1], 2), lambda batch: batch.left.clear()),
        (lambda: {"a": {1, 2}}, lambda batch: batch["a"].add(3)),
        (lambda: [deque([1, [2]])], lambda batch: batch[0][1].append(3)),
        (lambda: OrderedDict(a=1, b=2), lambda batch: batch.move_to_end("a")),
        (lambda: Meta(), lambda batch: batch.names.append("c")),
        (lambda: [Meta()], lambda batch: setattr(batch[0], "sizes", 3)),
        (lambda: [Drawing()], lambda batch: setattr(batch[0], "count", 1)),
        (lambda: [Drawing()], lambda batch: batch[0].strokes.append(3)),
        (lambda: SimpleNamespace(x=SimpleNamespace(n=1)), lambda batch: setattr(batch.x, "n", 2)),
        (lambda: [Compact()], lambda batch: batch[0].names.append("b")),
        (lambda: [Compact()], lambda batch: batch[0].x.add_(1)),
        (lambda: {"image": Image.new("L", (2, 2))}, lambda batch: batch["image"].putpixel((0, 0), 9)),
        (lambda: {"image": np.zeros(3)}, lambda batch: batch["image"].fill(1)),
        (lambda: [np.array([[1], [2]], dtype=object)], lambda batch: batch[0].fill(None)),
    ],
)
def test_what_is_no_tensor_is_copied_too(make: Any, change: Any) -> None:
    batch = make()
    before = repr(described(batch))
    other = copy_of(batch)
    assert repr(described(other)) == before
    change(other)
    assert repr(described(batch)) == before
    assert repr(described(other)) != before, "the change was meant to show"


def described(value: Any) -> Any:
    if isinstance(value, Image.Image):
        return value.tobytes()
    if isinstance(value, Compact):
        return [value.names, value.x.tolist()]
    if isinstance(value, (list, tuple, deque)):
        return [described(item) for item in value]
    if isinstance(value, dict):
        return [(key, described(item)) for key, item in value.items()]
    return described(vars(value)) if hasattr(value, "__dict__") else value


def test_what_stands_there_twice_stands_there_twice_in_the_copy() -> None:
    x = torch.zeros(2)
    batch: dict[str, Any] = {"x": x, "target": [x]}
    batch["self"] = batch
    other = copy_of(batch)
    assert other["x"] is other["target"][0]
    assert other["x"] is not x
    assert other["self"] is other


def test_modules_data_sets_and_what_cannot_be_copied_are_shared() -> None:
    class Locked:
        def __copy__(self) -> Any:
            raise TypeError("cannot be copied")

        def __init__(self) -> None:
            self.number = 1

    batch = [nn.Linear(1, 1), TensorDataset(torch.zeros(1)), Locked(), Tensor, np]
    other = copy_of(batch)
    assert other is not batch
    assert all(own is old for own, old in zip(other, batch, strict=True))


class Owner:
    """Copies by itself the part that knows it, as graphs do."""

    def __init__(self) -> None:
        self.store = SimpleNamespace(x=torch.zeros(1), owner=self)

    def __copy__(self) -> Any:
        other = object.__new__(type(self))
        other.store = SimpleNamespace(x=self.store.x, owner=other)
        return other


def test_a_class_that_copies_its_parts_is_left_to_it() -> None:
    batch = Owner()
    other = copy_of(batch)
    assert other.store.owner is other
    other.store.x.add_(1)
    assert batch.store.x.item() == 0


def test_graphs_leaves_and_strides_are_kept() -> None:
    leaf = torch.ones(2, requires_grad=True)
    images = torch.zeros(1, 3, 4, 4).to(memory_format=torch.channels_last)
    other = copy_of([leaf, leaf * 2, images])
    assert other[0].is_leaf
    assert other[0].requires_grad
    assert other[1].grad_fn is not None
    assert other[2].is_contiguous(memory_format=torch.channels_last)
    other[0].sum().backward()
    assert leaf.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_classes_and_attributes_of_tensors_are_kept(kind: str) -> None:
    x = labelled(kind, torch.zeros(2, 3))
    other = copy_of({"x": x})["x"]
    assert type(other) is KINDS[kind]
    assert other.labels == x.labels
    other.labels.append("z")
    assert len(x.labels) == 3
    assert kind != "slotted" or other.domain == "unit"


def test_an_attribute_of_a_plain_tensor_is_kept() -> None:
    x = torch.zeros(1)
    x.name_of_it = ["a"]  # type: ignore[attr-defined]
    assert copy_of([x])[0].name_of_it == ["a"]


def test_packed_sequences() -> None:
    packed = pack_padded_sequence(torch.ones(2, 3, 1), torch.tensor([1, 3]), batch_first=True, enforce_sorted=False)
    other = copy_of(packed)
    assert isinstance(other, PackedSequence)
    other.data.zero_()
    assert packed.data.sum() == 4
