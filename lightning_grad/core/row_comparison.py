"""Whether what a step makes of a batch follows its samples into another order, and the words for steps where it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_grad.core.row_order import follows, is_close, orders_of, same_rows
from lightning_grad.functional.gradients import Terms

_EXACT = 1e-5
_NAMES = {"value": "losses", "input": "input of the loss", "target": "target of the loss"}
_PUT_BACK = (
    "Put the rows back in the order of the samples before the loss, with all rows of a sample together: "
    "torch.stack([x, x], 1).flatten(0, 1) in place of torch.cat([x, x])"
)
_KEEP = (
    "keep the order of the samples. Where a layer needs them sorted, let training_step sort, and put the rows "
    "back before the loss; pack_padded_sequence(enforce_sorted=False) does both"
)


@dataclass
class Seen:
    """What one run of a batch shows of its samples.

    Args:
        tensors: The tensors of the batch that have a row for each sample.
        values: What the step made of each sample, (B, ...), by name.
        floors: How much of each may be rounding, by name; 0 where it is not named.
        terms: The terms that the values come from, where they are no call.
    """

    tensors: list[Tensor] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    terms: Terms | None = None


See = Callable[[Tensor, int], Seen | None]


@dataclass
class RowComparison:
    """Compares what runs of the same samples in several orders show, and raises where rows do not follow their samples.

    Args:
        label: Who asks, for errors.
        way_out: What to do about it, as a clause that begins with a verb.
        is_coarse: Whether the step computes in half precision.
        function: The argument that takes the place of the step; empty if none does.
        maker: What makes a batch of the samples.

    Attributes:
        targets: What the loss got as target, in order, if nothing random is in it.
    """

    label: str
    way_out: str
    is_coarse: bool
    function: str = ""
    maker: str = "collate_fn"
    targets: Tensor | None = field(default=None, init=False)

    def compare(self, see: See, samples: int, in_order: bool = True) -> bool:
        """Compare the rows of some samples in their own order with those in other orders.

        Args:
            see: Runs the samples in an order, with the random numbers of a seed; returns ``None`` if they have no loss.
            samples: The number of samples.
            in_order: Whether row b must be that of sample b; else the rows of a sample must only stand together.

        Returns:
            bool: Whether there was anything to compare.

        Raises:
            RuntimeError: If rows do not follow.
        """
        if samples < 2:
            return True
        first, again = see(torch.arange(samples), 0), see(torch.arange(samples), 1)
        if first is None or again is None:
            return False
        own = (first, again)
        same = {name for name in first.values if self._follow(*own, name, torch.arange(samples), in_order) is not False}
        verdicts: list[bool | None] = []
        if in_order:
            self.targets = first.values["target"] if "target" in same else None
            self.refuse_moved(first.values.get("value"), again.values.get("value"), "value")
        for order in orders_of(samples):
            other = see(order, 0)
            if other is None:
                return False
            tensors = _tensors_follow(first, again, other, order)
            values = _decisive({name: self._follow(first, other, name, order, in_order) for name in same})
            self._judge(tensors, values, in_order)
            verdicts += [*values.values(), *tensors]
        # Each term has to be seen to follow; of a call, what it got and what it made of that tell the same.
        if len(same) < len(first.values) and (first.terms is not None or True not in values.values()):
            self._warn_of_noise(True in verdicts)
        return True

    def _follow(self, first: Seen, other: Seen, name: str, order: Tensor, in_order: bool = True) -> bool | None:
        if name not in other.values:
            return False
        own, others = first.values[name], other.values[name]
        # The network does not compute the targets.
        exactness = (
            (_EXACT, 0.0) if name == "target" else (5e-2 if self.is_coarse else 1e-3, first.floors.get(name, 0.0))
        )
        return follows(own, others, order, *exactness) if in_order else same_rows(own, others, *exactness)

    def refuse_moved(self, rows: Tensor | None, others: Tensor | None, name: str) -> None:
        """Raise if two runs of the same samples have the same rows in different places, as where a step shuffles them."""
        if rows is None or others is None or is_close(others, rows, 1e-3):
            return
        if same_rows(rows, others, 1e-3):
            self._refuse_step(name, "when the same samples came again")

    def _refuse_step(self, name: str, when: str, in_order: bool = True) -> None:
        taken = "the rows of a loss for the samples of the batch, in their order"
        taken = taken if in_order else "rows of a loss that stand together for one sample"
        raise RuntimeError(
            f"{self.label} takes {taken}, and training_step arranges them otherwise: {when}, the {_NAMES.get(name, name)} did "
            f"not follow. The step may sort, shuffle, join views by torch.cat, or leave out or repeat rows. {_PUT_BACK}. Or "
            f"{self.way_out}."
        )

    def _judge(self, tensors: Sequence[bool | None], values: Mapping[str, bool | None], in_order: bool) -> None:
        wrong = [name for name, follow in values.items() if follow is False]
        # A collate_fn that reorders moves them all; one alone may be no row a sample, and as long as the batch by chance.
        moved = False in tensors and True not in tensors
        if moved and (wrong or True not in values.values()):
            raise RuntimeError(
                f"{self.label} takes row b of a batch for the b-th sample that was drawn, and {self.maker} does not keep "
                f"that order: with the same samples in another order, the rows of its batch did not follow. Let {self.maker} "
                f"{_KEEP}."
            )
        if wrong and self.function:
            what = {"score_fn": "score", "loss_fn": "loss", "outputs_fn": "row"}[self.function]
            several = {"score": "scores", "loss": "losses", "row": "rows"}[what]
            raise RuntimeError(
                f"{self.label} takes {what} b for the b-th sample that was drawn, and when the same samples came in another "
                f"order, the {several} of {self.function} did not follow. Return one {what} for each sample, in the order "
                "of the batch."
            )
        if wrong:
            self._refuse_step(wrong[0], "when the same samples came in another order", in_order)

    def _warn_of_noise(self, tensors_follow: bool) -> None:
        rest = "relies on the tensors of the batch, which do" if tensors_follow else "takes it for granted"
        rank_zero_warn(
            f"{self.label} cannot see whether the rows of the loss follow the samples, because training_step draws random "
            f"numbers in eval mode too; it {rest}. Draw them in training mode only, to have it checked."
        )


def _decisive(values: Mapping[str, bool | None]) -> dict[str, bool | None]:
    """Return the verdict on the losses, or on what they were computed from if they are all alike or drawn at random."""
    if values.get("value") is not None:
        return {"value": values["value"]}
    return {name: verdict for name, verdict in values.items() if name != "value"}


def _tensors_follow(first: Seen, again: Seen, other: Seen, order: Tensor) -> list[bool | None]:
    """Return for each tensor of the batch whether its rows follow; those that ``collate_fn`` draws at random say nothing."""
    if not len(first.tensors) == len(again.tensors) == len(other.tensors):
        return []
    found = zip(first.tensors, again.tensors, other.tensors, strict=True)
    return [follows(one, two, order, _EXACT) for one, same, two in found if is_close(same, one, _EXACT)]
