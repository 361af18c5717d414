"""Measure the cost of running a step on one sample at a time, and check that it gives the losses of a batch."""

import time
from collections.abc import Callable

import torch

from lightning_grad.core.losses.rehearsal import Rehearsal
from lightning_grad.core.losses.sample_losses import loss_of_output
from lightning_grad.core.losses.scoring import runner, to_device

_TRIED = 16  # number of samples whose losses are compared with their batch
_REPEATS = 3


def cost_of_single_samples(rehearsal: Rehearsal, with_gradient: bool = False) -> tuple[float, int] | None:
    """Measure the slowdown of a pass that runs the step on one sample at a time.

    The factor depends on the hardware: it is the batch size if a batch takes no longer than a
    sample, as on a GPU, and near 1 if one sample keeps the processor busy. So the user's own step
    is timed on the user's device. This is called only to complete an error message, so a few runs
    of the step do not matter.

    Args:
        rehearsal: Runs the step.
        with_gradient: Whether the pass needs the gradient of the loss.

    Returns:
        tuple: The factor, and the batch size that it relates to; ``None`` if the step fails on one
            sample, or the mean over
        single samples is not the loss of their batch.
    """
    assert rehearsal.training_set is not None
    batch = rehearsal.mine[: rehearsal.training_set.sampler.batch_size].tolist()
    try:
        rehearsal.check_alone(most=_TRIED)
        of_batch, of_one = (_seconds(rehearsal, chosen, with_gradient) for chosen in (batch, batch[:1]))
    except Exception:  # the step may raise anything; the caller raises its own error
        return None
    return len(batch) * of_one / of_batch, len(batch)


def _seconds(rehearsal: Rehearsal, indices: list[int], with_gradient: bool) -> float:
    with rehearsal.loaded(indices) as batch:
        run = runner(rehearsal.trainer, rehearsal.pl_module, to_device(rehearsal.trainer, batch))
        parameters = [p for p in rehearsal.pl_module.parameters() if p.requires_grad]

        def once() -> None:
            with torch.set_grad_enabled(with_gradient):
                loss = loss_of_output(run())
                if with_gradient and loss is not None:
                    torch.autograd.grad(loss, parameters, allow_unused=True)

        once()  # warm up: the first run of a shape includes setup
        return min(_timed(once) for _ in range(_REPEATS))


def _timed(call: Callable[[], None]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def in_words(factor: float) -> str:
    """Return a measured factor in words, rounded to one or two digits.

    Example:
        >>> in_words(1.04), in_words(3.21), in_words(387.0)
        ('about as long', 'about 3 times as long', 'about 390 times as long')
    """
    rounded = round(factor) if factor < 95 else round(factor, -1)
    return "about as long" if rounded < 2 else f"about {rounded:.0f} times as long"
