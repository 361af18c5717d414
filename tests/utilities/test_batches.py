"""An input is found in batches of every form and replaced in a copy: the batch itself stays as it is."""

import copy
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lightning_grad.utilities.batches import find_input, input_at, map_tensors, same_tensors, with_input
from lightning_grad.utilities.input_patterns import has_inputs

X, IDS, Y = torch.arange(6.0).view(2, 3), torch.arange(2), torch.tensor([0.5, 1.5])
NEW = torch.full((2, 3), 9.0)


class Pair(NamedTuple):
    y: Tensor
    x: Tensor


@dataclass
class Record:
    ids: Tensor
    x: Tensor


@dataclass(frozen=True)
class Frozen:
    ids: Tensor
    x: Tensor


@dataclass(frozen=True, slots=True)
class Slotted:
    ids: Tensor
    x: Tensor


class Encoding(UserDict):  # type: ignore[type-arg]
    """Like those of tokenizers: a mapping that gives its entries as attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getstate__(self) -> Any:
        return {"data": self.data}

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)


class Store(MutableMapping):  # type: ignore[type-arg]
    """A mapping that keeps its entries in a dictionary of its own."""

    def __init__(self, **entries: Any) -> None:
        self._entries = entries

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Graph:
    """An object that keeps tensors, and knows who owns it."""

    def __init__(self) -> None:
        self.ids, self.x, self.owner = IDS, X, self


Named = namedtuple("Named", "x y")

FORMS: dict[str, tuple[Callable[[], Any], tuple[Any, ...]]] = {
    "tensor": (lambda: X, ()),
    "tuple": (lambda: (X, IDS), (0,)),
    "list, after labels": (lambda: [Y, IDS, X], (2,)),
    "named tuple": (lambda: Pair(IDS, X), (1,)),
    "collections' named tuple": (lambda: Named(X, IDS), (0,)),
    "dictionary": (lambda: {"ids": IDS, "x": X}, ("x",)),
    "ordered dictionary": (lambda: OrderedDict(ids=IDS, x=X), ("x",)),
    "nested": (lambda: ({"ids": IDS, "parts": [Y, {"x": X}]}, X + 1), (0, "parts", 1, "x")),
    "dataclass": (lambda: Record(IDS, X), ("x",)),
    "frozen dataclass": (lambda: Frozen(IDS, X), ("x",)),
    "dataclass with slots": (lambda: Slotted(IDS, X), ("x",)),
    "frozen dataclass in a list": (lambda: [Frozen(IDS, X)], (0, "x")),
    "object": (Graph, ("x",)),
    "namespace": (lambda: SimpleNamespace(name="a", x=X), ("x",)),
    "user's dictionary": (lambda: UserDict({"ids": IDS, "x": X}), ("x",)),
    "encoding": (lambda: Encoding({"ids": IDS, "x": X}), ("x",)),
    "mapping of its own": (lambda: Store(ids=IDS, x=X), ("x",)),
    "integer keys": (lambda: {0: IDS, 1: X}, (1,)),
    "packed": (lambda: pack_padded_sequence(X.unsqueeze(2), torch.tensor([3, 1]), batch_first=True), ("data",)),
}
PACKED_PATH = (0,)  # a named tuple


def parts(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(batch, lambda tensor: (found.append(tensor), tensor)[1])
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_input_is_found_and_replaced_in_a_copy(form: str) -> None:
    build, path = FORMS[form]
    path = PACKED_PATH if form == "packed" else path
    batch = build()
    before = parts(batch)
    assert find_input(batch, None, "Somebody") == path
    old = input_at(batch, path)
    new = NEW if old.shape == NEW.shape else torch.full_like(old, 9.0)
    other = with_input(batch, path, new)
    assert type(other) is type(batch)
    assert input_at(other, path) is new
    assert input_at(batch, path) is old
    after = parts(batch)
    assert len(before) == len(after)
    assert all(a is b for a, b in zip(before, after, strict=True))
    shared = [tensor for tensor in before if tensor is not old]
    assert all(any(tensor is own for own in parts(other)) for tensor in shared), "the rest is shared"
    if form != "tensor":
        assert other is not batch


def test_a_packed_sequence_stays_one_that_networks_take() -> None:
    packed = pack_padded_sequence(X.unsqueeze(2), torch.tensor([1, 3]), batch_first=True, enforce_sorted=False)
    other = with_input(packed, (0,), packed.data + 1)
    assert isinstance(other, PackedSequence)
    assert torch.equal(other.sorted_indices, packed.sorted_indices)
    output, _ = nn.GRU(1, 2)(other)
    assert output.data.shape == (4, 2)


def test_only_floating_tensors_of_two_dimensions_are_inputs() -> None:
    assert find_input((IDS, Y, torch.tensor(1.0)), None, "Somebody") is None
    assert find_input({"image": torch.zeros(2, 3, dtype=torch.uint8), "text": "words"}, None, "Somebody") is None
    assert find_input((Y, X.half()), None, "Somebody") == (1,)
    assert find_input(None, None, "Somebody") is None
    assert find_input((nn.Linear(2, 2), Record, X), None, "Somebody") == (2,)


@pytest.mark.parametrize(
    "name",
    ["label", "labels", "Target", "targets", "y", "Y", "mask", "attention_mask", "weight", "weights", "sample_weight"],
)
def test_targets_masks_and_weights_are_no_inputs(name: str) -> None:
    pair = namedtuple("pair", [name, "x"])  # type: ignore[misc]
    assert find_input({name: X, "pixels": X}, None, "Somebody") == ("pixels",)
    assert find_input([SimpleNamespace(**{name: {"boxes": X}}, x=X)], None, "Somebody") == (0, "x")
    assert find_input(pair(X, X), None, "Somebody") == (1,)
    assert find_input({name: X}, None, "Somebody") is None
    assert find_input({name: X}, name, "Somebody") == (name,)


def test_names_are_compared_whole() -> None:
    for name in ("style", "masked", "weighted", "labelled", "yy", 0):
        assert find_input({name: X}, None, "Somebody") == (name,)


def test_integers_before_the_first_floating_tensor_make_it_unclear() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.long)
    assert find_input((tokens, X), None, "Somebody") is None
    assert find_input((X, tokens), None, "Somebody") == (0,)
    assert find_input({"labels": tokens, "mask": tokens, "x": X}, None, "Somebody") == ("x",)
    assert find_input((tokens > 0, X), None, "Somebody") == (1,)


@pytest.mark.parametrize(
    ("batch", "path", "said"),
    [
        ({"x": X}, ("z",), r"There is no batch\['z'\]: batch, a dict, has no 'z'\."),
        ({"a": None}, ("a", 0), r"There is no batch\['a'\]\[0\]: batch\['a'\], a NoneType, has no 0\."),
        ([X], (1,), r"There is no batch\[1\]: batch, a list, has no 1\."),
    ],
)
def test_a_path_that_leads_nowhere(batch: Any, path: Any, said: str) -> None:
    assert not has_inputs(batch, path)
    with pytest.raises(ValueError, match=said):
        input_at(batch, path)
    with pytest.raises(ValueError, match=said):
        with_input(batch, path, X)


def test_a_path_to_something_else() -> None:
    assert not has_inputs({"x": [X]}, ("x",))
    assert not has_inputs({"x": IDS}, ("x",))
    with pytest.raises(ValueError, match=r"There is no tensor at batch\['x'\]: it is a list\."):
        input_at({"x": [X]}, ("x",))


@pytest.mark.parametrize(
    ("key", "path"),
    [
        (0, (0,)),
        ("0", (0,)),
        ("1.x", (1, "x")),
        ("2.deep.1", (2, "deep", 1)),
        ("3.x", (3, "x")),
    ],
)
def test_keys_and_positions_joined_by_dots(key: Any, path: Any) -> None:
    batch = [X, {"x": X + 1}, {"deep": (IDS, X + 2)}, Frozen(IDS, X)]
    assert find_input(batch, key, "Somebody") == path


class Stored:
    """Keeps its tensors in a store, and shows them as attributes, as graphs do."""

    def __init__(self) -> None:
        self.__dict__["_store"] = {"x": X, "pos": X + 1}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_store"][name]
        except KeyError:
            raise AttributeError(name) from None


def test_a_key_may_name_what_an_object_shows() -> None:
    assert find_input([Stored()], "0.pos", "Somebody") == (0, "_store", "pos")
    with pytest.raises(ValueError, match=r"input_key='z' is not in the batch; available there: '_store'\."):
        find_input(Stored(), "z", "Somebody")


def test_a_key_may_name_a_tensor_of_one_dimension() -> None:
    assert find_input((X, Y), 1, "Somebody") == (1,)


def test_keys_that_look_like_something_else() -> None:
    dotted = {"views.0": X, "views": [X + 1]}
    assert find_input(dotted, "views.0", "Somebody") == ("views.0",)
    assert find_input({"views": [X + 1]}, "views.0", "Somebody") == ("views", 0)
    assert find_input({"0": X, 0: X + 1}, "0", "Somebody") == ("0",)
    assert find_input({0: X}, "0", "Somebody") == (0,)
    assert find_input({0: X}, 0, "Somebody") == (0,)


@pytest.mark.parametrize(
    ("batch", "key", "said"),
    [
        ({"x": X, "y": Y}, "z", r"Somebody: input_key='z' is not in the batch; available there: 'x', 'y'\."),
        ((X, Y), 2, r"Somebody: input_key=2 is not in the batch; available there: 0, 1\."),
        ((X, Y), -1, r"Somebody: input_key=-1 is not in the batch"),
        ([{"x": X}], "0.z", r"input_key='0\.z' is not in the batch; available there: 'x'\."),
        (X, "x", r"input_key='x' is not in the batch; type Tensor has no parts\."),
        ({"n": 3}, "n.x", r"type int has no parts\."),
        (
            {"ids": IDS},
            "ids",
            r"'ids' must name a floating-point tensor of the batch, but names a tensor of torch\.int64\.",
        ),
        ({"x": [X]}, "x", r"must name a floating-point tensor of the batch, but names a list\."),
    ],
)
def test_keys_that_lead_nowhere(batch: Any, key: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find_input(batch, key, "Somebody")


def test_an_object_that_knows_its_owner_is_searched_once_in_a_while() -> None:
    graph = Graph()
    del graph.x
    assert find_input(graph, None, "Somebody") is None


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("packed", "object")])
def test_every_tensor_is_mapped(form: str) -> None:
    batch = FORMS[form][0]()
    before = [tensor.clone() for tensor in parts(batch)]
    mapped = map_tensors(batch, lambda tensor: tensor + 1)
    assert type(mapped) is type(batch)
    for own, other, was in zip(parts(batch), parts(mapped), before, strict=True):
        assert torch.equal(own, was)
        assert torch.equal(other, was + 1)


def test_what_is_no_tensor_is_kept() -> None:
    batch = {"name": "a", "n": 3, "none": None, "x": X, "list": ["b", 1.5]}
    mapped = map_tensors(batch, torch.zeros_like)
    assert {key: value for key, value in mapped.items() if key != "x"} == {
        key: value for key, value in batch.items() if key != "x"
    }
    assert mapped["list"] is batch["list"]


def test_batches_of_the_same_tensors_are_the_same_though_their_containers_are_new() -> None:
    batch = ({"x": X}, IDS)
    assert same_tensors(batch, copy.copy(batch))
    assert same_tensors(batch, ({"x": X}, IDS))
    assert not same_tensors(batch, ({"x": X.clone()}, IDS))
    assert not same_tensors(batch, ({"x": X}, IDS, IDS))
