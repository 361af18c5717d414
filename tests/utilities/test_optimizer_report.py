"""optimizer_report: what each optimizer moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad

from lightning_grad.testing import fit, make_classifier, make_trainer
from lightning_grad.utilities import optimizer_report


def _two_groups(module):
    groups = [
        {"params": module.head.parameters(), "name": "head", "lr": torch.tensor(0.5)},
        {"params": [module.mix.w], "weight_decay": 0.1},
    ]
    return SGD(groups, lr=0.25, momentum=0.9)


def test_rows_of_two_groups():
    module = make_classifier()
    module.configure_optimizers = lambda: _two_groups(module)
    trainer, _ = fit([], module, max_epochs=1)
    report = optimizer_report(trainer)
    head, mix = report.rows
    assert (head.optimizer, head.group, head.parameters) == ("0: SGD", "head", ("head.weight", "head.bias"))
    assert (head.entries, head.lr, head.weight_decay, head.state_bytes) == (4 * 32 + 4, 0.5, 0.0, 4 * (4 * 32 + 4))
    assert (mix.group, mix.parameters, mix.lr, mix.weight_decay) == ("1", ("mix.w",), 0.25, pytest.approx(0.1))
    assert report.state_bytes == 4 * (4 * 32 + 4 + 256)
    assert "hidden.weight" in report.unmoved
    assert "mix.w" not in report.unmoved
    assert "No optimizer moves encoder." in str(report)
    table = report.markdown().splitlines()
    assert table[2] == "| 0: SGD | head | head.weight and 1 more | 132 | 0.5 | 0 | 528 B |"
    assert table[0].startswith("| optimizer | group | parameters |")


def test_manual_optimization_and_states_from_the_start():
    module = make_classifier(manual=True)
    module.configure_optimizers = lambda: [Adagrad(module.mix.parameters()), SGD(module.head.parameters(), lr=0.1)]
    trainer, _ = fit([], module, max_epochs=1)
    first, second = optimizer_report(trainer).rows
    assert first.state_bytes == 4 * 256 + 4, "sums of squares, and a step count"
    assert (second.optimizer, second.state_bytes) == ("1: SGD", 0)


def test_sizes_are_short():
    module = make_classifier()
    module.extra = nn.Linear(1024, 1024)
    module.configure_optimizers = lambda: SGD(module.parameters(), lr=0.1, momentum=0.9)
    module.training_step = lambda batch, batch_idx: module(batch[0]).sum() + module.extra(torch.ones(1024)).sum()
    trainer, _ = fit([], module, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    assert "4.21 MB" in str(optimizer_report(trainer))


def test_a_trainer_without_optimizers():
    with pytest.raises(ValueError, match=r"has no optimizers yet.*on_train_end"):
        optimizer_report(make_trainer())
