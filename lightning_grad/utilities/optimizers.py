"""Which optimizer is this, and is it still what it was?"""

import lightning.pytorch as pl
from torch.optim import Optimizer

Shape = tuple[tuple[int, int], ...]


def optimizer_index(trainer: pl.Trainer, optimizer: Optimizer, technique: str) -> int:
    """Return the number of an optimizer among the trainer's.

    Raises:
        RuntimeError: If the trainer does not know it. (Not StopIteration: Lightning takes that for the end of the data.)
    """
    for index, other in enumerate(trainer.optimizers):
        if other is optimizer:
            return index
    raise RuntimeError(
        f"{technique} does not know the {type(optimizer).__name__} that made a step, because it is none of "
        "trainer.optimizers. Return it from configure_optimizers, and step what self.optimizers() returns."
    )


def optimizer_shape(optimizer: Optimizer) -> Shape:
    """Return what changes when a group is added, or when a checkpoint has put new groups in place."""
    return tuple((id(group), len(group["params"])) for group in optimizer.param_groups)
