"""The benchmark of sharpness runs, and its loops by hand do what the callbacks do. Nothing about speed."""

import json
import logging
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from benchmarks import sharpness
from benchmarks.common import SmallTransformer, timed_fit
from lightning_grad.callbacks import SAM, ZerothOrder

# What Lightning says about itself and about fits of a few steps.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]


@pytest.fixture(autouse=True)
def _lightnings_own_log_level(monkeypatch) -> Iterator[None]:
    """Undo what the scripts set for the whole process."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def _small(monkeypatch):
    """The transformer has one layer."""
    whole = SmallTransformer.__init__

    def build(self):
        whole(self)
        self.encoder.layers, self.encoder.num_layers = self.encoder.layers[:1], 1

    monkeypatch.setattr(SmallTransformer, "__init__", build)
    monkeypatch.setattr(sharpness, "VOCABULARY", 20)
    monkeypatch.setattr(sharpness, "STEPS", 2)
    monkeypatch.setattr(sharpness, "batch_of", lambda: (torch.randn(1, 2, 256), torch.randn(1, 2, 256)))
    monkeypatch.setattr(sharpness, "tokens_of", lambda sequences: torch.randint(20, (1, 4)))


@pytest.mark.usefixtures("_small")
def test_it_measures_everything(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(sharpness, "in_fresh_process", lambda function, *case: asked.append(case) or 1e6)
    sharpness.main(["--quick", "--out", str(tmp_path / "speed.json")])
    assert "Budgets missed: " in capsys.readouterr().out
    tables = json.loads((tmp_path / "speed.json").read_text())
    assert {sharpness.STEPS_OF, sharpness.WITHOUT, sharpness.MEMORY} <= set(tables)
    assert all(row["ratio"] > 0 for title in (sharpness.STEPS_OF, sharpness.WITHOUT) for row in tables[title])
    assert [case[0] for case in asked] == [
        *["an evaluation pass"] * 2,
        "plain, SGD",
        "ZerothOrder",
        "ZerothOrder, bits=4",
    ]
    monkeypatch.setattr(sharpness, "map_large_memory", lambda: None)
    monkeypatch.setattr(torch.backends.mha, "set_fastpath_enabled", lambda enabled: None)
    for case in asked[1:]:
        assert sharpness.peak_memory(*case) >= 0


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_by_hand_is_sam(adaptive):
    trained = []
    cases = [(partial(sharpness.SharpByHand, adaptive), []), (SmallTransformer, [SAM(adaptive=adaptive)])]
    for build, callbacks in [*cases, (SmallTransformer, [])]:
        torch.manual_seed(0)
        module = build()
        timed_fit(module, sharpness.batch_of(), 2, callbacks, sharpness.Clock("cpu"))
        trained.append(torch.cat([parameter.flatten() for parameter in module.parameters()]))
    by_hand, ours, plain = trained
    # AdamW moves a weight whose gradient is zero but for rounding, so that not all weights agree.
    assert (by_hand - ours).abs().mean() < 0.01 * (by_hand - plain).abs().mean()


@pytest.mark.usefixtures("_small")
def test_zeroth_order_by_hand_is_zeroth_order():
    trained = []
    for act in (sharpness._zeroth_step, None):
        torch.manual_seed(0)
        module, batch = sharpness.Tokens(), sharpness.tokens_of(1)
        if act is None:
            timed_fit(module, batch, 2, [ZerothOrder(sharpness.EPSILON)], sharpness.Clock("cpu"))
        else:
            for step in range(2 + 2 + 1):
                act(module, batch, step)
        trained.append(torch.cat([parameter.flatten() for parameter in module.parameters()]))
    torch.testing.assert_close(*trained, rtol=0, atol=1e-6)
    torch.manual_seed(0)
    start = torch.cat([parameter.flatten() for parameter in sharpness.Tokens().parameters()])
    assert (start - trained[0]).abs().max() > 1e-5
