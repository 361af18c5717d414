"""Score files: what is written is read, what does not belong together is refused, and reading leaves no trace."""

import dataclasses
import enum
import os
import random
import subprocess
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_grad.data import SampleScores, average_scores, fingerprint, load_scores, save_scores
from lightning_grad.data.fingerprints import Fingerprint, _digest

NAN, INF = float("nan"), float("inf")


class Items(Dataset[Any]):
    """A data set of given items, which counts how often it is read."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.reads = items, 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.items[index]


class Others(Items):
    pass


class Augmented(Items):
    """Adds noise from one of the global random streams, as transforms do."""

    def __init__(self, items: list[Any], source: str) -> None:
        super().__init__(items)
        self.source = source

    def __getitem__(self, index: int) -> Any:
        draw = {"python": random.random, "numpy": np.random.rand, "torch": lambda: float(torch.rand(()))}[self.source]
        return self.items[index][0] + draw(), self.items[index][1]


def digits(n: int = 100, seed: int = 0) -> list[tuple[torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(4, generator=generator), i % 3) for i in range(n)]


def same(a: SampleScores, b: SampleScores) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0)) if isinstance(x, torch.Tensor) else x == y

    return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(SampleScores))


# Fingerprints.


def test_a_fingerprint_knows_the_same_data_again() -> None:
    assert fingerprint(Items(digits())) == fingerprint(Items(digits()))
    assert fingerprint(Items(digits())).differences(fingerprint(Items(digits()))) == []


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (Items(digits(99)), "the length"),
        (Items(digits(seed=1)), "the items"),
        (Items(digits()[::-1]), "the items"),
        (Items([(x, y + 1) for x, y in digits()]), "the items"),
        (Items([(x.double(), y) for x, y in digits()]), "the items"),
    ],
)
def test_a_fingerprint_tells_other_data(other: Items, difference: str) -> None:
    (found,) = fingerprint(Items(digits())).differences(fingerprint(other))
    assert found.startswith(difference)


def test_the_same_items_in_another_class_are_the_same_data() -> None:
    first, second = fingerprint(Items(digits())), fingerprint(Others(digits()))
    assert first != second
    assert first.differences(second) == []


@pytest.mark.parametrize("source", ["python", "numpy", "torch"])
def test_of_augmented_data_only_length_and_class_count(source: str) -> None:
    augmented = fingerprint(Augmented(digits(), source))
    assert augmented.items is None
    assert augmented == fingerprint(Augmented(digits(seed=5), source))
    assert augmented.differences(fingerprint(Augmented(digits(60), source))) == ["the length (100 against 60)"]
    assert augmented.differences(fingerprint(Items(digits()))) == ["the class (Augmented against Items)"]


@pytest.mark.parametrize("source", ["python", "numpy", "torch"])
def test_reading_items_disturbs_no_random_stream(source: str) -> None:
    def streams() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seeded() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seeded()
    expected = streams()
    seeded()
    fingerprint(Augmented(digits(), source))
    assert streams() == expected


def test_the_generators_of_gpus_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed does that, and before CUDA has started nobody could restore what it does."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(0)
    assert seeded, "this is how torch reaches them"
    seeded.clear()
    fingerprint(Items(digits()))
    assert not seeded


def test_the_streams_are_restored_when_an_item_cannot_be_read() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        fingerprint({0: 1, 2: 3})  # whose items are not 0 and 1
    assert torch.equal(torch.get_rng_state(), state)


def test_few_items_are_read() -> None:
    data = Items(digits(1000))
    fingerprint(data)
    assert data.reads == 64 + 8
    small = Items(digits(3))
    assert fingerprint(small).items is not None
    assert fingerprint(Items([])).length == 0


def test_a_change_outside_the_sample_is_not_seen() -> None:
    """The price of reading 64 items; said here so that nobody relies on more."""
    data = digits(1000)
    read = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:64].tolist()
    unread = next(i for i in range(1000) if i not in read)
    data[unread] = (torch.zeros(4), 0)
    assert fingerprint(Items(data)) == fingerprint(Items(digits(1000)))
    data[read[0]] = (torch.zeros(4), 0)
    assert fingerprint(Items(data)) != fingerprint(Items(digits(1000)))


def test_a_subset_names_what_it_is_a_subset_of() -> None:
    data = TensorDataset(torch.arange(10.0))
    found = fingerprint(Subset(data, [3, 1]))
    assert found.class_name == "Subset[TensorDataset]"
    assert found.length == 2
    assert found.items is not None


def test_a_fingerprint_is_that_of_another_process() -> None:
    """Hashes of strings and orders of sets differ from process to process."""
    script = (
        "import sys, types\n"
        "package = sys.modules['lightning_grad'] = types.ModuleType('lightning_grad')\n"
        "package.__path__ = ['lightning_grad']\n"  # without Lightning, which takes seconds to import
        "from lightning_grad.data import fingerprint\n"
        "print(fingerprint([({'text': 'ab', 'tags': {'x', 'y', 'z'}}, i) for i in range(9)]).items)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    here = fingerprint([({"text": "ab", "tags": {"x", "y", "z"}}, i) for i in range(9)])
    assert done.stdout.strip() == here.items


Point = namedtuple("Point", "x y")


@dataclasses.dataclass
class Sample:
    text: str
    label: int


class Opaque:
    def __init__(self, value: int) -> None:
        self.value = value


class Color(enum.Enum):
    RED = 1
    BLUE = 2


DIFFERENT = [
    None,
    True,
    1,
    2,
    1.0,
    1j,
    "1",
    b"1",
    ("ab", "c"),
    ("a", "bc"),
    ("astrb", "c"),
    ("a", "bstrc"),
    ["a", "bc"],
    ("a", ("bc",)),
    (("a", "bc"),),
    {"a": "bc"},
    {"a": 1},
    {"b": 1},
    {"a", "bc"},
    Point(1, 2),
    Point(1, 3),
    Sample("a", 1),
    Sample("a", 2),
    Color.RED,
    Color.BLUE,
    torch.tensor(1),
    torch.tensor(1.0),
    torch.tensor([1.0]),
    torch.tensor([[1.0]]),
    torch.tensor([1.0], dtype=torch.bfloat16),
    torch.tensor([True]),
    torch.zeros(0, 3),
    torch.zeros(3, 0),
    np.array([1.0]),
    np.array([2.0]),
    np.array(["a", "b"], dtype=object),
    np.array(["a", "c"], dtype=object),
    np.float32(1.0),
]


def test_different_items_have_different_hashes() -> None:
    found = [_digest(value) for value in DIFFERENT]
    for i, first in enumerate(found):
        for j in range(i):
            assert first != found[j], f"{DIFFERENT[i]!r} and {DIFFERENT[j]!r}"


def test_equal_items_have_equal_hashes() -> None:
    pairs = [
        (OrderedDict(a=1, b=2), {"b": 2, "a": 1}),
        ({3, 1, 2}, {2, 3, 1}),
        (torch.arange(6).view(2, 3).T, torch.tensor([[0, 3], [1, 4], [2, 5]])),
        (torch.ones(2, requires_grad=True), torch.ones(2)),
        (torch.tensor([1 + 1j]).conj(), torch.tensor([1 - 1j])),
        (np.arange(6).reshape(2, 3).T, np.array([[0, 3], [1, 4], [2, 5]])),
        (float("nan"), float("nan")),
        (Path("a/b"), "a/b"),
        (Opaque(1), Opaque(2)),  # of what cannot be hashed stably, the type
        (lambda: 1, lambda: 2),
    ]
    for first, second in pairs:
        assert _digest(first) == _digest(second), repr(first)
    assert _digest(Opaque(1)) != _digest(object())


class Labelled(torch.Tensor):
    """A tensor that a library labels."""


class Refusing(torch.Tensor):
    """A tensor that lets nobody else compute with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(f"no {func}")


class Remote(torch.Tensor):
    """A tensor whose numbers are elsewhere."""

    @staticmethod
    def __new__(cls) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, (2, 2))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("far away")


def nested(values: torch.Tensor, layout: Any) -> torch.Tensor:
    return torch.nested.nested_tensor([values, values[:1]], layout=layout)


def per_channel(values: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_channel(values, torch.tensor([0.1, 0.2]), torch.tensor([0, 0]), 1, torch.qint8)


KINDS: dict[str, Any] = {
    "one element, strided": lambda x: x[1:2, 0],
    "zero-dim": lambda x: x[1, 1],
    "transposed": lambda x: x.T,
    "expanded": lambda x: x.expand(2, 3, 2),
    "parameter": lambda x: torch.nn.Parameter(x),
    "with a graph": lambda x: x.requires_grad_() * 2,
    "subclass": lambda x: x.as_subclass(Labelled),
    "subclass that refuses": lambda x: x.as_subclass(Refusing),
    "sparse": lambda x: x.to_sparse(),
    "sparse, uncoalesced": lambda x: torch.sparse_coo_tensor(torch.tensor([[0, 0]]), x[1, :2], (4,)),
    "sparse rows": lambda x: x.to_sparse_csr(),
    "sparse columns": lambda x: x.to_sparse_csc(),
    "sparse blocks": lambda x: x.to_sparse_bsr((1, 2)),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "quantized by channel": per_channel,
    "complex": lambda x: torch.complex(x, x),
    "conjugate": lambda x: torch.complex(x, x).conj(),
    "imaginary part": lambda x: torch.complex(x, x).conj().imag,
    "half complex": lambda x: torch.complex(x, x).to(torch.complex32),
    "boolean": lambda x: x > 1.5,
    "bfloat16": lambda x: x.bfloat16(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "uint16": lambda x: x.to(torch.uint16),
    "mkldnn": lambda x: x.to_mkldnn(),
    "channels last": lambda x: x.view(1, 3, 2, 1).to(memory_format=torch.channels_last),
    "nested": lambda x: nested(x, torch.strided),
    "jagged": lambda x: nested(x, torch.jagged),
}
IGNORED = "ignore:.*(prototype|beta|invariant checks|deprecated|ComplexHalf).*:UserWarning"


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_any_kind_is_hashed_by_its_content(kind: str) -> None:
    make = KINDS[kind]
    first, again, other = (_digest((make(torch.arange(6.0).view(3, 2) + more), 1)) for more in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.filterwarnings(IGNORED)
def test_layouts_are_told_apart_and_strides_are_not() -> None:
    x = torch.arange(6.0).view(3, 2)
    forms = [x, x.to_sparse(), x.to_sparse_csr(), x.to_sparse_csc(), x.to_mkldnn(), KINDS["quantized"](x)]
    assert len({_digest(form) for form in forms}) == len(forms)
    assert _digest(x[1:2, 0]) == _digest(x[1:2, 0].clone()) == _digest(torch.tensor([2.0]))


def test_tensors_without_numbers_are_known_by_their_shape() -> None:
    assert _digest(torch.zeros(2, 2, device="meta")) == _digest(torch.ones(2, 2, device="meta"))
    assert _digest(torch.zeros(2, 2, device="meta")) != _digest(torch.zeros(2, 3, device="meta"))
    assert _digest(Remote()) == _digest(Remote())


def test_an_item_that_holds_itself_is_no_trap() -> None:
    knot: list[Any] = [1]
    knot.append(knot)
    assert _digest(knot) == _digest(knot)


def test_images_are_hashed_by_content() -> None:
    image = pytest.importorskip("PIL.Image")
    red, blue, gray = image.new("RGB", (4, 3), "red"), image.new("RGB", (4, 3), "blue"), image.new("L", (4, 3))
    assert _digest(red) == _digest(red.copy())
    assert len({_digest(picture) for picture in (red, blue, gray, gray.resize((3, 4)))}) == 4


@pytest.mark.parametrize("dataset", [iter([1, 2]), 5])
def test_what_has_no_indices_raises(dataset: Any) -> None:
    with pytest.raises(TypeError, match="map-style data set"):
        fingerprint(dataset)


# Files.


def full() -> SampleScores:
    data = Items(digits())
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(100, generator=generator, dtype=torch.float64)
    values[[0, 5]] = torch.tensor([NAN, INF], dtype=torch.float64)
    labels = torch.tensor([y for _, y in digits()])
    return SampleScores(values, "el2n", 10.5, 7, fingerprint(data), labels, torch.randperm(100, generator=generator))


def bare() -> SampleScores:
    return SampleScores(torch.tensor([0.1, 0.2]), "grand")


@pytest.mark.parametrize("make", [full, bare])
def test_what_is_written_is_read(make: Any, tmp_path: Path) -> None:
    scores = make()
    path = save_scores(scores, tmp_path / "new" / "scores.npz")
    assert same(load_scores(path), scores)
    assert type(load_scores(path).seed) is type(scores.seed)
    assert [p.name for p in path.parent.iterdir()] == ["scores.npz"], "no part is left behind"


def test_the_ending_is_added(tmp_path: Path) -> None:
    assert save_scores(bare(), tmp_path / "el2n-0.5").name == "el2n-0.5.npz"
    assert save_scores(bare(), str(tmp_path / "a.npz")) == tmp_path / "a.npz"


def test_numpy_reads_the_file_without_pickle(tmp_path: Path) -> None:
    scores = full()
    with np.load(save_scores(scores, tmp_path / "a.npz"), allow_pickle=False) as file:
        np.testing.assert_array_equal(file["scores"], scores.values.numpy())
        np.testing.assert_array_equal(file["index"], scores.index.numpy())
        assert file["name"].item() == "el2n"
        assert file["fingerprint_length"].item() == 100
    with np.load(save_scores(bare(), tmp_path / "b.npz"), allow_pickle=False) as file:
        assert file["index"].tolist() == [0, 1], "the index is always written"
        assert set(file.files) == {"format", "scores", "index", "name"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_scores(bare(), tmp_path / "a.npz")

    def fail(file: Any, **entries: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        save_scores(full(), path)
    assert same(load_scores(path), bare())
    assert list(tmp_path.iterdir()) == [path]


def test_scores_of_the_data_set_are_accepted(tmp_path: Path) -> None:
    path = save_scores(full(), tmp_path / "a.npz")
    load_scores(path, Items(digits()))
    load_scores(path, Others(digits()))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Items(digits(90)), r"the length \(100 against 90\) differs"),
        (Items(digits(seed=1)), "the items .* differs"),
        (Augmented(digits(), "torch"), r"the class \(Items against Augmented\)"),
        (Augmented(digits(90), "torch"), r"the length .* and the class .* differ \("),
    ],
)
def test_scores_of_another_data_set_raise_or_warn(other: Items, message: str, tmp_path: Path) -> None:
    path = save_scores(full(), tmp_path / "a.npz")
    with pytest.raises(ValueError, match=message):
        load_scores(path, other)
    with pytest.warns(UserWarning, match=message):
        assert same(load_scores(path, other, strict=False), full())


def test_the_recorded_sample_is_compared(tmp_path: Path) -> None:
    recorded = fingerprint(Items(digits()), samples=5, seed=9)
    scores = dataclasses.replace(bare(), values=torch.zeros(100), fingerprint=recorded)
    path = save_scores(scores, tmp_path / "a.npz")
    load_scores(path, Items(digits()))
    with pytest.raises(ValueError, match="the items"):
        load_scores(path, Items(digits(seed=1)))


def test_without_a_fingerprint_the_length_is_compared(tmp_path: Path) -> None:
    path = save_scores(bare(), tmp_path / "a.npz")
    load_scores(path, Items(digits(2)))
    with pytest.raises(ValueError, match=r"the length \(2 against 3\)"):
        load_scores(path, Items(digits(3)))
    some = SampleScores(torch.zeros(2), "grand", index=torch.tensor([0, 4]))
    path = save_scores(some, tmp_path / "b.npz")
    load_scores(path, Items(digits(9)))
    with pytest.raises(ValueError, match=r"the length \(5 against 4\)"):
        load_scores(path, Items(digits(4)))


def test_files_that_are_none_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_scores(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    np.savez(tmp_path / "pickled.npz", scores=np.array([object()], dtype=object))
    np.save(tmp_path / "plain.npy", np.ones(3))
    for name in ("text.npz", "empty.npz", "other.npz", "pickled.npz", "plain.npy"):
        with pytest.raises(ValueError, match="not a score file"):
            load_scores(tmp_path / name)
    (tmp_path / "later.npz").write_bytes(save_scores(bare(), tmp_path / "now.npz").read_bytes())
    with np.load(tmp_path / "now.npz") as file:
        np.savez(tmp_path / "later.npz", **{**file, "format": np.asarray(2)})
    with pytest.raises(ValueError, match="later version"):
        load_scores(tmp_path / "later.npz")


# The scores themselves.


def test_values_become_float64_on_the_cpu() -> None:
    scores = SampleScores(torch.ones(3, dtype=torch.float16, requires_grad=True), "el2n", labels=torch.ones(3).int())
    assert scores.values.dtype == torch.float64
    assert not scores.values.requires_grad
    assert scores.labels is not None
    assert scores.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": torch.zeros(2, 2)}, r"shape \(2, 2\)"),
        ({"labels": torch.zeros(4)}, "3 values, but labels"),
        ({"index": torch.arange(2)}, "3 values, but index"),
        ({"index": torch.tensor([0, 1, 1])}, "distinct indices"),
        ({"index": torch.tensor([0, 1, -1])}, "distinct indices"),
    ],
)
def test_scores_that_do_not_fit_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleScores(**{"values": torch.zeros(3), "name": "el2n", **arguments})


def test_dense_scores() -> None:
    assert bare().dense(2).tolist() == pytest.approx([0.1, 0.2])
    assert bare().dense(3).isnan().tolist() == [False, False, True]
    with pytest.raises(ValueError, match="reach to item 1, but the data set has 1 items"):
        bare().dense(1)


# Means.


def test_mean_of_runs(tmp_path: Path) -> None:
    values = torch.tensor([[1.0, 2.0, NAN, NAN], [3.0, 2.0, 5.0, NAN], [5.0, 5.0, 7.0, NAN]])
    runs = [SampleScores(row, "el2n", 10, seed) for seed, row in enumerate(values)]
    paths = [save_scores(run, tmp_path / f"{run.seed}.npz") for run in runs]
    for files in (runs, paths, [runs[0], str(paths[1]), paths[2]]):
        mean = average_scores(files)
        torch.testing.assert_close(
            mean.values, torch.tensor([3.0, 3.0, 6.0, NAN], dtype=torch.float64), equal_nan=True, rtol=0, atol=0
        )
        assert (mean.name, mean.epoch, mean.seed) == ("el2n", 10, None)
    assert same(average_scores([full()]), full())


def test_means_keep_what_one_file_knows() -> None:
    known = full()
    unknown = dataclasses.replace(known, labels=None, fingerprint=None, epoch=3)
    mean = average_scores([unknown, known])
    assert mean.fingerprint == known.fingerprint
    assert mean.labels is not None
    assert mean.epoch is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "grand"}, "'el2n' and 'grand'"),
        ({"fingerprint": Fingerprint(100, "Items", "0" * 32)}, "the items"),
        ({"index": None}, "their indices differ"),
        ({"labels": torch.zeros(100)}, "their labels differ"),
    ],
)
def test_what_has_no_mean_raises(change: dict[str, Any], message: str) -> None:
    first = full()
    with pytest.raises(ValueError, match=message):
        average_scores([first, dataclasses.replace(first, **change)])


def test_lengths_without_an_index_must_agree() -> None:
    with pytest.raises(ValueError, match="their indices differ"):
        average_scores([bare(), SampleScores(torch.zeros(3), "grand")])
    with pytest.raises(ValueError, match="got none"):
        average_scores([])


# Tables.


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "prototypes.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("score\n0.5\n0.25\n", "prototypes"),
        ("\ufeffEL2N\n0.5\n0.25\n", "EL2N"),
        ("filename,el2n\na.png,0.5\nb.png,0.25\n", "el2n"),
        ("label,score,other\n3,0.5,9\n4,0.25,9\n", "prototypes"),
        ('index,score\n0,0.5\n1,"0.25"\n', "prototypes"),
    ],
)
def test_tables_are_read(text: str, name: str, tmp_path: Path) -> None:
    scores = load_scores(table(tmp_path, text))
    assert scores.values.tolist() == [0.5, 0.25]
    assert scores.name == name


def test_an_index_column_is_used(tmp_path: Path) -> None:
    scores = load_scores(table(tmp_path, "idx,score\n2,0.5\n0,nan\n"), Items(digits(3)))
    assert scores.dense(3).isnan().tolist() == [True, True, False]
    with pytest.raises(ValueError, match=r"the length \(3 against 2\)"):
        load_scores(table(tmp_path, "idx,score\n2,0.5\n0,1\n"), Items(digits(2)))


def test_file_names_are_found_in_the_data_set(tmp_path: Path) -> None:
    folder = Items(digits(3))
    folder.samples = [("/data/cat/1.png", 0), ("/data/cat/2.png", 0), ("/data/dog/3.png", 1)]
    path = table(tmp_path, "filename,score\ntrain/dog/3.png,3\n1.png,1\n2.png,2\n")
    assert load_scores(path, folder).dense(3).tolist() == [1.0, 2.0, 3.0]
    assert load_scores(path).index is None, "without a data set, rows are in order"
    folder.samples = folder.samples[:2]
    with pytest.raises(ValueError, match=r"no file 'train/dog/3.png' \(1 names"):
        load_scores(path, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got the columns none, 0 rows"),
        ("score\n", "0 rows"),
        ("a,b\n1,2\n", "got the columns 'a', 'b', 1 rows"),
        ("score\nhard\n", "is not a number"),
        ("index,score\n0.5,1\n", "is not a number"),
        ("index,score\n0\n", "is not a number"),
    ],
)
def test_tables_that_are_none_say_so(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_scores(table(tmp_path, text))


def test_a_table_is_compared_by_length(tmp_path: Path) -> None:
    path = table(tmp_path, "score\n1\n2\n")
    load_scores(path, Items(digits(2)))
    with pytest.raises(ValueError, match=r"the length \(2 against 5\)"):
        load_scores(path, Items(digits(5)))
