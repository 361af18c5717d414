"""What gradients tell is computed from all of their components."""

import pytest
import torch

from lightning_grad.functional import gradient_cosine, moment_signal_to_noise


def test_complex_gradients_are_read_as_their_real_and_imaginary_parts() -> None:
    one, turned = torch.tensor([3.0 + 4.0j]), torch.tensor([4.0 - 3.0j])
    assert gradient_cosine([one], [one]).item() == pytest.approx(1.0)
    assert gradient_cosine([one], [turned]).item() == pytest.approx(0.0)
    # After one step the mean of squares is 2 g^2 here, so signal and noise are the same.
    state = {"step": torch.tensor(1.0), "exp_avg": 0.1 * one, "exp_avg_sq": torch.tensor([0.018 + 0.032j])}
    assert moment_signal_to_noise([state], (0.9, 0.999)).item() == pytest.approx(1.0, rel=1e-3)
