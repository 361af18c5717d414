"""An optimizer with the groups of another one.

Used only by :class:`lightning_grad.callbacks.OptimizerSwap`.
"""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_grad.callbacks.optimizers._carried import carried_group, carry_defaults_
from lightning_grad.callbacks.optimizers._names import Make, refuse_second_order
from lightning_grad.callbacks.optimizers._options import class_of, name_of, own_options
from lightning_grad.callbacks.optimizers._refusals import refuse_one_decay, refuse_own_values, refuse_wrong_groups


def create_optimizer(
    display_name: str,
    make: Make,
    old: Optimizer,
    given: Mapping[str, Any],
    factors: tuple[float | None, float | None],
    may_keep_options: bool,
) -> Optimizer:
    """Create the optimizer that replaces one of the module's, which is not changed.

    Args:
        display_name: Name of the callback, for errors.
        make: Class or callable.
        old: The module's optimizer.
        given: Options of the constructor; a weight decay counts for all groups.
        factors: Factors of the rates and of the weight decays; the caller scales the rates of the groups.
        may_keep_options: Whether an optimizer of the same class keeps the options that are not given.

    Raises:
        ValueError: If it cannot be created for these groups.
    """
    same = class_of(make) is type(old) and may_keep_options
    options = {**(own_options(old) if same else {}), **given}
    lr_factor, wd_factor = (1.0 if factor is None else factor for factor in factors)
    decay = options.pop("weight_decay", None)
    refuse_one_decay(display_name, decay, old)
    named = given.keys() - {"weight_decay"}
    groups = [carried_group(group, old, same, wd_factor, decay, named) for group in old.param_groups]
    try:
        new = make(groups, **options)
    except Exception as error:
        raise ValueError(
            f"{display_name} cannot create {name_of(make)} for the groups of {type(old).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error
    refuse_wrong_groups(display_name, new, old)
    if type(new) is not type(old):
        refuse_second_order(type(new))
    refuse_own_values(display_name, make, new)
    carry_defaults_(new, old, lr_factor, wd_factor, decay)
    return new
