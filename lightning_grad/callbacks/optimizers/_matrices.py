"""The matrices of a module that an optimizer of matrices moves, and the reasons why it leaves others.

Used only by :class:`lightning_grad.callbacks.OptimizerSwap`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from lightning_grad.core.views.network_ends import Ends
from lightning_grad.core.views.weight_choice import find_ends, found_weights, why_not
from lightning_grad.utilities.checks import owned_ids
from lightning_grad.utilities.parameters import all_names, clean_name, matches, named_owners, selects
from lightning_grad.utilities.reporting import listed

_SHOWN = 4


@dataclass(frozen=True)
class Choice:
    """What an optimizer of matrices moves.

    Args:
        chosen: Name and parameter of each matrix.
        left: Name of each other weight with two or more dimensions, and the reason.
        others: Number of all other parameters, such as biases.
    """

    chosen: list[tuple[str, nn.Parameter]]
    left: list[tuple[str, str]]
    others: int

    @property
    def names(self) -> list[str]:
        """Names of the matrices."""
        return [name for name, _ in self.chosen]

    def words(self) -> str:
        """Return the matrices in words."""
        noun = "matrix" if len(self.chosen) == 1 else "matrices"
        return f"{len(self.chosen)} {noun} ({listed(self.names, _SHOWN)})"

    def words_of_left(self) -> str:
        """Return what is left to another optimizer, by reason."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left:
            by_reason.setdefault(reason, []).append(name)
        parts = [f"{listed(names, _SHOWN)} ({reason})" for reason, names in by_reason.items()]
        parts += [f"{self.others} biases and other vectors"] if self.others else []
        return ", ".join(parts)


class MatrixChooser:
    """Chooses the hidden matrices of a module, those that :class:`lightning_grad.callbacks.NMSparsity` would choose.

    Args:
        display_name: Name of the callback.
        include: Names or wildcards of the matrices; None for all but the first and the last layer.
        exclude: Names or wildcards to skip.
    """

    effect = "moved by another optimizer"

    def __init__(self, display_name: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> None:
        self.display_name, self.include, self.exclude = display_name, include, exclude

    def why_excluded(self, names: Sequence[str]) -> str:
        """Return why a parameter with these names is excluded; empty if it is not."""
        return "excluded" if matches(names, self.exclude or []) else ""

    def choose(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> Choice:
        """Choose among the parameters of an optimizer.

        The first and the last layer are those of the whole module in the order of registration, because optimizers
        exist before the first batch.

        Raises:
            ValueError: If no matrix is left, with the reasons.
        """
        owned = owned_ids(optimizer)
        owners = list(named_owners(module))
        candidates = list(found_weights(module, owners, self))
        ends = find_ends(owners, candidates, self, Ends(trainer, module))
        candidates = [found for found in candidates if id(found.parameter) in owned]
        chosen: dict[int, tuple[str, nn.Parameter]] = {}
        reasons: dict[str, str] = {}
        for found in candidates:
            name, parameter = clean_name(found.name), found.parameter
            reason = why_not(found, self).partition(";")[0] or ("the first or the last layer" if name in ends else "")
            if not reason and not parameter.numel():
                reason = "without entries"
            if not reason and parameter.ndim != 2:
                reason = "a convolution, not a matrix"
            if not reason and not found.is_spelled and found.output_dimension() is None:
                reason = "its layer does not multiply by it"
            if reason:
                reasons[name] = reason
            else:
                chosen.setdefault(id(parameter), (name, parameter))
        self._explain_others(module, owned - chosen.keys(), reasons)
        choice = Choice(list(chosen.values()), list(reasons.items()), len(owned) - len(chosen) - len(reasons))
        for asked in self.include or []:
            if not any(matches(found.names, [asked]) for found in candidates):
                choice.left.append((asked, "not a linear layer; name parameters of other modules in full"))
        if not chosen:
            raise ValueError(f"{self.display_name} found no matrix to move. {self._why_none(choice)}")
        return choice

    def _explain_others(self, module: nn.Module, left: set[int], reasons: dict[str, str]) -> None:
        """Add weights that no pattern names, and those that are not layers, such as embeddings, to the reasons."""
        names = all_names(module)
        parameters = {id(parameter): parameter for parameter in module.parameters()}
        for key, parameter in parameters.items():
            if key in left and parameter.ndim > 1 and not reasons.keys() & set(names[key]):
                is_asked = selects(names[key], self.include)
                reasons[names[key][0]] = "not the matrix of a linear layer" if is_asked else "not in include"

    def _why_none(self, choice: Choice) -> str:
        if not choice.left:
            return "The optimizer holds no weight with two dimensions. Use another, or skip it with which=[...]."
        way_out = "Choose matrices with include=, use another optimizer, or skip this one with which=[...]"
        return f"It skips {choice.words_of_left()}. {way_out}."
