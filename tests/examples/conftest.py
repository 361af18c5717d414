"""What the tests of the examples share."""

import logging
from collections.abc import Iterator

import pytest
import torch
from matplotlib.figure import Figure


@pytest.fixture(scope="module", autouse=True)
def _one_thread_and_lightnings_own_log_level() -> Iterator[None]:
    """Undo what the scripts set for the whole process."""
    log, threads = logging.getLogger("lightning.pytorch"), torch.get_num_threads()
    level = log.level
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    log.setLevel(level)


@pytest.fixture(scope="module", autouse=True)
def _blank_figures() -> Iterator[None]:
    """Do not render what the scripts draw: that a figure is written is what their tests ask for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.draw", lambda *_: None)
        patch.setattr("lightning_grad.callbacks.data_pruning._report.draw_samples", lambda *_: Figure())
        yield
