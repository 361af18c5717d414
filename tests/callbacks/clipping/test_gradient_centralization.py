"""Gradient centralization in a fit: what SGD then keeps."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_grad.callbacks import GradientCentralization
from tests.callbacks.clipping import Dictated, Gradients, Regression, pairs, rows_of, small_net, train


def conv_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize(("make", "weights"), [(small_net, ("0", "2")), (conv_net, ("1", "3"))])
def test_sgd_keeps_the_mean_of_each_row(make: Any, weights: tuple[str, ...]) -> None:
    net = make()
    start = {name: value.clone() for name, value in net.state_dict().items()}
    momentum = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)  # noqa: E731
    train([GradientCentralization()], Regression(net, momentum), pairs())
    for name in weights:
        before, after = start[f"{name}.weight"].flatten(1), net.state_dict()[f"{name}.weight"].flatten(1)
        torch.testing.assert_close(after.mean(1), before.mean(1), rtol=0, atol=1e-6)
        assert (after - before).abs().max() > 1e-2, "and the weights train"
        assert not torch.equal(net.state_dict()[f"{name}.bias"], start[f"{name}.bias"])
    plain = make()
    train([], Regression(plain, momentum), pairs())
    moved = plain.state_dict()[f"{weights[1]}.weight"].flatten(1).mean(1) - start[f"{weights[1]}.weight"].flatten(
        1
    ).mean(1)
    assert moved.abs().max() > 1e-3, "without it the means move"


def test_only_convolutions() -> None:
    before, after = Gradients(), Gradients()
    train([before, GradientCentralization(conv_only=True), after], Regression(conv_net()), pairs())
    for raw, centred in zip(before.seen, after.seen, strict=True):
        changed = {name for name in raw if not torch.equal(raw[name], centred[name])}
        assert changed == {"net.1.weight"}


class Matrix(Dictated):
    """Its gradient is a matrix, the data."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 2))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.w * batch[0][0].reshape(2, 2)).sum()


@pytest.mark.parametrize(
    ("row", "share"), [([1.0, -1.0, 2.0, -2.0], 0.0), ([1.0, 1.0, 2.0, 2.0], 1.0), ([1.0, 3.0, 0.0, 0.0], 0.8)]
)
def test_the_share_that_the_means_were_is_logged(row: list[float], share: float) -> None:
    trainer = train(
        [GradientCentralization(include=["w"])], Matrix(), rows_of(torch.tensor([row])), log_every_n_steps=1
    )
    found = {key: value.item() for key, value in trainer.callback_metrics.items()}
    assert found == {"grad/centralization/removed": pytest.approx(share, abs=1e-6)}


def test_a_gradient_of_zero_has_no_mean_to_remove() -> None:
    trainer = train([GradientCentralization(include=["w"])], Matrix(), rows_of(torch.zeros(1, 4)), log_every_n_steps=1)
    assert trainer.callback_metrics["grad/centralization/removed"].item() == 0.0


def test_a_matrix_of_which_no_layer_tells_the_dimensions_is_named() -> None:
    with pytest.raises(ValueError, match=r"ignores w, .* spell the parameter's name in include="):
        train([GradientCentralization()], Matrix(), rows_of(torch.zeros(1, 4)))


def test_modules_without_weights_to_centralize_are_refused() -> None:
    with pytest.raises(ValueError, match=r"this module has none. Set conv_only=False"):
        train([GradientCentralization(conv_only=True)], Regression(small_net()), pairs())
    with pytest.raises(ValueError, match=r"vectors only. Drop the callback"):
        train([GradientCentralization()], Dictated(), rows_of(torch.zeros(1, 4)))


def test_the_line_at_the_start_counts_what_is_changed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        train([GradientCentralization()], Regression(small_net()), pairs())
    assert any(
        "acts on 2 parameters; 2 skipped (net.0.bias, net.2.bias)" in record.message for record in caplog.records
    )
