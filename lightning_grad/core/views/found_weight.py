"""The weights of a module that may be chosen, and what is known of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_grad.core.views.network_ends import Owner
from lightning_grad.core.views.weight_view import REPLACEMENTS, viewed_class
from lightning_grad.utilities.parameters import all_names, clean_name, is_spelled, matches
from lightning_grad.utilities.weight_axes import is_foreign_matrix, output_dimension

_SINGLE_WEIGHT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class FoundWeight:
    """A parameter that may be chosen.

    Args:
        name: Full name, as in ``state_dict``.
        module: The module that owns it.
        attribute: Its name there.
        names: All names under which it is known, without the prefix of compiled modules.
        twins: Other owners of the same, tied parameter, each with its attribute.
        is_known: Whether its module is a layer of torch that reads the attribute for every use.
        is_spelled: Whether the user has spelled its name to the end.
        label: Who asks, for errors.
        effect: What it makes of a weight, an adjective.
    """

    name: str
    module: nn.Module
    attribute: str
    names: tuple[str, ...] = ()
    twins: tuple[tuple[nn.Module, str], ...] = ()
    is_known: bool = True
    is_spelled: bool = False
    label: str = "A technique"
    effect: str = "different"

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, which holds the dense weight.

        Raises:
            RuntimeError: If something has taken it out of its layer.
        """
        parameter = self.module._parameters.get(self.attribute)
        if parameter is None:
            raise RuntimeError(
                f"{self.label} makes {clean_name(self.name)} {self.effect}, and something has taken it out of its layer "
                "in mid-fit, as pruning, weight_norm, spectral_norm and parametrize do. Do that before the fit, or leave "
                f"the layer out: exclude=[{clean_name(self.name)!r}]."
            )
        return parameter

    @property
    def in_place(self) -> bool:
        """Whether the module is shown the weight by writing it into the parameter."""
        return bool(self.twins) or not self.is_known

    def output_dimension(self) -> int | None:
        """Return the dimension that counts the layer's outputs; ``None`` if the layer computes neither x W nor x W^T."""
        return output_dimension(self.module, self.attribute)

    def class_name(self) -> str:
        """Return the name of the class that the user gave the module."""
        return viewed_class(self.module).__name__


def found_weights(
    module: nn.Module, owners: Sequence[Owner], include: Sequence[str] | None, label: str, effect: str
) -> Iterator[FoundWeight]:
    """Yield the parameters of a module that a technique may choose, a tied one once for each owner.

    Layers of torch are known by their type, other linear layers by a matrix named ``weight``, and parameters of other modules
    only where a pattern spells their own name.

    Args:
        module: The LightningModule, complete.
        owners: Name, module and attribute of its parameters.
        include: Name patterns of the user; ``None`` means all that are known.
        label: Who asks.
        effect: What it makes of a weight.
    """
    known = all_names(module)
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, owner, attribute in owners:
        uses.setdefault(id(owner._parameters[attribute]), []).append((owner, attribute))
    for name, owner, attribute in owners:
        key = id(owner._parameters[attribute])
        found = FoundWeight(
            name,
            owner,
            attribute,
            names=tuple(known[key]),
            twins=tuple(use for use in uses[key] if use != (owner, attribute)),
            is_known=_is_known(owner, attribute),
            is_spelled=is_spelled(known[key], include or []),
            label=label,
            effect=effect,
        )
        if found.is_spelled or (_is_layer(found) and (include is None or matches(found.names, include))):
            yield found


def _is_known(owner: nn.Module, attribute: str) -> bool:
    if isinstance(owner, nn.MultiheadAttention):
        return attribute in _ATTENTION_WEIGHTS
    return isinstance(owner, _SINGLE_WEIGHT) and attribute == "weight"


def _is_layer(found: FoundWeight) -> bool:
    is_matrix = found.attribute == "weight" and is_foreign_matrix(found.module, found.attribute)
    return found.is_known or is_matrix


def replaced_weights(module: nn.Module) -> list[str]:
    """Return the weights in whose place something else computes another."""
    found = []
    for name, layer in module.named_modules():
        replaced = layer._parameters.keys() & {f"weight_{end}" for end in REPLACEMENTS}
        if isinstance(layer, _SINGLE_WEIGHT) and (replaced or is_parametrized(layer, "weight")):
            found.append(clean_name(f"{name}.weight"))
    return found
