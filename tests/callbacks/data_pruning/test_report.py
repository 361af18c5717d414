"""What a scoring leaves behind shows the right samples, says what was pruned, and cannot stop a training."""

import csv
import io
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_grad.callbacks import DataPruning
from lightning_grad.callbacks.data_pruning import _report
from lightning_grad.callbacks.data_pruning._pictures import draw_samples, draw_scores
from lightning_grad.callbacks.data_pruning._samples import Sample, class_names_of, view_of
from lightning_grad.callbacks.data_pruning._scored import ScoredSet
from lightning_grad.utilities import reporting
from tests.wandb_offline import parsed, read_history

nan, inf = math.nan, math.inf
STEM = "data_pruning_epoch5"


def trainer_with(*loggers: Any) -> pl.Trainer:
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(logger=list(loggers) or False, enable_checkpointing=False, **quiet)


@pytest.fixture
def trainer(tmp_path: Path) -> pl.Trainer:
    logger = CSVLogger(tmp_path, name="run", version=0)
    _ = logger.experiment  # it has made its folder when settings were logged, and warns of one that others have made
    return trainer_with(logger)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "version_0"


@pytest.fixture(scope="module")
def digits() -> tuple[TensorDataset, ScoredSet]:
    """Images of digits, their distance to the mean of their class as scores, and the nearest mean as prediction."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None], torch.tensor(data.target)
    means = torch.stack([images[labels == digit].mean(0) for digit in range(10)])
    distances = (images - means.squeeze(1)).flatten(2).norm(dim=2).double()
    values = distances.gather(1, labels[:, None]).squeeze(1)
    kept = values.argsort(descending=True)[:898].sort().values
    return TensorDataset(images, labels), ScoredSet("distance", 5, values, kept, labels, distances.argmin(1))


def scored(values: Any, kept: Any = None, labels: Any = None, predictions: Any = None, name: str = "el2n") -> ScoredSet:
    given = [None if part is None else torch.as_tensor(part) for part in (kept, labels, predictions)]
    return ScoredSet(name, 5, torch.as_tensor(values, dtype=torch.float64), *given)


def report(
    trainer: Any, found: ScoredSet, dataset: Any, display_name: str, num_shown: int, figure: bool, names: Any = None
) -> None:
    """Report as the callback of that class and name does, on a data set that may have names of classes."""
    owner = DataPruning(name=display_name.partition("[")[2].removesuffix("]") or None)
    if names is not None:
        dataset = Named(dataset, names)
    _report.report_scores(trainer, found, dataset, owner, num_shown, figure)


class Named(Dataset[Any]):
    """A data set with names of its classes."""

    def __init__(self, items: Any, classes: Any) -> None:
        self.items, self.classes = items, classes

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(path: Path, name: str) -> list[str]:
    return [row[name] for row in rows_of(path)]


def pages(count: int) -> list[tuple[Tensor, int]]:
    return [(torch.arange(64.0).reshape(8, 8) + index, index) for index in range(count)]


# What is written.


def test_files_of_digits(trainer: pl.Trainer, folder: Path, digits: tuple[TensorDataset, ScoredSet]) -> None:
    dataset, found = digits
    report(trainer, found, dataset, "DataPruning", num_shown=8, figure=True)
    endings = ["label_errors.csv", "label_pairs.csv", "samples.csv", "samples.png", "scores.png"]
    assert sorted(path.name for path in folder.glob(f"{STEM}*")) == [f"{STEM}_{ending}" for ending in endings]
    for ending in endings[3:]:
        with Image.open(folder / f"{STEM}_{ending}") as image:
            assert min(image.size) > 500


def test_table_of_digits_says_what_is_so(
    trainer: pl.Trainer, folder: Path, digits: tuple[TensorDataset, ScoredSet]
) -> None:
    dataset, found = digits
    report(trainer, found, dataset, "DataPruning", num_shown=8, figure=False)
    rows = rows_of(folder / f"{STEM}_samples.csv")
    assert list(rows[0]) == ["index", "score", "rank", "label", "prediction", "kept"]
    values = found.values.numpy()
    order = np.argsort(-values, kind="stable")
    assert [int(row["index"]) for row in rows] == [*order[:8], *order[-8:]]
    for row in rows:
        index = int(row["index"])
        assert float(row["score"]) == values[index]
        assert int(row["rank"]) == (values > values[index]).sum()
        assert int(row["label"]) == load_digits().target[index]
        assert int(row["prediction"]) == found.predictions[index]
        assert row["kept"] == str(index in found.kept)
    assert {row["kept"] for row in rows[:8]} == {"True"}
    assert {row["kept"] for row in rows[8:]} == {"False"}


def test_name_of_the_callback_is_in_the_names_of_its_files(trainer: pl.Trainer, folder: Path) -> None:
    report(trainer, scored([1.0, 2.0]), pages(2), "DataPruning[the last one]", num_shown=1, figure=False)
    assert (folder / "data_pruning_the_last_one_epoch5_samples.csv").exists()


def test_nothing_is_shown_by_show_0(trainer: pl.Trainer, folder: Path) -> None:
    report(trainer, scored([1.0, 2.0]), None, "DataPruning", num_shown=0, figure=True)
    assert [path.name for path in folder.glob(f"{STEM}*")] == [f"{STEM}_scores.png"]


def test_nothing_is_written_without_a_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report(trainer_with(), scored([1.0, 2.0]), Unreadable(), "DataPruning", num_shown=1, figure=True)
    assert list(tmp_path.iterdir()) == []


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    other = SimpleNamespace(is_global_zero=False, loggers=[CSVLogger(tmp_path)])
    report(other, scored([1.0, 2.0]), Unreadable(), "DataPruning", num_shown=1, figure=True)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_table_is_written(
    trainer: pl.Trainer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "is_installed", lambda package: package != "matplotlib")
    report(trainer, scored([1.0, 2.0]), pages(2), "DataPruning", num_shown=1, figure=True)
    assert [path.name for path in folder.glob(f"{STEM}*")] == [f"{STEM}_samples.csv"]


# Which samples.


@pytest.mark.parametrize(
    ("values", "num_shown", "indices", "ranks"),
    [
        ([1.0, 3.0, 2.0, 0.0], 1, [1, 3], [0, 3]),
        ([1.0, 3.0, 2.0, 0.0], 9, [1, 2, 0, 3], [0, 1, 2, 3]),
        ([1.0, 3.0, 2.0], 2, [1, 2, 0], [0, 1, 2]),
        ([1.0], 4, [0], [0]),
        ([1.0, nan, 3.0, nan, 0.5], 2, [2, 0, 4], [0, 1, 2]),
        ([1.0, inf, 3.0, inf, -inf], 2, [1, 3, 0, 4], [0, 1, 3, 4]),
        ([2.0, 2.0, 2.0, 2.0], 1, [0, 3], [0, 3]),
    ],
)
def test_hardest_and_easiest(
    trainer: pl.Trainer, folder: Path, values: list[float], num_shown: int, indices: list[int], ranks: list[int]
) -> None:
    report(trainer, scored(values), pages(len(values)), "DataPruning", num_shown, figure=False)
    table = folder / f"{STEM}_samples.csv"
    assert column(table, "index") == [str(index) for index in indices]
    assert column(table, "rank") == [str(rank) for rank in ranks]


def test_equal_scores_stay_in_order(trainer: pl.Trainer, folder: Path) -> None:
    values = torch.arange(1000) % 2
    report(trainer, scored(values), pages(1000), "DataPruning", num_shown=3, figure=False)
    assert column(folder / f"{STEM}_samples.csv", "index") == ["1", "3", "5", "994", "996", "998"]


def test_few_samples_are_shared_between_the_hardest_and_the_easiest(trainer: pl.Trainer, folder: Path) -> None:
    report(trainer, scored([1.0, 3.0, 2.0]), pages(3), "DataPruning", num_shown=9, figure=False)
    assert column(folder / f"{STEM}_samples.csv", "index") == ["1", "2", "0"]
    few = scored([1.0, 3.0, 2.0])
    groups = _report._samples(few, *_report._most_telling(few, 9), None, dict.fromkeys(range(3), (GREY, "")))
    headings = [text.get_text() for text in draw_samples(groups, "Title").texts[2:]]
    assert headings == ["The hardest samples (2), hardest first", "The easiest samples (1), easiest last"]


def test_no_sample_has_a_score(trainer: pl.Trainer, folder: Path) -> None:
    with pytest.warns(UserWarning, match="shows no samples, because none of the 2 samples has a score"):
        report(trainer, scored([nan, nan]), pages(2), "DataPruning", num_shown=1, figure=True)
    assert [path.name for path in folder.glob(f"{STEM}*")] == [f"{STEM}_scores.png"]


def test_label_errors_are_listed_and_counted(trainer: pl.Trainer, folder: Path) -> None:
    labels, answers = [0, 1, 1, 1, -1, 0, 1, 2], [0, 2, 0, 2, 1, -1, 2, 1]
    found = scored([0.1, 0.5, 0.9, 0.2, 0.8, 0.7, nan, 0.0], labels=labels, predictions=answers)
    tokens = [([7, index], label) for index, label in enumerate(labels)]
    named = Named(tokens, ["cat", "dog", "dog"])  # names need not differ
    _report.report_scores(trainer, found, named, DataPruning(), 1, False, lambda item: f"text {item[0][1]}")
    rows = rows_of(folder / f"{STEM}_label_errors.csv")
    assert (
        [row["index"] for row in rows] == ["2", "1", "3", "7"] == [str(index) for index in found.label_errors.tolist()]
    )
    assert [(row["label"], row["suggested"]) for row in rows] == [("dog", "cat"), *[("dog", "dog")] * 3]
    assert [row["input"] for row in rows] == ["text 2", "", "", "text 7"]
    pairs = rows_of(folder / f"{STEM}_label_pairs.csv")
    assert [tuple(row.values()) for row in pairs] == [("dog", "dog", "2"), ("dog", "cat", "1"), ("dog", "dog", "1")]


@pytest.mark.parametrize(
    "found", [scored([1.0, 2.0], labels=[0, 1]), scored([1.0, 2.0], labels=[0, 1], predictions=[0, 1])]
)
def test_no_label_errors(found: ScoredSet, trainer: pl.Trainer, folder: Path) -> None:
    report(trainer, found, pages(2), "DataPruning", num_shown=0, figure=False)
    assert not list(folder.glob("*label*"))


def test_classes_are_named_where_names_are_known(trainer: pl.Trainer, folder: Path) -> None:
    found = scored([4.0, 3.0, 2.0, 1.0], labels=[0, 1, -1, 2], predictions=[-1, 1, 0, 0])
    report(trainer, found, pages(4), "DataPruning", 2, False, names=["cat", "dog"])
    assert column(folder / f"{STEM}_samples.csv", "label") == ["cat", "dog", "", "2"]
    assert column(folder / f"{STEM}_samples.csv", "prediction") == ["", "dog", "cat", "cat"]


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        (Named(pages(2), ["cat", "dog"]), ["cat", "dog"]),
        (Named(pages(2), [("tench", "Tinca tinca"), ("goldfish",)]), ["tench, Tinca tinca", "goldfish"]),
        (Subset(Subset(Named(pages(2), ("cat", "dog")), [0, 1]), [1]), ["cat", "dog"]),
        (
            ConcatDataset([Named(pages(2), ["cat", "dog"]), Subset(Named(pages(2), ["cat", "dog"]), [0])]),
            ["cat", "dog"],
        ),
        (ConcatDataset([Named(pages(2), ["cat", "dog"]), Named(pages(2), ["dog", "cat"])]), None),
        (ConcatDataset([Named(pages(2), ["cat", "dog"]), pages(2)]), None),
        (Named(pages(2), 2), None),
        (pages(2), None),
        (None, None),
    ],
)
def test_names_of_classes_are_those_of_the_data_set(dataset: Any, names: list[str] | None) -> None:
    assert class_names_of(dataset) == names


def test_names_that_cannot_be_read_do_not_stop_the_rest(trainer: pl.Trainer, folder: Path) -> None:
    class Lazy(Dataset[Any]):
        @property
        def classes(self) -> Any:
            raise OSError("no file classes.txt")

        def __getitem__(self, index: int) -> Any:
            return pages(2)[index]

    with pytest.warns(UserWarning, match="the list of class names could not be created: OSError: no file classes.txt"):
        report(trainer, scored([4.0, 3.0], labels=[0, 1]), Lazy(), "DataPruning", num_shown=1, figure=False)
    assert column(folder / f"{STEM}_samples.csv", "label") == ["0", "1"]


def test_of_a_million_samples_only_those_shown_are_read(trainer: pl.Trainer, folder: Path) -> None:
    read: list[int] = []

    class Huge(Dataset[Any]):
        def __getitem__(self, index: int) -> Tensor:
            read.append(index)
            assert type(index) is int
            return torch.rand(8, 8)

    values = torch.arange(10**6, dtype=torch.float64)
    found = ScoredSet("el2n", 5, values, torch.arange(5 * 10**5, 10**6), torch.arange(10**6) % 1000)
    report(trainer, found, Huge(), "DataPruning", num_shown=2, figure=True)
    assert read == [999999, 999998, 1, 0]
    assert column(folder / f"{STEM}_samples.csv", "kept") == ["True", "True", "False", "False"]


class Unreadable(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        raise OSError(f"no file {index}.jpg")


class HalfReadable(Unreadable):
    def __getitem__(self, index: int) -> Any:
        return pages(4)[index] if index % 2 else super().__getitem__(index)


def test_unreadable_samples_are_warned_of_once_and_still_named(trainer: pl.Trainer, folder: Path) -> None:
    with pytest.warns(UserWarning, match="DataPruning: 2 of 4 samples") as warned:
        report(trainer, scored([4.0, 3.0, 2.0, 1.0]), HalfReadable(), "DataPruning", num_shown=2, figure=True)
    assert len(warned) == 1
    assert str(warned[0].message).endswith("cannot be shown. The first is sample 0: OSError: no file 0.jpg")
    assert column(folder / f"{STEM}_samples.csv", "input")[::2] == ["not readable (OSError)"] * 2
    assert (folder / f"{STEM}_samples.png").exists()


def test_what_cannot_be_drawn_does_not_stop_the_rest(
    trainer: pl.Trainer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise MemoryError("too large")

    for name in ("draw_scores", "draw_samples"):
        monkeypatch.setattr(_report, name, broken)
    with pytest.warns(UserWarning, match="could not be created: MemoryError: too large") as warned:
        report(trainer, scored([4.0, 3.0]), pages(2), "DataPruning", num_shown=1, figure=True)
    assert len(warned) == 2
    assert [path.name for path in folder.glob(f"{STEM}*")] == [f"{STEM}_samples.csv"]


def test_labels_of_another_length_do_not_stop_a_training(trainer: pl.Trainer, folder: Path) -> None:
    with pytest.warns(UserWarning, match="the report of samples could not be created: IndexError"):
        report(trainer, scored([4.0, 3.0], labels=[1]), pages(2), "DataPruning", num_shown=1, figure=False)
    assert list(folder.iterdir()) == []


def test_random_streams_stay_where_they_are(trainer: pl.Trainer, folder: Path) -> None:
    class Augmenting(Dataset[Any]):
        def __getitem__(self, index: int) -> Any:
            if random.random() + np.random.rand() > 9 or index == 1:
                raise ValueError("drawn and failed")
            return torch.rand(8, 8)

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with pytest.warns(UserWarning, match="drawn and failed"):
        report(trainer, scored([4.0, 3.0]), Augmenting(), "DataPruning", num_shown=1, figure=True)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


# What an item looks like.

RAMP = np.arange(30).reshape(5, 6) * 255 / 29  # what every picture of 5 x 6 rising values is
GREY = np.rint(RAMP).astype(np.uint8)
COLOR = np.stack([np.arange(30).reshape(5, 6) * 3 + channel for channel in range(3)])  # (3, 5, 6), from 0 to 89


@pytest.mark.parametrize(
    "item",
    [
        torch.arange(30.0).reshape(5, 6),
        torch.arange(30.0).reshape(1, 5, 6) - 4,
        torch.arange(30.0).reshape(1, 1, 5, 6).bfloat16() * 0.5,
        np.arange(30).reshape(5, 6, 1),
        {"label": torch.tensor(3), "image": torch.arange(30.0, requires_grad=True).reshape(1, 5, 6)},
        (3, [torch.arange(30, dtype=torch.uint8).reshape(5, 6), "a name"]),
        Image.fromarray(GREY),
    ],
    ids=["(H, W)", "(1, H, W)", "bfloat16", "(H, W, 1)", "dict", "nested", "PIL"],
)
def test_grey_pictures(item: Any) -> None:
    picture, _ = view_of(item)
    assert picture is not None
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, GREY)


@pytest.mark.parametrize(
    "item",
    [
        torch.tensor(COLOR),
        COLOR.transpose(1, 2, 0) / 1000,
        np.concatenate([COLOR, np.full((1, 5, 6), 40)]),
        np.concatenate([COLOR, np.full((1, 5, 6), 40)]).transpose(1, 2, 0),
    ],
    ids=["(3, H, W)", "(H, W, 3)", "(4, H, W)", "(H, W, 4)"],
)
def test_color_pictures(item: Any) -> None:
    picture, _ = view_of(item)
    assert picture is not None
    assert np.array_equal(picture, np.rint(COLOR.transpose(1, 2, 0) * 255 / 89))


def test_pil_pictures_of_bytes_keep_their_values() -> None:
    pale = np.full((8, 9, 3), 200, np.uint8)
    pale[0, 0] = 190
    for image in (Image.fromarray(pale), Image.fromarray(pale).convert("RGBA")):
        picture, text = view_of((image, 0))
        assert np.array_equal(picture, pale)
        assert text == "9 x 8 pixels"
    palette, _ = view_of(Image.fromarray(pale).convert("P"))
    assert palette.shape == pale.shape
    deep, _ = view_of(Image.fromarray((np.arange(30).reshape(5, 6) * 1000).astype(np.uint16)))
    assert np.array_equal(deep, GREY)


def test_values_that_are_no_numbers_do_not_spoil_a_picture() -> None:
    values = torch.arange(30.0).reshape(5, 6)
    values[0, 1], values[0, 2] = nan, inf
    picture, _ = view_of(values)
    expected = GREY.copy()
    expected[0, 1:3] = 0, 255
    assert np.array_equal(picture, expected)
    assert (view_of(torch.full((8, 8), nan))[0] == 0).all()
    assert (view_of(torch.full((8, 8), 7.0))[0] == 0).all()


def test_large_pictures_are_made_smaller_by_means() -> None:
    checks = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(192, 96)
    picture, _ = view_of(checks)
    assert picture.shape == (192, 96)
    assert set(np.unique(picture)) <= {127, 128}
    assert view_of(torch.rand(3, 384, 2000))[0].shape == (37, 192, 3)


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("a  line\nand <another>", "a line and <another>"),
        ("half a pair \ud800", "half a pair ?"),
        (("x" * 700, 1), "x" * 597 + "..."),
        ({"input_ids": [101, 7, 102], "label": 1}, "ids 101 7 102"),
        (torch.arange(50)[None], "ids " + " ".join(map(str, range(40))) + " ... (50)"),
        (torch.rand(64), "shape (64,)"),
        ((torch.rand(2, 64, 64), 1), "shape (2, 64, 64)"),
        (torch.rand(4, 3, 8, 8), "shape (4, 3, 8, 8)"),
        (torch.rand(2, 100), "shape (2, 100)"),
        (np.array(["a", "b"]), "shape (2,)"),
        (torch.zeros(8, 8, dtype=torch.complex64), "shape (8, 8)"),
        ((3, 4.0), "a tuple"),
        (None, "a NoneType"),
        ([], "a list"),
    ],
)
def test_other_inputs_are_words(item: Any, text: str) -> None:
    assert view_of(item) == (None, text)


# The figure of the scores.


def bars(axis: Any) -> dict[str, list[float]]:
    """Return the heights of the bars by the name of their kind."""
    return {bars.get_label().split(":")[0]: [bar.get_height() for bar in bars] for bars in axis.containers}


def legend(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def rendered(figure: Any) -> Any:
    figure.savefig(io.BytesIO(), format="png")
    return figure


def test_histogram_counts_kept_and_pruned() -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)).double()
    kept = values.argsort()[:300].sort().values
    axis = rendered(draw_scores(scored(values, kept), "Title", None)).axes[0]
    (inner, outer), edges = bars(axis).values(), [bar.get_x() for bar in axis.containers[0]]
    edges.append(edges[-1] + axis.containers[0][-1].get_width())
    assert inner == np.histogram(values[kept], edges)[0].tolist()
    assert np.add(inner, outer).tolist() == np.histogram(values, edges)[0].tolist()
    assert sum(inner) == 300
    assert sum(outer) == 700
    assert [bar.get_y() for bar in axis.containers[1]] == inner  # pruned stands on kept
    assert legend(axis) == ["kept: 300", "pruned: 700", f"cut at {values[kept].max():.4g}"]


VALUES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("values", "kept", "cuts"),
    [
        (VALUES, None, []),
        (VALUES, [3, 4, 5], [0.4]),
        (VALUES, [0, 1], [0.2]),
        (VALUES, [2, 3], [0.3, 0.4]),
        (VALUES, [0, 3], []),
        ([0.3, 0.3, 0.3, 0.4], [2, 3], [0.3]),
        ([0.3, 0.3, 0.3], [2], []),
        ([0.1, nan, 0.3, inf], [1, 2, 3], [0.3]),
        ([0.1, 0.2, inf], [2], []),
        ([nan, nan, 0.3], [0], []),
    ],
)
def test_cut_is_drawn_where_the_kept_scores_are_an_interval(
    values: list[float], kept: list[int] | None, cuts: list[float]
) -> None:
    axis = rendered(draw_scores(scored(values, kept), "Title", None)).axes[0]
    assert [line.get_xdata()[0] for line in axis.lines] == cuts


def test_infinite_scores_have_a_bin_at_the_end_and_missing_ones_are_counted() -> None:
    found = scored([0.0, 1.0, 1.0, 3.0, inf, inf, nan], kept=[4, 6], name="forgetting")
    axis = rendered(draw_scores(found, "Title", None)).axes[0]
    assert bars(axis) == {"kept": [0, 0, 0, 0, 1], "pruned": [1, 2, 0, 1, 1]}
    last, before = axis.containers[0][-1], axis.containers[0][-2]
    assert last.get_x() > before.get_x() + before.get_width()
    center = last.get_x() + last.get_width() / 2
    assert dict(zip(axis.get_xticks(), map(str, legend_of_ticks(axis)), strict=True))[center] == "inf"
    assert axis.get_xlabel().splitlines() == [
        "forgetting score, higher is harder",
        "samples with an infinite score (never learned), in a bin at the end: 2",
        "samples without a score, not drawn: 1",
    ]


def legend_of_ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_xticklabels()]


def test_long_tails_have_a_logarithmic_axis_and_lose_no_sample() -> None:
    values = torch.logspace(-4, 1, 500, dtype=torch.float64)
    values[0], values[-1] = 1.64e-05, 16.37  # the powers of their logarithms are larger and smaller than they
    axis = rendered(draw_scores(scored([*values.tolist(), inf, -inf], kept=range(250, 501)), "Title", None)).axes[0]
    assert axis.get_xscale() == "log"
    assert {name: sum(heights) for name, heights in bars(axis).items()} == {"kept": 251, "pruned": 251}
    assert bars(axis)["pruned"][-2:] == [1, 0]
    assert bars(axis)["kept"][-2:] == [0, 1]


@pytest.mark.parametrize("values", [[0.0] * 5, [2.5] * 5, [-1e-9] * 5, [nan] * 5, [inf] * 5, [1e300, 1e300]])
def test_constant_scores_are_drawn(values: list[float]) -> None:
    axis = rendered(draw_scores(scored(values, kept=[0]), "Title", None)).axes[0]
    drawn = sum(map(sum, bars(axis).values()))
    assert drawn == sum(not math.isnan(value) for value in values)


def test_kept_share_of_each_class() -> None:
    labels = [-1, 2, 2, 2, 2, 5, 5, -1]
    figure = rendered(draw_scores(scored(range(8), [0, 1, 5, 6], labels), "Title", ["a", "b", "c $x_"]))
    axis = figure.axes[1]
    assert [bar.get_height() for bar in axis.containers[0]] == [0.25, 1.0]
    assert legend_of_ticks(axis) == ["c $x_", "5"]
    assert [line.get_ydata()[0] for line in axis.lines] == [0.5]
    assert legend(axis) == ["all classes: 50.0% kept"]


def test_many_classes_are_a_sorted_curve() -> None:
    labels = torch.arange(400) % 40
    kept = [index for index in range(400) if index // 40 < (index % 40) / 4]  # of class c, ceil(c / 4) of ten
    axis = rendered(draw_scores(scored(range(400), kept, labels), "Title", None)).axes[1]
    (curve,) = axis.patches
    assert curve.get_data().values == pytest.approx([math.ceil(number / 4) / 10 for number in range(40)])
    assert axis.get_xlabel() == "40 classes, sorted: from 0 (0% kept) to 39 (100% kept)"


@pytest.mark.parametrize(
    "found", [scored(range(4), [1]), scored(range(4), labels=[0, 1, 0, 1]), scored(range(4), [1], labels=[-1] * 4)]
)
def test_classes_are_drawn_only_if_known_and_pruned(found: ScoredSet) -> None:
    assert len(draw_scores(found, "Title", None).axes) == 1


# The figure of the samples.


def sample(index: int = 0, **changes: Any) -> Sample:
    given = {"rank": 0, "score": 0.5, "label": 1, "prediction": 2, "wrong": True, "kept": True}
    return Sample(index=index, **{**given, "picture": GREY, "text": "in words", **changes})


def test_captions_mark_wrong_predictions_by_sign_and_color() -> None:
    right = sample(8, prediction=1, wrong=False, score=12.3456)
    figure = rendered(draw_samples(([sample(7, label="$\\frac")], [right]), "Title $"))
    captions = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert captions == [["$\\frac", "✗ 2", "0.5 #7"], ["1", "✓ 1", "12.3 #8"]]
    wrong, good = (axis.texts[1].get_color() for axis in figure.axes)
    assert wrong != good == "black"


def test_captions_do_not_overlap() -> None:
    names = ["a very long name of a class", "GREAT MOUNTAIN GOAT"]
    shown = [sample(9999999, label=names[i % 2], prediction=names[0], score=-1.23456e-05) for i in range(9)]
    figure = rendered(draw_samples((shown, [sample(picture=None, text="word " * 99)]), "Title"))
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for axis in figure.axes for text in axis.texts]
    boxes += [axis.get_window_extent(renderer) for axis in figure.axes[:-1]]
    for place, box in enumerate(boxes):
        assert box.y0 >= 0
        for other in boxes[:place]:
            overlaps = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(overlaps) <= 4  # pixels; a line's box is higher than its letters


def test_figure_has_no_more_samples_than_can_be_drawn() -> None:
    many = [sample(index) for index in range(100)]
    figure = draw_samples((many, many), "Title")
    assert len(figure.axes) == 80
    shown = [int(axis.texts[-1].get_text().split("#")[1]) for axis in figure.axes]
    assert shown == [*range(40), *range(60, 100)]


def test_texts_have_a_table_but_no_figure(trainer: pl.Trainer, folder: Path) -> None:
    dataset = [{"text": f"<review> {index}", "label": 1} for index in range(4)]
    report(trainer, scored([4.0, 3.0, 2.0, 1.0]), dataset, "DataPruning", num_shown=1, figure=True)
    assert not (folder / f"{STEM}_samples.png").exists()
    assert column(folder / f"{STEM}_samples.csv", "input") == ["<review> 0", "<review> 3"]


# Loggers.


def test_tensorboard_has_figures_and_table(tmp_path: Path, digits: tuple[TensorDataset, ScoredSet]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    dataset, found = digits
    logger = TensorBoardLogger(tmp_path, name="board", version=0)
    report(trainer_with(logger), found, dataset, "DataPruning[late]", num_shown=2, figure=True)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["data/late/samples_figure", "data/late/scores_figure"]
    tables = ["label_errors", "label_pairs", "samples"]
    assert sorted(events.Tags()["tensors"]) == [f"data/late/{table}/text_summary" for table in tables]
    text = events.Tensors("data/late/samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines()[0] == "| index | score | rank | label | prediction | kept |"
    assert len(text.splitlines()) == 2 + 4


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbLogger]:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    import wandb

    wandb.teardown()  # of another test's run, whose settings would stay
    yield WandbLogger(project="project", save_dir=tmp_path, version="v1", offline=True)
    wandb.teardown()


def test_wandb_has_figures_and_tables_with_pictures(
    tmp_path: Path, offline: WandbLogger, digits: tuple[TensorDataset, ScoredSet]
) -> None:
    import wandb

    (dataset, found), trainer = digits, trainer_with(offline)
    names = [f"digit {number}" for number in range(10)]
    report(trainer, found, dataset, "DataPruning", num_shown=2, figure=True, names=names)
    mixed = [torch.rand(8, 8), "a text", torch.rand(3, 8, 8), torch.rand(7)]
    report(trainer, scored([4.0, 3.0, 2.0, 1.0], labels=[-1, 0, 1, 2]), mixed, "DataPruning[mixed]", 2, figure=False)
    wandb.finish()
    (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    tables = {name: table for record in parsed(run) for name, table in tables_of(record)}
    assert sorted(tables) == ["data/label_errors", "data/label_pairs", "data/mixed/samples", "data/samples"]
    keys = {key for row in read_history(tmp_path) for key in row}
    assert {"data/samples/path", "data/samples_figure/filenames", "data/scores_figure/filenames"} <= keys

    columns, rows = tables["data/samples"]
    assert columns == ["picture", "index", "score", "rank", "label", "prediction", "kept"]
    written = rows_of(tmp_path / "project" / "v1" / f"{STEM}_samples.csv")
    assert [str(row[1]) for row in rows] == [row["index"] for row in written]
    assert [row[4] for row in rows] == [f"digit {found.labels[row[1]]}" for row in rows]
    for row in rows:
        assert np.array_equal(row[0], view_of(dataset[row[1]])[0])

    columns, rows = tables["data/label_errors"]
    assert columns == ["picture", "index", "label", "suggested", "score"]
    assert [row[1] for row in rows] == found.label_errors.tolist()
    assert [index for index, row in enumerate(rows) if row[0] is not None] == [0, 1]
    assert np.array_equal(rows[0][0], view_of(dataset[rows[0][1]])[0])
    assert sum(row[-1] for row in tables["data/label_pairs"][1]) == len(rows)

    _, rows = tables["data/mixed/samples"]
    assert [None if row[0] is None else row[0].shape for row in rows] == [(8, 8), None, (8, 8, 3), None]
    assert [row[4] for row in rows] == [None, 0, 1, 2]
    assert [row[-1] for row in rows] == ["shape (8, 8)", "a text", "shape (3, 8, 8)", "shape (7,)"]


def pixels_of(cell: Any, local: dict[str, str]) -> Any:
    return np.asarray(Image.open(local[cell["path"]])) if isinstance(cell, dict) else cell


def tables_of(record: Any) -> Iterator[tuple[str, tuple[list[str], list[list[Any]]]]]:
    """Yield the name, the columns and the rows, with pixels, of a table: it is kept as an artifact."""
    local = {content.path: content.local_path for content in record.artifact.manifest.contents}
    for path in local:
        if path.endswith(".table.json"):
            table = json.loads(Path(local[path]).read_text())
            rows = [[pixels_of(cell, local) for cell in row] for row in table["data"]]
            yield path.removesuffix(".table.json"), (table["columns"], rows)
