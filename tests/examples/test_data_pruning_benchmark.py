"""The benchmark of data pruning runs, and all ways to the norms find the same norms. Nothing about speed."""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import data_pruning
from benchmarks.common import Clock
from benchmarks.data_pruning import (
    GHOST,
    ONE_BY_ONE,
    OPACUS,
    PLAIN,
    VMAP,
    WAYS,
    EpochTimer,
    Problem,
    ReadInTurns,
    Sizes,
    cross_entropies,
    evaluate,
    images,
    medians,
    residual,
    squared_errors,
    training_set,
)
from benchmarks.rows import Row

TINY = Sizes(width=2, image=4, batch=3, crowd=4, samples=12, steps=10, reading=2, stages=3)

# What Lightning says about itself and about fits of few steps, and vmap and Opacus about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*have not yet implemented the batching rule.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Full backward hook is firing.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def _settings_of_the_process() -> Iterator[None]:
    """Undo what the script sets for the whole process."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(fast_path)
    torch.set_num_threads(threads)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def small_transformer(samples: int = 3) -> Problem:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    network = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    return Problem(network, torch.randn(samples, 5, 8), torch.randn(samples, 5, 8), squared_errors)


def small_convnet(samples: int = 3) -> Problem:
    torch.manual_seed(0)
    network = residual(TINY, 3).net.eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return Problem(network, *images(TINY, samples), cross_entropies)


def small_perceptron(samples: int = 3) -> Problem:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 10)).eval()
    return Problem(network, torch.randn(samples, 5), torch.randint(10, (samples,)), cross_entropies)


def reference(of: Problem) -> torch.Tensor:
    """Return the norms by the plain loop in double precision, through ``.grad``."""
    network = of.network.double()
    norms = []
    for i in range(len(of.inputs)):
        network.zero_grad()
        inputs, target = of.inputs[i : i + 1], of.targets[i : i + 1]
        target = target.double() if target.is_floating_point() else target
        of.loss(network(inputs.double()), target)[0].backward()
        norms.append(sum(p.grad.square().sum() for p in network.parameters()).sqrt())
    return torch.stack(norms)


@pytest.mark.parametrize("build", [small_convnet, small_transformer, small_perceptron])
@pytest.mark.parametrize("way", [GHOST, VMAP, ONE_BY_ONE])
def test_every_way_finds_the_norms(way, build):
    check_norms(way, build())


def test_opacus_finds_the_norms_and_refuses_batch_norm():
    pytest.importorskip("opacus")
    check_norms(OPACUS, small_perceptron())
    with pytest.raises(NotImplementedError, match="BatchNorm"):
        WAYS[OPACUS](small_convnet().network)
    of = small_transformer()
    assert WAYS[OPACUS](of.network)(of).shape == (3,)


def check_norms(way, of):
    run = WAYS[way](of.network)
    found = [run(of), run(of), run(of.part(slice(0, 2)))]
    expected = reference(of).float()
    for norms, wanted in zip(found, (expected, expected, expected[:2]), strict=True):
        torch.testing.assert_close(norms.detach(), wanted, rtol=1e-4, atol=1e-6)


def test_the_plain_way_leaves_the_gradient_of_the_mean():
    of = small_convnet()
    WAYS[PLAIN](of.network)(of)
    found = [p.grad for p in of.network.parameters()]
    expected = torch.autograd.grad(of.losses().mean(), list(of.network.parameters()))
    torch.testing.assert_close(found, list(expected))


def test_it_measures_everything(monkeypatch, tmp_path, capsys):
    peaks = {PLAIN: 100e6, GHOST: 130e6, VMAP: 520e6}
    asked = []

    def in_this_process(function, way, learnt, *rest):
        asked.append((way, learnt))
        function(way, learnt, *rest)
        return peaks[way]

    monkeypatch.setitem(data_pruning.SIZES, "cpu", TINY)
    monkeypatch.setattr(data_pruning, "transformer", small_pair)
    monkeypatch.setattr(data_pruning, "in_fresh_process", in_this_process)
    monkeypatch.setattr(data_pruning, "EPOCHS", 3)
    monkeypatch.setattr(data_pruning, "traced_networks", lambda: {"a network": (nn.Linear(3, 3), torch.randn(4, 3))})
    data_pruning.main(["--quick", "--out", str(tmp_path / "speed.json")])
    printed = capsys.readouterr().out
    tables = json.loads((tmp_path / "speed.json").read_text())
    titles = ["Norms, a residual convnet", "Norms, a transformer", "Memory, a residual convnet"]
    titles += [
        "One sample at a time, a perceptron",
        "A scoring pass",
        "Epochs",
        "Steps read",
        "Steps traced, a network",
    ]
    assert set(titles) <= set(tables)
    assert all(f"\n{title}\n" in printed for title in titles)
    assert all(row["ratio"] > 0 for title in titles for row in tables[title] if row["ratio"] is not None)
    assert asked == [(PLAIN, True), (PLAIN, True), (GHOST, True), (GHOST, False), (VMAP, True)]
    memory = {(row["name"], row["baseline"]): row for row in tables["Memory, a residual convnet"]}
    assert memory[GHOST, PLAIN]["ratio"] == pytest.approx(1.3)
    assert memory[VMAP, GHOST]["ratio"] == pytest.approx(4.0)
    over = printed.split("Budgets missed: ")[1]
    assert f"{GHOST} (Memory, a residual convnet)" in over
    assert f"{VMAP} (Memory, a residual convnet)" not in over


def small_pair():
    of = small_transformer()
    module = nn.Module()
    module.encoder = of.network
    return module, (of.inputs, of.targets)


def test_memory_is_that_of_a_process_of_its_own():
    here = bytearray(200_000_000)
    here[::4096] = b"x" * len(here[::4096])
    before = data_pruning.highest_memory("cpu")
    assert data_pruning.in_fresh_process(os.getpid) != os.getpid()
    more = bytearray(50_000_000)
    more[::4096] = b"x" * len(more[::4096])
    grown = data_pruning.highest_memory("cpu") - before
    assert 0 <= grown < 60e6
    assert before > 200e6


def test_a_network_that_is_refused_has_a_line_that_says_so(monkeypatch):
    def refuse(network):
        raise NotImplementedError

    def absent(network):
        raise ImportError

    monkeypatch.setattr(
        data_pruning, "WAYS", {PLAIN: WAYS[PLAIN], GHOST: WAYS[GHOST], VMAP: WAYS[VMAP], "a": refuse, "b": absent}
    )
    rows = data_pruning.norm_rows(data_pruning.CONVNET, TINY, 1, Clock("cpu"))
    refused = [row for row in rows if row.ratio is None]
    assert [row.name for row in refused] == ["a (refuses BatchNorm)", "b (not installed)"]
    assert not any(row.is_over for row in refused)


def test_evaluation_looks_at_every_sample_in_eval_mode():
    torch.manual_seed(0)
    module, loader = residual(TINY, 3), training_set(TINY)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    found = evaluate(module, loader, "cpu")
    inputs, labels = loader.dataset.tensors
    with torch.no_grad():
        expected = nn.functional.cross_entropy(module.eval()(inputs), labels)
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


def test_the_first_round_is_not_counted():
    class Ticks(Clock):
        def seconds(self, function):
            return function()

    calls = {"a": iter([100.0, 1.0, 3.0, 8.0]), "b": iter([100.0, 2.0, 2.0, 5.0])}
    found = medians({name: partial(next, times) for name, times in calls.items()}, 3, Ticks("cpu"))
    assert found == {"a": 3.0, "b": 2.0}


def test_epochs_are_timed_from_start_to_start():
    class Ticks(Clock):
        def now(self):
            return next(times)

    times = iter([1.0, 3.0, 8.0])
    timer = EpochTimer(Ticks("cpu"))
    for _ in range(3):
        timer.on_train_epoch_start(None, None)
    assert timer.periods == [2.0, 5.0]


def test_steps_are_read_in_turns():
    seen = []

    def way(name, module):
        seen.append(f"{name} begins")
        return lambda: seen.append(f"{name} ends")

    turns = ReadInTurns(nn.Module(), [partial(way, "a"), partial(way, "b")])
    for _ in range(3):
        turns()
    assert seen == ["a begins", "a ends", "b begins", "b ends", "a begins"]
    turns.close()
    turns.close()
    assert seen[5:] == ["a ends"]


@pytest.mark.parametrize("steps", [10, 11, 12, 13, 14])
def test_no_way_lasts_longer_than_its_fit(steps):
    rows = data_pruning.reading_rows(data_pruning.ResidualConvNet, replace(TINY, steps=steps), 2, Clock("cpu"))
    assert [row.name for row in rows][:3] == ["unread", "weights not needed", "weighted"]
    assert rows[-1].name == "read"
    assert all(row.ratio > 0 for row in rows)


def test_the_empty_mode_runs_the_step_and_is_taken_away():
    module, (inputs, labels) = residual(TINY, 3), images(TINY, 2)
    module.log = lambda *args: None
    end = data_pruning.under_an_empty_mode(module)
    assert "training_step" in vars(module)
    found = module.training_step((inputs, labels), 0)
    end()
    assert "training_step" not in vars(module)
    torch.testing.assert_close(found, module.training_step((inputs, labels), 0))


def test_what_must_be_slower_is_over_its_budget_when_it_is_not():
    assert data_pruning.against(VMAP, {VMAP: 0.2, GHOST: 0.1}, GHOST, 3.0, at_least=True).is_over
    assert not data_pruning.against(GHOST, {PLAIN: 0.1, GHOST: 0.14}, PLAIN, 1.5).is_over
    assert isinstance(data_pruning.against(PLAIN, {PLAIN: 0.1}, PLAIN), Row)
