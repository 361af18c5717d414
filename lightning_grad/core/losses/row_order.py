"""Whether what a step makes of a batch follows its samples into another order, and the words for steps where it does not.

The questions to rows are pure functions of tensors; :class:`RowComparison` asks them of runs of one batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_grad.core.losses.given_functions import LossRequest
from lightning_grad.functional import LossCall, Terms
from lightning_grad.functional.plain_tensors import plain_tensor
from lightning_grad.utilities.batches import map_tensors


def orders_of(samples: int) -> Iterator[Tensor]:
    """Yield orders of a batch that together show every other order than that of the samples: the first moves each sample.

    An order that does not depend on the data, such as the reverse, shows only if it does not commute with these. No order but
    the samples' own commutes with both, from three samples on.

    Example:
        >>> [order.tolist() for order in orders_of(4)]
        [[1, 2, 3, 0], [2, 1, 3, 0]]
    """
    rolled = torch.arange(samples).roll(-1)
    yield rolled
    if samples > 2:
        yield torch.cat([rolled[:2].flip(0), rolled[2:]])


def follows(before: Tensor, after: Tensor, order: Tensor, tolerance: float = 0.0, floor: float = 0.0) -> bool | None:
    """Return whether rows stand in another order, ``None`` if they are too alike to tell.

    Example:
        >>> rows, order = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 2, 0])
        >>> follows(rows, rows[order], order), follows(rows, rows, order)
        (True, False)
        >>> follows(torch.ones(3), torch.ones(3), order) is None
        True
    """
    if before.shape != after.shape:
        return False
    expected = before[order.to(before.device)]
    if not is_close(after, expected, tolerance, floor):
        return False
    return None if is_close(expected, before, tolerance, floor) else True


def is_close(one: Tensor, other: Tensor, tolerance: float, floor: float = 0.0) -> bool:
    """Return whether two tensors are equal, up to what another order of summation may change.

    Args:
        one: Any tensor.
        other: Another.
        tolerance: Relative to an entry, and to the median entry.
        floor: A difference that never counts.

    Example:
        >>> x = torch.tensor([1.0, torch.nan, 100.0])
        >>> is_close(x, x * 1.00001, 1e-3), is_close(x, x.flip(0), 1e-3)
        (True, False)
    """
    one, other = plain_tensor(one), plain_tensor(other)
    if one.shape != other.shape:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    if one.numel() == 0:
        return True
    size = other.detach().abs().float()
    scale = size[size.isfinite()].median() if bool(size.isfinite().any()) else size.new_zeros(())
    return bool(torch.isclose(one, other, rtol=tolerance, atol=tolerance * float(scale) + floor, equal_nan=True).all())


def same_rows(before: Tensor, after: Tensor, tolerance: float = 0.0, floor: float = 0.0) -> bool | None:
    """Return whether the same rows are there, in whichever order; ``None`` if they are too alike to tell.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> same_rows(rows, rows.flip(0)), same_rows(rows, rows.T.contiguous())
        (True, False)
    """
    if before.shape != after.shape:
        return False
    one, other = (_one_number(rows).sort().values for rows in (before, after))
    if not is_close(other, one, tolerance, floor):
        return False
    return None if is_close(one, one.flip(0), tolerance, floor) else True


def rows_of_batch(batch: Any, samples: int) -> list[Tensor]:
    """Return copies of the tensors of a batch that have a row for each sample.

    Example:
        >>> rows_of_batch({"x": torch.ones(2, 1), "scale": torch.ones(3)}, 2)
        [tensor([[1.],
                [1.]])]
    """
    found: list[Tensor] = []

    def note(leaf: Tensor) -> Tensor:
        if leaf.layout == torch.strided and leaf.dim() and len(leaf) == samples:
            found.append(leaf.clone())
        return leaf

    map_tensors(batch, note)
    return found


def rows_of_call(call: LossCall) -> dict[str, Tensor]:
    """Return the losses of the positions of each sample, (B, P), and a few numbers that tell what the loss got of it.

    The losses decide. Where all of them are alike, or drawn at random, the rest has to tell the samples apart; targets that
    are positions in the batch, as contrastive losses have them, cannot: they rightly follow no order.
    """
    options = {**call.options, "reduction": "none"}
    positions = getattr(F, call.name)(input=call.input, target=call.target, **options)
    found = {"value": call.rows(positions)}
    # Each row's target may be its own place in the batch.
    is_order = call.has_class_indices and torch.equal(call.target, torch.arange(call.target.numel()).to(call.target))
    for name, value in (("input", call.input), ("target", call.target)):
        if name == "target" and is_order:
            continue
        if value.dim() and len(value) and len(value) % call.samples == 0:
            found[name] = _one_number(value).reshape(call.samples, -1)
    return found


def rows_of_terms(terms: Terms) -> dict[str, Tensor]:
    """Return what the samples contribute to each sum of a loss, (B, sums at that place), by its place in the step.

    Each place is compared, not their sum, in which a small term that does not follow would be lost.
    """
    found: dict[str, list[Tensor]] = {}
    for term in terms.terms:
        found.setdefault(str(term), []).append(term.shares.detach())
    return {place: torch.stack(shares, 1) for place, shares in found.items()}


def are_all_positions(call: LossCall) -> bool:
    """Return whether the targets are the places of all rows in the batch, in whichever order: each row is to find another."""
    places = torch.arange(call.target.numel(), device=call.target.device)
    is_square = call.input.dim() == 2 and call.input.shape[-1] == len(places)
    return is_square and torch.equal(call.target.flatten().sort().values, places)


def size_of_input(call: LossCall) -> float:
    """Return how large the numbers are that a loss is computed from; its rounding errors are a part of that."""
    entries = call.input.reshape(-1)
    some = entries[:: max(1, len(entries) // 4096)].abs().float()
    some = some[some.isfinite()]
    return float(some.median()) if len(some) else 0.0


def largest(values: Tensor) -> float:
    """Return the size of the largest entry, not counting nan."""
    return float(values.nan_to_num(0.0).abs().max()) if values.numel() else 0.0


def _one_number(rows: Tensor) -> Tensor:
    """Return one number for each row, which tells rows apart: logits of a vocabulary are too large to be copied often."""
    flat = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
    flat = flat.float().nan_to_num(0.0).clamp(-1e4, 1e4)  # masked logits would hide the others
    return flat @ torch.arange(1.0, flat.shape[1] + 1, device=flat.device).cos()


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
        asked: What is asked of the step, for errors.
        exactness: How much of what the network computes may be rounding, relative to it.
        function: The argument that takes the place of the step; empty if none does.
        maker: What makes a batch of the samples.

    Attributes:
        targets: What the loss got as target, in order, if nothing random is in it.
    """

    asked: LossRequest
    exactness: float
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
        exactness = (_EXACT, 0.0) if name == "target" else (self.exactness, first.floors.get(name, 0.0))
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
            f"{self.asked.display_name} takes {taken}, and training_step arranges them otherwise: {when}, the "
            f"{_NAMES.get(name, name)} did not follow. The step may sort, shuffle, join views by torch.cat, or leave out or "
            f"repeat rows. {_PUT_BACK}. Or {self.asked.way_out}."
        )

    def _judge(self, tensors: Sequence[bool | None], values: Mapping[str, bool | None], in_order: bool) -> None:
        wrong = [name for name, follow in values.items() if follow is False]
        # A collate_fn that reorders moves them all; one alone may be no row a sample, and as long as the batch by chance.
        moved = False in tensors and True not in tensors
        if moved and (wrong or True not in values.values()):
            raise RuntimeError(
                f"{self.asked.display_name} takes row b of a batch for the b-th sample that was drawn, and {self.maker} "
                "does not keep that order: with the same samples in another order, the rows of its batch did not "
                f"follow. Let {self.maker} {_KEEP}."
            )
        if wrong and self.function:
            what = {"score_fn": "score", "loss_fn": "loss", "outputs_fn": "row"}[self.function]
            several = {"score": "scores", "loss": "losses", "row": "rows"}[what]
            raise RuntimeError(
                f"{self.asked.display_name} takes {what} b for the b-th sample that was drawn, and when the same samples "
                f"came in another order, the {several} of {self.function} did not follow. Return one {what} for each "
                "sample, in the order of the batch."
            )
        if wrong:
            self._refuse_step(wrong[0], "when the same samples came in another order", in_order)

    def _warn_of_noise(self, tensors_follow: bool) -> None:
        rest = "relies on the tensors of the batch, which do" if tensors_follow else "takes it for granted"
        rank_zero_warn(
            f"{self.asked.display_name} cannot see whether the rows of the loss follow the samples, because "
            f"training_step draws random numbers in eval mode too; it {rest}. Draw them in training mode only, to have "
            "it checked."
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
