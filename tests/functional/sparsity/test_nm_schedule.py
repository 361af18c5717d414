"""Which pattern and decay value hold when: against the paper's tables, its code's coefficients, and by counting steps."""

import itertools
import math
from collections import Counter

import pytest

from lightning_grad.functional import RECIPES, NMPattern, NMPhase, NMSchedule
from lightning_grad.functional.sparsity.nm_schedule import (
    DENSE,
    exponential_decay,
    geometric_patterns,
    linear_decay,
    stepwise_patterns,
)
from tests.cases import cases

PATTERNS = ["1:2", "2:4", "1:4", "4:8", "3:8", "1:8", "2:8", "1:16", "3:16", "1:64", "3:5", "4:4", "1:1"]
TARGET = NMPattern(1, 8)
CUSTOM = ((0.25, NMPattern(3, 4)), (0.5, NMPattern(2, 4)), (0.75, NMPattern(1, 4)))


def kept(pattern: str) -> list[int]:
    frames = stepwise_patterns(NMPattern.parse(pattern))
    assert {frame.m for frame in frames} == {NMPattern.parse(pattern).m}
    return [frame.n for frame in frames]


def phases(schedule: NMSchedule, target: NMPattern, steps: int, size: int | None = None) -> list[NMPhase]:
    return [schedule.phase(step / steps, target, steps, size) for step in range(steps + 1)]


def density(phase: NMPhase) -> float:
    """Mean factor of a weight: what is kept, and D of the rest."""
    share = 1.0 if phase.pattern is None else phase.pattern.density
    return share + (1 - share) * phase.decay


# Frames.


@cases(
    ("pattern", "frames"),
    [
        ("1:4", [3, 2, 1]),
        ("1:8", [7, 4, 2, 1]),
        ("1:16", [15, 8, 4, 2, 1]),
        ("1:32", [31, 16, 8, 4, 2, 1]),
        ("1:64", [63, 32, 16, 8, 4, 2, 1]),
        ("2:4", [3, 2]),
        ("2:8", [7, 4, 2]),
    ],
)
def test_stepwise_frames_are_those_of_the_released_code(pattern: str, frames: list[int]) -> None:
    assert kept(pattern) == frames


@pytest.mark.parametrize(
    ("pattern", "frames"),
    [
        ("3:8", [7, 4, 3]),
        ("3:16", [15, 8, 4, 3]),
        ("5:8", [7, 5]),
        ("7:8", [7]),
        ("3:4", [3]),
        ("1:2", [1]),
        ("2:6", [5, 3, 2]),
        ("1:3", [2, 1]),
        ("4:4", [4]),
        ("1:1", [1]),
    ],
)
def test_stepwise_frames_end_at_their_target_whatever_it_is(pattern: str, frames: list[int]) -> None:
    assert kept(pattern) == frames


@pytest.mark.parametrize("pattern", PATTERNS)
def test_stepwise_frames_fall_strictly(pattern: str) -> None:
    frames = kept(pattern)
    assert frames == sorted(set(frames), reverse=True)


@pytest.mark.parametrize(
    ("pattern", "widest", "frames"),
    [
        ("2:4", 8, ["16:32", "8:16", "4:8", "2:4"]),
        ("1:8", 8, ["8:64", "4:32", "2:16", "1:8"]),
        ("3:8", 4, ["12:32", "6:16", "3:8"]),
        ("1:16", 2, ["2:32", "1:16"]),
        ("2:4", 1, ["2:4"]),
    ],
)
def test_geometric_frames_shrink_at_the_same_density(pattern: str, widest: int, frames: list[str]) -> None:
    assert [str(frame) for frame in geometric_patterns(NMPattern.parse(pattern), widest)] == frames


def test_geometric_frames_start_at_eight_by_default() -> None:
    assert geometric_patterns(TARGET) == geometric_patterns(TARGET, 8)


@pytest.mark.parametrize("widest", [0, -2, 3, 6, 12])
def test_widest_group_must_be_a_power_of_two(widest: int) -> None:
    with pytest.raises(ValueError, match=f"a power of two; got {widest}"):
        geometric_patterns(TARGET, widest)
    with pytest.raises(ValueError, match=f"a power of two; got {widest}"):
        NMSchedule("sdgf-geometric", geometric_start=widest)


# Decay.


@pytest.mark.parametrize("position", [0.0, 0.1, 0.25, 0.4999, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("length", [10, 70_000])
def test_default_decays_fit_their_phase(position: float, length: float) -> None:
    assert linear_decay(position, length) == pytest.approx(max(0.0, 1 - 2 * position))
    assert exponential_decay(position, length) == pytest.approx(math.exp(-7 * position))


def test_default_exponential_ends_near_a_thousandth() -> None:
    assert 0.5e-3 < exponential_decay(1.0, 100) < 1.5e-3


@pytest.mark.parametrize(("rate", "zero_at"), [(2e-4, 5000), (8e-4, 1250)])
def test_linear_coefficients_of_the_released_code(rate: float, zero_at: int) -> None:
    length = 10_000
    for step in range(0, length, 250):
        value = linear_decay(step / length, length, rate)
        assert value == pytest.approx(max(0.0, 1 - rate * step))
        assert (value == 0.0) == (step >= zero_at)


def test_exponential_coefficient_of_the_released_code() -> None:
    length = 30_000
    for step in (0, 1, 7000, 29_999):
        assert exponential_decay(step / length, length, 1e-4) == pytest.approx(math.exp(-1e-4 * step))
    assert exponential_decay(1.0, 10 * length, 1e-4) > 0.0


@pytest.mark.parametrize("recipe", ["mdgf-linear", "mdgf-exponential"])
def test_a_rate_counts_optimizer_steps_from_the_end_of_the_dense_phase(recipe: str) -> None:
    schedule = NMSchedule(recipe, dense_fraction=0.2, finetune_fraction=0.3, decay=1e-3)
    for total in (1000, 4000):
        for step in (0, 1, 100, 400):
            found = schedule.phase(0.2 + step / total, TARGET, total).decay
            expected = max(0.0, 1 - 1e-3 * step) if recipe == "mdgf-linear" else math.exp(-1e-3 * step)
            assert found == pytest.approx(expected)


# Phases.


@pytest.mark.parametrize("recipe", ["mdgf-linear", "mdgf-exponential"])
def test_mdgf_phases_at_their_boundaries(recipe: str) -> None:
    schedule = NMSchedule(recipe, dense_fraction=0.1, finetune_fraction=0.2)
    assert schedule.phase(0.0, TARGET, 1000) == DENSE
    assert schedule.phase(0.0999, TARGET, 1000) == DENSE
    assert schedule.phase(0.1, TARGET, 1000) == NMPhase(TARGET, 1.0, False)
    assert 0.99 < schedule.phase(0.101, TARGET, 1000).decay < 1.0
    assert schedule.phase(0.8, TARGET, 1000) == NMPhase(TARGET, 0.0, True)
    last_of_decay = schedule.phase(0.7999, TARGET, 1000)
    if recipe == "mdgf-linear":
        assert last_of_decay == NMPhase(TARGET, 0.0, True)
        assert schedule.phase(0.1 + 0.7 / 4, TARGET, 1000).decay == pytest.approx(0.5)
        assert not schedule.phase(0.4499, TARGET, 1000).final
    else:
        assert 0.0 < last_of_decay.decay < 1e-3
        assert not last_of_decay.final


@pytest.mark.parametrize("recipe", ["ste", "sr-ste", "step"])
def test_fixed_recipes_hold_their_target_from_the_end_of_the_dense_phase(recipe: str) -> None:
    assert NMSchedule(recipe).phase(0.0, TARGET, 10) == NMPhase(TARGET, 0.0, True)
    late = NMSchedule(recipe, dense_fraction=0.2)
    assert late.phase(0.1999, TARGET, 10) == DENSE
    assert late.phase(0.2, TARGET, 10) == NMPhase(TARGET, 0.0, True)


@pytest.mark.parametrize(
    ("dense", "finetune", "steps"), [(0.0, 0.0, 1000), (0.0, 0.2, 100), (0.1, 0.2, 1000), (0.1, 0.1, 500)]
)
@pytest.mark.parametrize("pattern", ["2:4", "1:8", "1:16"])
@pytest.mark.parametrize("recipe", ["sdgf-stepwise", "sdgf-geometric"])
def test_frames_are_equal_to_the_step(recipe: str, pattern: str, dense: float, finetune: float, steps: int) -> None:
    target = NMPattern.parse(pattern)
    frames = stepwise_patterns(target) if recipe == "sdgf-stepwise" else geometric_patterns(target)
    counts = Counter(phase.pattern for phase in phases(NMSchedule(recipe, dense, finetune), target, steps)[:-1])
    length, extra = divmod(round(steps * (1 - dense - finetune)), len(frames))
    assert counts.pop(None, 0) == round(steps * dense)
    assert list(counts) == frames
    counts[target] -= round(steps * finetune)
    assert all(length <= count <= length + bool(extra) for count in counts.values())


def test_frames_follow_one_another_at_hand_worked_shares() -> None:
    schedule = NMSchedule("sdgf-stepwise", dense_fraction=0.2, finetune_fraction=0.4)
    shown = {p: str(schedule.phase(p, TARGET, 100).pattern) for p in (0.19, 0.2, 0.29, 0.3, 0.39, 0.4, 0.49, 0.5, 0.6)}
    assert list(shown.values()) == ["None", "7:8", "7:8", "4:8", "4:8", "2:8", "2:8", "1:8", "1:8"]
    assert [schedule.phase(p, TARGET, 100).final for p in (0.49, 0.5, 0.99)] == [False, True, True]
    assert all(schedule.phase(p, TARGET, 100).decay == 0.0 for p in (0.2, 0.5, 1.0))


@cases("pattern", PATTERNS)
@cases("recipe", RECIPES)
def test_run_ends_exactly_at_its_target(recipe: str, pattern: str) -> None:
    target = NMPattern.parse(pattern)
    for dense, finetune in ((0.0, 0.0), (0.1, 0.2), (0.7, 0.0), (0.0, 0.9), (0.33, 0.66)):
        assert NMSchedule(recipe, dense, finetune).phase(1.0, target, 77) == NMPhase(target, 0.0, True)


@cases(("dense", "finetune"), [(0.0, 0.0), (0.1, 0.2)])
@cases("pattern", PATTERNS)
@cases("recipe", RECIPES)
def test_density_never_rises_and_final_stays_final(recipe: str, pattern: str, dense: float, finetune: float) -> None:
    run = phases(NMSchedule(recipe, dense, finetune), NMPattern.parse(pattern), 97)
    densities = [density(phase) for phase in run]
    assert all(later <= earlier for earlier, later in itertools.pairwise(densities))
    finals = [phase.final for phase in run]
    assert finals == sorted(finals)
    assert all(phase.pattern == NMPattern.parse(pattern) and phase.decay == 0.0 for phase in run if phase.final)


@pytest.mark.parametrize(
    ("size", "frames"),
    [
        (None, ["16:32", "8:16", "4:8", "2:4"]),
        (64, ["16:32", "8:16", "4:8", "2:4"]),
        (48, ["8:16", "4:8", "2:4"]),
        (24, ["4:8", "2:4"]),
        (12, ["2:4"]),
    ],
)
def test_frames_whose_groups_do_not_divide_a_layer_are_passed_over(size: int | None, frames: list[str]) -> None:
    run = phases(NMSchedule("sdgf-geometric"), NMPattern(2, 4), 120, size)[:-1]
    counts = Counter(str(phase.pattern) for phase in run)
    assert list(counts) == frames
    assert set(counts.values()) == {120 // len(frames)}
    assert all(phase.final == (str(phase.pattern) == "2:4") for phase in run)


# Stages of one's own.


def test_custom_stages_hold_from_their_share_on() -> None:
    schedule = NMSchedule(CUSTOM)
    shown = [str(schedule.phase(p, TARGET, 100).pattern) for p in (0.0, 0.249, 0.25, 0.499, 0.5, 0.749, 0.75, 1.0)]
    assert shown == ["None", "None", "3:4", "3:4", "2:4", "2:4", "1:4", "1:4"]
    assert schedule.phase(0.0, TARGET, 100) == DENSE
    assert schedule.phase(0.5, TARGET, 100) == NMPhase(NMPattern(2, 4), 0.0, False)
    assert schedule.phase(1.0, TARGET, 100) == NMPhase(NMPattern(1, 4), 0.0, True)


def test_custom_stage_whose_groups_do_not_divide_a_layer_is_passed_over() -> None:
    schedule = NMSchedule(((0.0, NMPattern(3, 4)), (0.3, NMPattern(8, 16)), (0.6, NMPattern(2, 4))))
    at_half = {size: str(schedule.phase(0.5, TARGET, 10, size).pattern) for size in (None, 32, 12)}
    assert at_half == {None: "8:16", 32: "8:16", 12: "3:4"}


def test_stage_that_returns_later_is_final_only_the_last_time() -> None:
    schedule = NMSchedule(((0.0, NMPattern(2, 4)), (0.3, NMPattern(1, 4)), (0.6, NMPattern(2, 4))))
    found = [schedule.phase(p, NMPattern(2, 4), 10) for p in (0.1, 0.4, 0.7)]
    assert [(str(phase.pattern), phase.final) for phase in found] == [("2:4", False), ("1:4", False), ("2:4", True)]


def test_schedule_may_be_a_dictionary_key() -> None:
    assert len({NMSchedule(CUSTOM), NMSchedule(CUSTOM), NMSchedule("ste")}) == 2


# Refusals.


@pytest.mark.parametrize("recipe", ["sr-st", "mdgf", "mdgf-cubic", "sdgf-", "", None])
def test_unknown_recipe_is_refused(recipe: str) -> None:
    with pytest.raises(ValueError, match=r"recipe must be .*'sr-ste'"):
        NMSchedule(recipe)


@pytest.mark.parametrize("name", ["dense_fraction", "finetune_fraction"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_fraction_outside_zero_to_one_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a fraction"):
        NMSchedule("ste", **{name: value})


@pytest.mark.parametrize(("dense", "finetune"), [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.6, 0.7)])
def test_fractions_that_leave_no_recipe_are_refused(dense: float, finetune: float) -> None:
    with pytest.raises(ValueError, match="sum must be below 1"):
        NMSchedule("mdgf-linear", dense, finetune)


@pytest.mark.parametrize("decay", [0.0, -1e-4])
def test_decay_that_does_not_decay_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"above 0; got {decay}"):
        NMSchedule("mdgf-linear", decay=decay)


@pytest.mark.parametrize("starts", [(), (0.5, 0.2), (0.2, 0.2), (-0.1, 0.5), (0.0, 1.0), (float("nan"),)])
def test_stages_out_of_order_are_refused(starts: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="increasing fractions from 0 to below 1"):
        NMSchedule(tuple((start, TARGET) for start in starts))
