"""The benchmark of clipping runs, and what it holds ours against does what ours does. Nothing about speed."""

import json
import logging
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from benchmarks import clipping
from benchmarks.clipping import (
    Case,
    Gradients,
    PublishedAutoClip,
    PublishedZClip,
    autoclip_of,
    check_no_wait,
    clip_adaptively_as_timm,
    past_norms,
    rows_of,
    zclip_of,
)
from benchmarks.common import Clock, SmallTransformer
from benchmarks.rows import Row
from lightning_grad.functional import clip_adaptively_

SHAPES = [(3, 4), (5,), (2, 2), (6,)]

# What Lightning says about itself and about fits of three steps.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]


@pytest.fixture(autouse=True)
def _lightnings_own_log_level() -> Iterator[None]:
    """Undo what the scripts set for the whole process."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_it_measures_everything(monkeypatch, tmp_path, capsys):
    def build():
        return SmallTransformer(), (torch.randn(1, 2, 256), torch.randn(1, 2, 256))

    monkeypatch.setattr(clipping, "SHAPES", {clipping.TINY: SHAPES, clipping.LARGE: SHAPES})
    monkeypatch.setattr(clipping, "MODELS", {"a transformer": build})
    monkeypatch.setattr(clipping, "LOG_EVERY", 2)
    monkeypatch.setattr(clipping, "WINDOW", 32)
    clipping.main(["--quick", "--out", str(tmp_path / "speed.json")])
    printed = capsys.readouterr().out
    for shown in ("Functions on 400 tiny tensors", "on_before_optimizer_step", "a transformer", "Budgets missed: "):
        assert shown in printed
    tables = json.loads((tmp_path / "speed.json").read_text())
    assert {clipping.TINY, clipping.LARGE, f"{clipping.TINY}, hooks"} <= set(tables)
    assert all(row["ratio"] > 0 for name in (clipping.TINY, clipping.LARGE) for row in tables[name])


def test_published_code_clips_as_ours_does():
    pairs = [
        (lambda found: PublishedZClip()(found.parameters), lambda found: zclip_of(found.gradients)()),
        (
            lambda found: PublishedAutoClip(past_norms(9))(found.parameters),
            lambda found: autoclip_of(found.gradients, 9)(),
        ),
        (
            lambda found: clip_adaptively_as_timm(found.parameters),
            lambda found: clip_adaptively_(found.gradients, found.parameters, clipping.RATIO, clipping.EPS),
        ),
    ]
    torch.manual_seed(0)
    found = Gradients([nn.Parameter(torch.randn(shape)) for shape in SHAPES])
    for published, ours in pairs:
        results = []
        for clip in (published, ours):
            found.refill()
            clip(found)
            results.append([gradient.clone() for gradient in found.gradients])
        torch.testing.assert_close(*results)
        assert not torch.equal(results[0][0], found.originals[0])


def test_every_case_finds_the_gradients_refilled():
    found, seen = Gradients([nn.Parameter(torch.randn(3))]), []

    def halve():
        seen.append(float(found.gradients[0].norm()))
        found.gradients[0].mul_(0.5)

    cases = [Case("a", halve, "a"), Case("b", halve, "a", 1e-9), Case("c", halve, "a", 1e9, at_least=True)]
    rows = rows_of(cases, found, 3, Clock("cpu"))
    assert seen == pytest.approx([clipping.NORM] * 12)
    assert [row.is_over for row in rows] == [False, True, True]
    assert not Row("d", 1.0, 4.0, 3.0, at_least=True).is_over


def test_the_check_for_waits_covers_every_rule_but_the_guard():
    assert check_no_wait(SHAPES, Clock("cpu")) == [
        "GradientCentralization",
        "LayerwiseNormalization",
        "AdaptiveGradientClipping",
        "AutoClip",
        "LayerwiseClipping",
        "NormClipping",
        "NormalizedGradient",
        "SpikeClipping",
        "ValueClipping",
        "ZClip",
        "GradientNoise",
    ]
