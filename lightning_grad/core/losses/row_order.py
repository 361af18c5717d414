"""Compare rows of a batch run in several orders, and raise if they do not follow their samples.

The comparisons are pure functions of tensors; :class:`RowComparison` applies them to runs of one
batch.
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
    """Yield orders of a batch that together reveal any rearrangement of its samples; the first one moves every sample.

    A rearrangement that does not depend on the data, such as reversal, is revealed only by an order
    that does not commute with it. With three or more samples, only the identity commutes with both
    orders.

    Example:
        >>> [order.tolist() for order in orders_of(4)]
        [[1, 2, 3, 0], [2, 1, 3, 0]]
    """
    rolled = torch.arange(samples).roll(-1)
    yield rolled
    if samples > 2:
        yield torch.cat([rolled[:2].flip(0), rolled[2:]])


def follows(before: Tensor, after: Tensor, order: Tensor, tolerance: float = 0.0, floor: float = 0.0) -> bool | None:
    """Return True if rows follow reordered samples, ``None`` if they are too similar to decide.

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
    """Return True if two tensors are equal up to rounding errors of another summation order.

    Args:
        one: Any tensor.
        other: Another tensor.
        tolerance: Tolerance relative to each entry, and to the median entry.
        floor: Absolute tolerance.

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
    """Return True if two tensors have the same rows in any order, ``None`` if the rows are too similar to decide.

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
    """Return the losses of the positions of each sample, (B, P), and numbers that identify the inputs of its loss.

    The losses decide. If they are all similar or random, the inputs distinguish the samples.
    Targets that are positions in the batch, as in contrastive losses, are omitted: they do not
    depend on the order of the samples.
    """
    options = {**call.options, "reduction": "none"}
    positions = getattr(F, call.name)(input=call.input, target=call.target, **options)
    found = {"value": call.rows(positions)}
    # In contrastive losses, the target of each row may be its own position in the batch.
    is_order = call.has_class_indices and torch.equal(call.target, torch.arange(call.target.numel()).to(call.target))
    for name, value in (("input", call.input), ("target", call.target)):
        if name == "target" and is_order:
            continue
        if value.dim() and len(value) and len(value) % call.samples == 0:
            found[name] = _one_number(value).reshape(call.samples, -1)
    return found


def rows_of_terms(terms: Terms) -> dict[str, Tensor]:
    """Return the contributions of the samples to each sum in a loss, (B, sums), by the sum's location in the step.

    Each location is compared separately, because a small term that does not follow would be lost in
    the total.
    """
    found: dict[str, list[Tensor]] = {}
    for term in terms.terms:
        found.setdefault(str(term), []).append(term.shares.detach())
    return {place: torch.stack(shares, 1) for place, shares in found.items()}


def are_all_positions(call: LossCall) -> bool:
    """Return True if the targets are the positions of all rows in the batch, in any order, as in contrastive losses."""
    places = torch.arange(call.target.numel(), device=call.target.device)
    is_square = call.input.dim() == 2 and call.input.shape[-1] == len(places)
    return is_square and torch.equal(call.target.flatten().sort().values, places)


def size_of_input(call: LossCall) -> float:
    """Return the typical magnitude of a loss's inputs, to which its rounding errors are proportional."""
    entries = call.input.reshape(-1)
    some = entries[:: max(1, len(entries) // 4096)].abs().float()
    some = some[some.isfinite()]
    return float(some.median()) if len(some) else 0.0


def largest(values: Tensor) -> float:
    """Return the largest absolute entry, ignoring nan."""
    return float(values.nan_to_num(0.0).abs().max()) if values.numel() else 0.0


def _one_number(rows: Tensor) -> Tensor:
    """Return one number that identifies each row: copying the logits of a vocabulary would take too much memory."""
    flat = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
    flat = flat.float().nan_to_num(0.0).clamp(-1e4, 1e4)  # masked logits would hide the others
    return flat @ torch.arange(1.0, flat.shape[1] + 1, device=flat.device).cos()


_EXACT = 1e-5
_NAMES = {"value": "losses", "input": "input of the loss", "target": "target of the loss"}
_PUT_BACK = (
    "Before the loss, restore the order of the samples, with all rows of a sample together: use "
    "torch.stack([x, x], 1).flatten(0, 1) instead of torch.cat([x, x])"
)
_KEEP = (
    "keep the order of the samples. If a layer needs sorted samples, sort them in training_step and restore the order "
    "before the loss; pack_padded_sequence(enforce_sorted=False) does both"
)


@dataclass
class Seen:
    """The rows found in one run of a batch.

    Args:
        tensors: Tensors of the batch that have a row for each sample.
        values: Results of the step for each sample, (B, ...), by name.
        floors: Absolute tolerance of each value, by name; 0 if missing.
        terms: Terms that the values come from, if they do not come from a call.
    """

    tensors: list[Tensor] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    terms: Terms | None = None


See = Callable[[Tensor, int], Seen | None]


@dataclass
class RowComparison:
    """Compares runs of the same samples in several orders, and raises if rows do not follow their samples.

    Args:
        asked: Requirements on the step, for errors.
        exactness: Relative tolerance of values that the network computes.
        function: Name of the argument that replaces the step; empty if there is none.
        maker: The code that builds a batch from samples, for errors.

    Attributes:
        targets: Targets of the loss, in order, if they are not random.
    """

    asked: LossRequest
    exactness: float
    function: str = ""
    maker: str = "collate_fn"
    targets: Tensor | None = field(default=None, init=False)

    def compare(self, see: See, samples: int, in_order: bool = True) -> bool:
        """Compare the rows of some samples in their own order with those in other orders.

        Args:
            see: Function (order, seed) that runs the samples; returns ``None`` if they have no
                loss.
            samples: Number of samples.
            in_order: Whether row b must belong to sample b. If False, the rows of a sample must
                only be adjacent.

        Returns:
            bool: False if the samples have no loss to compare.

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
        # Every term must be shown to follow. For a call one value is enough: its inputs and losses
        # agree.
        if len(same) < len(first.values) and (first.terms is not None or True not in values.values()):
            self._warn_of_noise(True in verdicts)
        return True

    def _follow(self, first: Seen, other: Seen, name: str, order: Tensor, in_order: bool = True) -> bool | None:
        if name not in other.values:
            return False
        own, others = first.values[name], other.values[name]
        # Targets are not computed by the network, so they must be equal almost exactly.
        exactness = (_EXACT, 0.0) if name == "target" else (self.exactness, first.floors.get(name, 0.0))
        return follows(own, others, order, *exactness) if in_order else same_rows(own, others, *exactness)

    def refuse_moved(self, rows: Tensor | None, others: Tensor | None, name: str) -> None:
        """Raise if two runs of the same samples have the same rows in different places: the step shuffles them."""
        if rows is None or others is None or is_close(others, rows, 1e-3):
            return
        if same_rows(rows, others, 1e-3):
            self._refuse_step(name, "when the same samples were run again")

    def _refuse_step(self, name: str, when: str, in_order: bool = True) -> None:
        needed = "the rows of the loss in the order of the samples"
        needed = needed if in_order else "all rows of a sample next to each other in the loss"
        raise RuntimeError(
            f"{self.asked.display_name} needs {needed}, but training_step arranges them differently: {when}, the "
            f"{_NAMES.get(name, name)} did not follow. The step may sort, shuffle, drop or repeat rows, or "
            f"concatenate views with torch.cat. {_PUT_BACK}. Or {self.asked.way_out}."
        )

    def _judge(self, tensors: Sequence[bool | None], values: Mapping[str, bool | None], in_order: bool) -> None:
        """Raise the error that names the culprit: the maker of the batch, the user's function, or the step."""
        wrong = [name for name, follow in values.items() if follow is False]
        # A collate_fn that reorders moves all tensors. A single one may not hold rows of samples at
        # all, and have the length of the batch by chance.
        moved = False in tensors and True not in tensors
        if moved and (wrong or True not in values.values()):
            raise RuntimeError(
                f"{self.asked.display_name} needs the b-th sample drawn in row b of the batch, but {self.maker} "
                "changes the order: when the samples were reordered, the rows of the batch did not "
                f"follow. Make {self.maker} {_KEEP}."
            )
        if wrong and self.function:
            what = {"score_fn": "score", "loss_fn": "loss", "outputs_fn": "row"}[self.function]
            several = {"score": "scores", "loss": "losses", "row": "rows"}[what]
            raise RuntimeError(
                f"{self.asked.display_name} expects {what} b to belong to the b-th sample drawn, but when the samples "
                f"were reordered, the {several} of {self.function} did not follow. Return one {what} for each sample, in "
                "the order of the batch."
            )
        if wrong:
            self._refuse_step(wrong[0], "when the samples were reordered", in_order)

    def _warn_of_noise(self, tensors_follow: bool) -> None:
        rest = "relies on the tensors of the batch, which do follow" if tensors_follow else "assumes that they do"
        rank_zero_warn(
            f"{self.asked.display_name} cannot check that the rows of the loss follow the samples, because "
            f"training_step draws random numbers in eval mode too; it {rest}. Draw them only in training mode to "
            "enable the check."
        )


def _decisive(values: Mapping[str, bool | None]) -> dict[str, bool | None]:
    """Return the verdict on the losses, or on their inputs if the losses are all similar or random."""
    if values.get("value") is not None:
        return {"value": values["value"]}
    return {name: verdict for name, verdict in values.items() if name != "value"}


def _tensors_follow(first: Seen, again: Seen, other: Seen, order: Tensor) -> list[bool | None]:
    """Return for each tensor of the batch, except random ones, whether its rows follow."""
    if not len(first.tensors) == len(again.tensors) == len(other.tensors):
        return []
    found = zip(first.tensors, again.tensors, other.tensors, strict=True)
    return [follows(one, two, order, _EXACT) for one, same, two in found if is_close(same, one, _EXACT)]
