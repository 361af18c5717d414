"""Whether a learning rate of one optimizer suits another, and what is said about rates and decays.

Used only by :class:`lightning_grad.callbacks.OptimizerSwap`.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_grad.callbacks.optimizers._names import USUAL_RATES, scale_of
from lightning_grad.core.steps.chosen_rates import base_rate, scale_rates_, scale_schedules_, unknown_schedulers

_OWN_UNIT = ("Adafactor", "Hessian", "Prodigy")  # no rate of another class can be meant for them
_SAID = {("Adam", "Lion"), ("Lion", "Adam")}  # scales so close that a hint is enough
_COUPLED = ("Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop")


def refuse_other_scale(display_name: str, old: Optimizer, kind: type) -> None:
    """Raise if the rates of an optimizer cannot be meant for another class. Call it if the user gives no factor.

    Raises:
        ValueError: With a usual factor.
    """
    before, after = scale_of(type(old)), scale_of(kind)
    differ = before != after and (before, after) not in _SAID
    if after is None or not (differ and (before is not None or after in _OWN_UNIT)):
        return
    rate = base_rate(old.param_groups[0])
    factor = _usual_factor(before, after, rate)
    raise ValueError(
        f"{display_name} would train {kind.__name__} with learning rate {rate:g}, which configure_optimizers sets for "
        f"{type(old).__name__}, but the usual rates of the two differ by about a factor of {factor:g}. Set "
        f"lr_factor={factor:g}, which is a usual start, or lr_factor=1.0 to keep {rate:g}."
    )


def _usual_factor(before: str | None, after: str, rate: float) -> float:
    """Return the factor between usual rates. The rate of Prodigy is 1, whatever it was."""
    if before is None or after == "Prodigy":
        return float(f"{USUAL_RATES[after] / rate:.3g}") if rate else 1.0
    return float(f"{USUAL_RATES[after] / USUAL_RATES[before]:.3g}")


def remarks(old: Optimizer, groups: Sequence[dict[str, Any]], new: Optimizer, lr_factor: float | None) -> list[str]:
    """Return what a user should know about the rates and decays of a new optimizer, each as a clause.

    Args:
        old: The old optimizer, for its class.
        groups: Copies of its groups.
        new: The new optimizer.
        lr_factor: Factor of the rates; ``None`` if the user gives none.
    """
    was, now = type(old).__name__, type(new).__name__
    decays = [group.get("weight_decay", 0.0) for group in groups]
    default = _default_decay(type(old))
    said = []
    if lr_factor is None and (scale_of(type(old)), scale_of(type(new))) == ("Adam", "Lion"):
        said.append(f"keeps the learning rate of {was}. {now} usually takes lr_factor=0.1 to 0.3 and wd_factor=3 to 10")
    if default and default in decays and type(old) is not type(new) and "weight_decay" in new.defaults:
        said.append(f"also takes over the weight decay {default:g}, which is the default of {was}")
    if lr_factor is None and type(old) is not type(new) and None in (scale_of(type(old)), scale_of(type(new))):
        said.append(f"keeps the learning rate of {was}, and does not know whether it suits {now}. lr_factor scales it")
    if any(decays) and "weight_decay" not in new.defaults:
        said.append(f"drops the weight decay, because {now} has none")
    elif any(decays) and _is_coupled(type(old), groups[0]) and not _is_coupled(type(new), new.param_groups[0]):
        said.append(f"turns the L2 penalty of {was} into decoupled weight decay of {now}")
    return said


def _default_decay(kind: type) -> float:
    parameter = inspect.signature(kind).parameters.get("weight_decay")
    is_number = parameter is not None and isinstance(parameter.default, (int, float))
    return float(parameter.default) if is_number and parameter is not None else 0.0


def _is_coupled(kind: type, group: dict[str, Any]) -> bool:
    """Return True if an adaptive optimizer adds the decay to the gradient, before it scales it."""
    decoupled = group.get("decoupled_weight_decay", group.get("weight_decouple"))
    return kind.__name__ in _COUPLED and not decoupled


def scale_all_(new: Optimizer, schedulers: Sequence[Any], factor: float) -> list[str]:
    """Multiply the rates of all groups of an optimizer and of its schedulers, and return what to say about them."""
    chosen = [(new, list(range(len(new.param_groups))))]
    scale_rates_(chosen, factor)
    scale_schedules_(chosen, schedulers, factor)
    unknown = unknown_schedulers(each for each in schedulers if getattr(each, "optimizer", None) is new)
    if not unknown:
        return []
    return [
        f"multiplies the base rates of {', '.join(unknown)}. Schedulers outside torch may compute rates from other values "
        "too, so look at the rates with LearningRateMonitor"
    ]


def rates_in_words(groups: Sequence[dict[str, Any]]) -> str:
    """Return rates and decays of groups in words, each value once.

    Example:
        >>> rates_in_words([{"lr": 0.1, "weight_decay": 0.0}, {"lr": 0.1, "weight_decay": 0.01}])
        'learning rate 0.1, weight decay 0 and 0.01'
    """
    rates = dict.fromkeys(f"{base_rate(group):g}" for group in groups)
    decays = dict.fromkeys(f"{float(group['weight_decay']):g}" for group in groups if "weight_decay" in group)
    words = [f"learning rate {' and '.join(rates)}"]
    return ", ".join(words + ([f"weight decay {' and '.join(decays)}"] if decays else []))
