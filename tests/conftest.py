"""What every test shares: one thread (workers run beside each other), silence of Lightning's advice, and cheap fits."""

import functools
import gc
import importlib
import logging
import signal

import pytest
import torch

torch.set_num_threads(1)
for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _keep_interrupts():
    """Lightning leaves SIGINT ignored after Ctrl-C; the next test must not inherit that."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def pytest_collection_finish():
    """Take modules and collected tests out of garbage collection, which forked ranks would copy page by page."""
    gc.collect()
    gc.freeze()


# Two things take Lightning a third of a small fit, and the same each time. Their results are the same without.

for fabric, pytorch in (("lightning.fabric", "lightning.pytorch"), ("lightning_fabric", "pytorch_lightning")):
    # Every Trainer reads the files of all installed packages to find callbacks that they bring.
    registry = importlib.import_module(f"{fabric}.utilities.registry")
    registry.entry_points = functools.cache(registry.entry_points)

    # Every logged value looks through its metric for tensors to move, also if all are where they should be.
    result = importlib.import_module(f"{pytorch}.trainer.connectors.logger_connector.result")

    def to(metric, device, move=result._ResultMetric.to):
        stays = metric.is_tensor and metric.value.device == torch.device(device)
        return metric if stays else move(metric, device)

    result._ResultMetric.to = to
