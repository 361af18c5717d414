"""Which optimizer is this, and is it still what it was?"""

from collections import Counter
from collections.abc import Mapping

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


class OptimizerCounts(Counter[int]):
    """Counts by the number of an optimizer, which a checkpoint may hold.

    Example:
        >>> counts = OptimizerCounts()
        >>> counts[1] += 2
        >>> counts.state_dict(), counts[0]
        ({'1': 2}, 0)
    """

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""
        return {str(index): count for index, count in self.items()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue with saved counts."""
        self.clear()
        self.update({int(index): count for index, count in state.items()})


def optimizer_shape(optimizer: Optimizer) -> Shape:
    """Return what changes when a group is added, or when a checkpoint has put new groups in place."""
    return tuple((id(group), len(group["params"])) for group in optimizer.param_groups)
