"""What every test shares: one thread (workers run beside each other), and silence of Lightning's own advice."""

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
