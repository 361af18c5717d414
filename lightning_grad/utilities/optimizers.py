"""Identify optimizers, and detect changes of their param groups."""

from collections import Counter
from collections.abc import Mapping

import lightning.pytorch as pl
from torch.optim import Optimizer

Shape = tuple[tuple[int, int], ...]


def optimizer_index(trainer: pl.Trainer, optimizer: Optimizer, technique: str) -> int:
    """Return the index of an optimizer in ``trainer.optimizers``.

    Raises:
        RuntimeError: If it is not there. (Not StopIteration, which Lightning treats as the end of the data.)
    """
    for index, other in enumerate(trainer.optimizers):
        if other is optimizer:
            return index
    raise RuntimeError(
        f"{technique} does not know the {type(optimizer).__name__} that made a step, because it is not in "
        "trainer.optimizers. Return it from configure_optimizers, and call step() on the optimizers of "
        "self.optimizers()."
    )


class OptimizerCounts(Counter[int]):
    """Counts by optimizer index, which can be saved in a checkpoint.

    Example:
        >>> counts = OptimizerCounts()
        >>> counts[1] += 2
        >>> counts.state_dict(), counts[0]
        ({'1': 2}, 0)
    """

    def state_dict(self) -> dict[str, int]:
        """Return the counts for a checkpoint."""
        return {str(index): count for index, count in self.items()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore saved counts."""
        self.clear()
        self.update({int(index): count for index, count in state.items()})


def optimizer_shape(optimizer: Optimizer) -> Shape:
    """Return a value that changes when a param group is added, or when loading a checkpoint replaces the groups."""
    return tuple((id(group), len(group["params"])) for group in optimizer.param_groups)
