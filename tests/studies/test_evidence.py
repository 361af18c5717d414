"""The page of evidence: what the files say, with its uncertainty, and nothing else."""

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest

from lightning_grad.callbacks import SAM, NMSparsity, ZClip
from lightning_grad.cli.catalog import techniques
from studies import forest
from studies.arms import PLAIN, Arm, Use
from studies.claim import Paper
from studies.claims import CLAIMS
from studies.evidence import NOT_RUN, ORDER, Row, data_of, rows_about, rows_of, telling
from studies.page import Page, write
from studies.plan import CHOICE_SEED
from studies.results import FOLDER, Origin, Store, line_of
from studies.sources import digest_of
from studies.verdict import CONTRADICTED, HOLDS, NOT_SHOWN, PART, UNDECIDED
from tests.studies.toy import Result, Toy

PAPER = Paper("ZClip, later", "clipping", "It is better.", "A paper (2504.02507)")
UP, DOWN, FLAT = [0.1, 0.12, 0.11, 0.13, 0.1], [-0.1, -0.12, -0.11, -0.13, -0.1], [0.1, -0.1, 0.05, -0.04, 0.0]


@dataclass(frozen=True, kw_only=True)
class OnData(Toy):
    """A claim with data of its own."""

    reads = "a folder with CIFAR-10"
    paper: Any = PAPER
    scale: float = 100
    unit: str = "%"

    @property
    def settings(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "data": self.data.name if self.data else None}


class WithTable(OnData):
    """A claim whose arms are of two techniques."""

    table: ClassVar = {"a": PLAIN, "b": Arm(Use(ZClip)), "c": Arm(Use(NMSparsity, "1:8"))}


def origin(claim: Any, **changes: Any) -> Origin:
    """Return an origin of results by the current code."""
    hardware = {"cpu": "EPYC", "threads": 1, "gpu": None}
    usual = Origin(claim.device, hardware, {"python": "3.11.1", "torch": "2.6"}, digest_of(claim), "0123", dirty=False)
    return replace(usual, **changes)


def fill(
    folder: Path, claim: Any, gains: Mapping[str, Sequence[float]], rate: float | None = None, **changes: Any
) -> None:
    """Write results of a claim: arm a has 0.5 in each seed, and the others so much more."""
    for seed in range(max(map(len, gains.values()), default=0)):
        values = {"a": 0.5, **{arm: 0.5 + own[seed] for arm, own in gains.items() if seed < len(own)}}
        for arm, value in values.items():
            result = Result(arm, seed, rate, value, [])
            Store(folder).append(claim, line_of(claim, result, 2.0, origin(claim, **changes)))


def page_of(folder: Path, *claims: Any) -> Page:
    """Return the page of some claims."""
    return Page(rows_of(claims, Store(folder)), "docs/", "", lambda family: f"The {family}")


def claims(**settings: Any) -> dict[str, OnData]:
    """Return claims by name, one for each verdict."""
    arms: dict[str, Any] = {"all": ("a", "b"), "some": ("a", "b", "c"), "worse": ("a", "b", "c"), "flat": ("a", "b")}
    arms |= {"few": ("a", "b"), "none": ("a", "b")}
    return {name: OnData(name=name, arms=own, text=f"Text of {name}.", **settings) for name, own in arms.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with results of each verdict."""
    made = claims()
    fill(tmp_path, made["all"], {"b": UP})
    fill(tmp_path, made["some"], {"b": UP, "c": DOWN})
    fill(tmp_path, made["worse"], {"b": FLAT, "c": DOWN})
    fill(tmp_path, made["flat"], {"b": FLAT})
    fill(tmp_path, made["few"], {"b": UP[:3]})
    return tmp_path


def test_rows_are_sorted_by_verdict(folder: Path) -> None:
    rows = rows_of(reversed(claims().values()), Store(folder))
    words = {row.claim.name: row.word for row in rows}
    assert words == {
        "all": HOLDS,
        "some": PART,
        "worse": CONTRADICTED,
        "flat": NOT_SHOWN,
        "few": "undecided (3 of 5 seeds)",
        "none": NOT_RUN,
    }
    assert list(words) == ["all", "some", "worse", "flat", "few", "none"]
    assert tuple(row.group for row in rows) == ORDER


def test_numbers_are_those_of_the_lines(folder: Path) -> None:
    text = str(page_of(folder, *claims().values()))
    half = 2.7764451 * statistics.stdev(UP) / math.sqrt(5)
    mean, low, high = (100 * (statistics.mean(UP) + part) for part in (0, -half, half))
    assert f"`b` against `a`: **+{mean:.1f}** (+{low:.1f} to +{high:.1f}), n = 5" in text
    assert "in points of accuracy, on digits" in text
    assert "Of 6 claims, 1 holds, 1 holds in part, 1 is contradicted, 1 is not shown." in flat(text)
    assert "(1 of 2 comparisons is contradicted; digits, points: worst `c` against `a` \N{MINUS SIGN}11." in flat(text)


def flat(text: str) -> str:
    """Return a text without its line breaks."""
    return " ".join(text.split())


def test_page_begins_with_the_verdicts_and_ends_with_how_to_trace_them(folder: Path) -> None:
    text = str(page_of(folder, *claims().values()))
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert titles == ["Does it help?", "All claims", "The clipping", "Method", "From a row to its trainings"]
    first = text.partition("## All claims")[0]
    groups = ["**Holds.**", "**Holds in part.**", "**Contradicted.**", "**Not shown.**", "**Seeds are missing.**"]
    assert sorted(groups, key=first.index) == groups
    assert "**Seeds are missing.** `few` (3 of 5 seeds)." in first
    assert "**Not run yet.** 1 claim, named below with their families." in first
    table = text.partition("## All claims")[2].partition("## The clipping")[0]
    assert "[`ZClip`](docs/clipping/zclip.md), later" in table
    assert "It is better ([A paper (2504.02507)](https://arxiv.org/abs/2504.02507)).<br>Tested: Text of all." in table
    assert "none" not in table, "what has not run is named with its family"
    assert "Not run yet: `none`." in text.partition("## The clipping")[2]


def test_known_data_comes_first_and_the_rest_is_named(tmp_path: Path) -> None:
    usual, known = OnData(name="x"), OnData(name="x", data=Path("data"))
    fill(tmp_path, usual, {"b": DOWN})
    fill(tmp_path, known, {"b": UP})
    page = page_of(tmp_path, usual)
    assert [(row.data, row.word) for row in page.rows] == [("CIFAR-10", HOLDS), ("digits", CONTRADICTED)]
    assert [row.command for row in page.rows] == [
        "python -m studies --only x --data FOLDER",
        "python -m studies --only x",
    ]
    assert "**On small data that needs no download.** 1 is contradicted; see the [table](#all-claims)." in flat(
        str(page)
    )
    assert "| [`ZClip`](docs/clipping/zclip.md) | 1 holds | 1 is contradicted |" in str(page)


def test_failed_trainings_are_counted(tmp_path: Path) -> None:
    nan = math.nan
    theirs, ours, both = (OnData(name=name) for name in ("theirs", "ours", "both"))
    fill(tmp_path, theirs, {"b": UP, "a": [0, 0, nan, 0, 0]})
    fill(tmp_path, ours, {"b": [nan, 0.1, nan, 0.2, 0.1]})
    fill(tmp_path, both, {"b": [nan, *UP[1:]], "a": [nan, 0, 0, 0, 0]})
    page = page_of(tmp_path, theirs, ours, both)
    words = {row.claim.name: row.word for row in page.rows}
    assert words == {"theirs": HOLDS, "ours": NOT_SHOWN, "both": "undecided (4 of 5 seeds)"}
    text = str(page)
    assert "the other one fails in 1 of 5 seeds, in the others +10.00 to +13.00, n = 5" in text
    assert "it fails in 2 of 5 seeds, in the others +10.00 to +20.00, n = 5" in text
    assert "nan" not in text.replace("ends in nan", "")
    assert "inf" not in re.sub(r"\w*(inform|infin)\w*", "", text)
    assert "one of the two fails in 2 of 5 seeds" in page.figures()["evidence_clipping.svg"]


def test_other_machines_and_other_code_are_told(tmp_path: Path) -> None:
    claim = OnData(name="x")
    fill(tmp_path, claim, {"b": UP[:3]})
    text = flat(str(page_of(tmp_path, claim)))
    assert "6 trainings on EPYC (1 thread), python 3.11.1, torch 2.6. No GPU was at hand." in text
    assert "6 have the digest of the current code. " in text
    later: Any = {
        "hardware": {"cpu": "Xeon", "threads": 4, "gpu": None},
        "code": "old",
        "commit": "9876",
        "dirty": True,
    }
    for seed in (3, 4):
        for arm, value in (("a", 0.5), ("b", 0.6)):
            Store(tmp_path).append(
                claim, line_of(claim, Result(arm, seed, None, value, []), 1.0, origin(claim, **later))
            )
    text = flat(str(page_of(tmp_path, claim)))
    assert "6 trainings on EPYC (1 thread), python 3.11.1, torch 2.6; 4 trainings on Xeon (4 threads)" in text
    assert "Its trainings are of 2 machines." in text
    assert "at 2 commits, 4 of them with changes that were not committed" in text
    assert "6 have the digest of the current code. " in text
    assert "digit for digit; for 4, it was not (`x`)." in text
    assert "**holds**<br>(4 of 10 trainings by other code)" in text


def test_results_of_older_code_stand_if_the_current_code_repeats_one_of_each_arm(tmp_path: Path) -> None:
    claim = OnData(name="x")
    fill(tmp_path, claim, {"b": UP}, code="old")
    assert len(page_of(tmp_path, claim).rows[0].old) == 10
    again(tmp_path, claim, a=0.5, b=0.5 + UP[0] + 1e-9)
    assert {line.arm for line in page_of(tmp_path, claim).rows[0].old} == {"b"}, (
        "b gives other numbers, though by little"
    )
    again(tmp_path, claim, b=0.5 + UP[0])
    assert {line.arm for line in page_of(tmp_path, claim).rows[0].old} == {"b"}, "what differed once does not stand"


def test_a_repetition_on_another_machine_says_nothing(tmp_path: Path) -> None:
    claim = OnData(name="x")
    fill(tmp_path, claim, {"b": UP}, code="old")
    again(tmp_path, claim, a=0.5, hardware={"cpu": "Xeon", "threads": 1, "gpu": None})
    assert len(page_of(tmp_path, claim).rows[0].old) == 9, "all but the new one"
    again(tmp_path, claim, a=0.5, b=0.5 + UP[0])
    text = flat(str(page_of(tmp_path, claim)))
    assert "2 have the digest of the current code" in text
    assert "For 8 of them" in text
    assert "other code" not in text


def again(folder: Path, claim: Any, /, hardware: Any = None, **values: float) -> None:
    """Write results of the first seed by the current code."""
    place = origin(claim, **({"hardware": hardware} if hardware else {}))
    for arm, value in values.items():
        Store(folder).append(claim, line_of(claim, Result(arm, 0, None, value, []), 2.0, place))


def test_a_gpu_is_told(tmp_path: Path) -> None:
    claim = OnData(name="x", device="cuda")
    fill(tmp_path, claim, {"b": UP}, hardware={"cpu": "EPYC", "threads": 1, "gpu": "H200"})
    page = page_of(tmp_path, replace(claim, device="cpu"))
    assert [(row.device, row.command) for row in page.rows] == [("H200", "python -m studies --only x --device cuda")]
    assert "10 trainings on H200" in flat(str(page))
    assert "No GPU was at hand" not in str(page)


def test_rates_are_those_of_the_choice_and_the_choice_is_no_seed(tmp_path: Path) -> None:
    claim = OnData(name="x", rates=(0.1, 0.2, 0.3))
    for rate, value in ((0.1, 0.1), (0.2, 0.2), (0.3, 0.9)):
        for arm in "ab":
            result = Result(arm, CHOICE_SEED, rate, value, [])
            Store(tmp_path).append(claim, line_of(claim, result, 1.0, origin(claim)))
    fill(tmp_path, claim, {"b": UP}, 0.3)
    fill(tmp_path, claim, {"b": DOWN}, 0.1)
    (row,) = rows_of([claim], Store(tmp_path))
    assert {(line.rate, line.seed) for line in row.lines} == {(0.3, seed) for seed in range(5)}
    assert row.word == HOLDS
    text = str(page_of(tmp_path, claim))
    assert "Rates: 0.1, 0.2, 0.3." in text
    assert "on digits<br>best rate at an end of the grid: all arms |" in text


def test_techniques_of_a_row_are_those_it_names_and_those_of_its_arms() -> None:
    def row(paper: Paper | None, **table: Arm) -> Row:
        made = OnData(name="x", paper=paper, arms=("a", "b"))
        object.__setattr__(made, "table", table)
        return Row(made, [])

    clipped, sparse = Use(ZClip), Use(NMSparsity, "1:8")
    assert row(PAPER).techniques == [ZClip]
    assert row(None, a=PLAIN, b=Arm(sparse)).techniques == [NMSparsity]
    assert row(None, a=Arm(clipped), b=Arm(sparse, clipped)).techniques == [NMSparsity], "both arms have the other one"
    assert row(PAPER, a=PLAIN, b=Arm(sparse)).techniques == [ZClip, NMSparsity]
    assert row(None, a=Arm(clipped), b=Arm(sparse)).techniques == [NMSparsity], "the other one is the reference"
    assert row(None).techniques == []


def test_numbers_have_two_digits_of_the_narrowest_interval(tmp_path: Path) -> None:
    claim = OnData(name="x", arms=("a", "b", "c"), scale=1.0, unit="nats", metric="accuracy")
    fill(tmp_path, claim, {"b": [each / 100 for each in UP], "c": UP})
    text = str(page_of(tmp_path, claim))
    assert "**+0.0011** (+0.0010 to +0.0013)" in text
    assert re.search(r"\*\*\+0\.1120\*\* \(\+0\.09\d\d to \+0\.12\d\d\)", text)
    assert "in nats of accuracy" in text


def test_results_without_a_chosen_rate_are_not_nothing(tmp_path: Path) -> None:
    claim = OnData(name="x", rates=(0.1, 0.2))
    fill(tmp_path, claim, {"b": UP}, rate=0.1)
    page = page_of(tmp_path, claim)
    assert [row.word for row in page.rows] == ["undecided (0 of 5 seeds)"]
    assert not page.figures(), "an axis without a difference says nothing"
    assert "`x` (0 of 5 seeds)" in str(page)


def test_the_quoted_comparison_supports_the_verdict_least(tmp_path: Path) -> None:
    nearly = [0.1, 0.3, 0.1, 0.4, -0.1]
    for name, gains in (("unclear", {"b": FLAT, "c": nearly}), ("sure", {"b": UP, "c": [2 * each for each in UP]})):
        claim = OnData(name=name, arms=("a", "b", "c"))
        fill(tmp_path, claim, gains)
        (row,) = page_of(tmp_path, claim).rows
        assert (row.word, row.weakest.arm) == ((NOT_SHOWN, "c") if name == "unclear" else (HOLDS, "b"))


def test_what_is_contradicted_in_a_part_is_told(folder: Path) -> None:
    text = flat(str(page_of(folder, *claims().values())))
    assert (
        "(1 of 2 comparisons holds, 1 is contradicted; digits, points: worst `c` against `a` \N{MINUS SIGN}11." in text
    )
    assert ", best `b` against `a` +11." in text


def test_a_technique_is_judged_by_its_own_comparisons(tmp_path: Path) -> None:
    claim = WithTable(name="x", arms=("a", "b", "c"))
    fill(tmp_path, claim, {"b": UP, "c": DOWN})
    (row,) = page_of(tmp_path, claim).rows
    assert row.word == PART
    assert [[own.word for own in rows_about(each, [row])] for each in (ZClip, NMSparsity)] == [[HOLDS], [CONTRADICTED]]
    assert rows_about(SAM, [row]) == []
    text = str(page_of(tmp_path, claim))
    assert "| [`ZClip`](docs/clipping/zclip.md) | - | 1 holds |" in text
    assert "| [`NMSparsity`](docs/sparsity/nm_sparsity.md) | - | 1 is contradicted |" in text


def test_a_claim_without_a_table_is_judged_as_a_whole(folder: Path) -> None:
    (row,) = page_of(folder, claims()["some"]).rows
    assert [own.word for own in rows_about(ZClip, [row])] == [PART]


def test_a_failed_training_is_the_worst(tmp_path: Path) -> None:
    claim = OnData(name="x", arms=("a", "b", "c", "d"))
    fill(tmp_path, claim, {"b": UP, "c": [math.nan, *UP[1:]], "d": [2 * each for each in UP]})
    (row,) = page_of(tmp_path, claim).rows
    assert [each.arm for each in row.extremes] == ["c", "d"]


def test_numbers_of_few_seeds_are_not_shown(folder: Path) -> None:
    table = str(page_of(folder, claims()["few"])).partition("## All claims")[2].partition("## The clipping")[0]
    assert "Text of few. | - | **undecided (3 of 5 seeds)** |" in table


def test_settings_have_units_and_leave_out_what_is_off(tmp_path: Path) -> None:
    claim = replace(CLAIMS["sharpness-images-wrong-labels"], rates=(0.1,))
    result = claim.result("plain", 0, 0.1, 1.0, 0.5, 1.0, 0.5, 8, 10.0)
    Store(tmp_path).append(claim, line_of(claim, result, 30.0, origin(claim)))
    assert "digits, test accuracy, epochs = 8, share of wrong labels = 0.2." in flat(str(page_of(tmp_path, claim)))


def test_an_arm_may_have_a_margin_of_its_own(tmp_path: Path) -> None:
    claim = OnData(name="x", arms=("a", "b", "c"), margins={"c": -0.2})
    fill(tmp_path, claim, {"b": UP, "c": FLAT})
    page = page_of(tmp_path, claim)
    assert [row.word for row in page.rows] == [HOLDS]
    assert "holds above +0.0; `c` above \N{MINUS SIGN}20.0" in str(page)
    assert page.figures()["evidence_clipping.svg"].count("stroke-dasharray") == 1
    assert [row.word for row in page_of(tmp_path, replace(claim, margins={})).rows] == [PART]


def test_processor_time_is_the_mean_of_the_lines(tmp_path: Path) -> None:
    claim = replace(CLAIMS["infobatch-images"], rates=(0.1,), seeds=2)
    for seed in (0, 1):
        for arm in claim.arms:
            result = claim.result(arm, seed, 0.1, 1.0, 0.5, 1.0, 0.5, 8, 10.0 + seed)
            Store(tmp_path).append(claim, line_of(claim, result, 30.0, origin(claim)))
    assert "| `all`: `no callback` | 0.1 | 50.00 ± 0.00 % | 2 | 10.5 s |" in str(page_of(tmp_path, claim))


# The most telling rows.


def test_telling_rows_are_good_and_bad_ones_of_several_families(tmp_path: Path) -> None:
    rows = []
    for number, (gain, family) in enumerate([(UP, "clipping"), (UP, "clipping"), (UP, "sparsity"), (UP, "sharpness")]):
        claim = OnData(name=f"good{number}", paper=replace(PAPER, family=family))
        fill(tmp_path, claim, {"b": [each * (1 + number) for each in gain]})
        rows.append(claim)
    for number, gain in enumerate([DOWN, FLAT, FLAT]):
        claim = OnData(name=f"bad{number}", data=Path("data") if number == 2 else None)
        fill(tmp_path, claim, {"b": gain})
        rows.append(claim)
    found = rows_of(rows, Store(tmp_path))
    names = [row.claim.name for row in telling(found, 5)]
    assert len(names) == 5
    assert {name for name in names if name.startswith("bad")} == {"bad0", "bad2"}, "known data, then the surest"
    assert {"good2", "good3"} <= {*names}, "one of each family before a second one"
    assert names == [row.claim.name for row in found if row.claim.name in names], "in the order of the page"
    assert len(telling(found[:4], 5)) == 4
    assert telling([], 5) == []


# Figures.


def test_figures_are_drawings_of_all_comparisons(folder: Path) -> None:
    page = page_of(folder, *claims().values())
    ((name, text),) = page.figures().items()
    assert name == "evidence_clipping.svg"
    assert text == page_of(folder, *claims().values()).figures()[name]
    root = ElementTree.fromstring(text)
    words = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "all, digits: holds" in words
    assert words.count("b against a") == 5
    dots = [each for each in root.iter("{http://www.w3.org/2000/svg}circle") if each.get("r") == "4"]
    assert len(dots) == 7 + 3, "one for each comparison, and three of the legend"
    assert 'fill="white"' in text, "readable on a dark page"
    width = float(root.get("width", "0"))
    assert all(0 <= float(dot.get("cx", "-1")) <= width for dot in dots)


@pytest.mark.parametrize("values", [[0.0], [-0.3, 0.2], [1e-6, 3e-6], [-2000.0, -1.0], [5.0, 5.0]])
def test_axis_shows_all_values_with_a_few_round_ticks(values: list[float]) -> None:
    axis = forest.Axis(values)
    places = [axis.at(value) for value in values]
    assert all(forest.LABELS < place < forest.WIDTH for place in places)
    assert 2 <= len(axis.ticks) <= 8
    assert all(forest.LABELS <= axis.at(tick) <= forest.WIDTH for tick in axis.ticks)


# Files.


def test_page_is_written_with_its_figures_and_leads_to_them(folder: Path, tmp_path: Path) -> None:
    path = write(page_of(folder, *claims().values()), tmp_path / "new/place")
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text())
    assert images == ["evidence_clipping.svg"]
    assert all((path.parent / image).is_file() for image in images)


def test_pipes_do_not_break_the_table(tmp_path: Path) -> None:
    claim = OnData(name="x", text="a | b")
    fill(tmp_path, claim, {"b": UP})
    assert r"a \| b" in str(page_of(tmp_path, claim))


# The claims of this repository.


def test_every_claim_is_on_the_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, *CLAIMS.values())
    text = str(page)
    assert {row.group for row in page.rows} == {NOT_RUN}
    assert not [name for name in CLAIMS if f"`{name}`" not in text]
    assert not [row.claim.name for row in page.rows if row.family not in techniques()]


def test_papers_name_techniques_and_their_numbers() -> None:
    rows = [Row(claim, []) for claim in CLAIMS.values() if claim.paper]
    assert len(rows) > 20
    assert not [name for name, claim in CLAIMS.items() if not Row(claim, []).techniques], "no card quotes it"
    assert not [row.claim.name for row in rows if not re.search(r"\(\d{4}\.\d{4,5}\)", row.claim.paper.source)]


def test_data_has_a_name() -> None:
    assert data_of(CLAIMS["sparsity"]) == "digits"
    assert data_of(replace(CLAIMS["sparsity"], data=Path("some/folder"))) == "CIFAR-10"
    assert data_of(CLAIMS["clipping-spikes"]) == "sums"
    for name in ("optimizers-characters", "local-steps-characters-2", "local-steps-characters-4"):
        assert data_of(CLAIMS[name]) == "Python sources"
    assert data_of(replace(CLAIMS["clipping-spikes"], data=Path("book.txt"))) == "the text book.txt"
    assert data_of(replace(CLAIMS["optimizers-text"], data=Path("data"))) == "tinyshakespeare"


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.jsonl"))])
def test_each_row_of_the_committed_results_leads_to_its_lines(name: str) -> None:
    assert name in CLAIMS, "the file of a claim that does not exist any more"
    raw = [json.loads(text) for text in (FOLDER / f"{name}.jsonl").read_text().splitlines()]
    rows = rows_of([CLAIMS[name]], Store(FOLDER))
    trained = [(each["arm"], each["rate"], each["seed"], each["date"]) for each in raw]
    for row in rows:
        assert row.lines or row.group in (NOT_RUN, UNDECIDED), "no line has the settings of the claim"
        assert not [line for line in row.lines if (line.arm, line.rate, line.seed, line.date) not in trained]
        assert CHOICE_SEED not in {line.seed for line in row.lines}
    assert sum(len(row.found) for row in rows) > len(raw) / 2 or not any(row.is_decided for row in rows), (
        "most lines have other settings than the claim"
    )
    assert {each["origin"]["commit"] for each in raw} != {"unknown"}
