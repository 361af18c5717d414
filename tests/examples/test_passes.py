"""No technique does more in a step than ``benchmarks/passes.json`` says, and at its neutral setting none does anything."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor
from typing_extensions import override

from benchmarks import passes
from benchmarks.passes import NEUTRAL, PLAIN, TABLE, TRIAL, Counts, count, count_all, differences, version
from lightning_grad.callbacks import NormClipping
from lightning_grad.core import GradientStep

KNOWN = json.loads(TABLE.read_text())
ACTS_WHEN_NEUTRAL = {
    "AutoClip",  # adds each norm to its window, for the logged threshold and for a resume with another percentile
    "ZClip",  # adds each norm to its statistics, which are logged, and for a resume with another threshold
}

pytestmark = pytest.mark.skipif(
    version() != KNOWN["torch"], reason=f"the table was counted with torch {KNOWN['torch']}"
)


@pytest.fixture(scope="module")
def found() -> dict[str, Counts]:
    return count_all()


def test_no_step_does_more_or_less_than_the_table_says(found: dict[str, Counts]) -> None:
    differing = differences(found, KNOWN)
    assert not differing, "\n".join([*differing, "If this is meant: python benchmarks/passes.py --write"])


def test_neutral_settings_call_no_operator(found: dict[str, Counts]) -> None:
    acting = {name.partition(",")[0] for name, counts in found.items() if name.endswith(NEUTRAL) and counts.calls}
    assert acting == ACTS_WHEN_NEUTRAL


class Careless(NormClipping):
    """Reads and writes every gradient once more than needed."""

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        for gradient in step.gradients:
            gradient.mul_(1.0)
        return super().condition(step)


def test_one_more_pass_differs(found: dict[str, Counts]) -> None:
    name, plain = f"NormClipping, {TRIAL}", found[PLAIN]
    careless = count([Careless(**NormClipping.trial)]) - plain
    (line,) = differences({**found, name: careless}, {**KNOWN, "steps": {n: vars(c) for n, c in found.items()}})
    assert line.startswith(name)
    assert careless.read - found[name].read == careless.written - found[name].written > 4 * passes.HIDDEN * passes.WIDTH


def test_only_many_python_calls_differ() -> None:
    table: dict[str, Any] = {"steps": {"one": vars(Counts(1, 8, 8, 100))}}
    assert not differences({"one": Counts(1, 8, 8, 110)}, table)
    assert differences({"one": Counts(1, 8, 8, 200)}, table)
    assert differences({"one": Counts(1, 8, 9, 100)}, table)
    assert differences({}, table) == ["one: gone"]
