"""Replace an optimizer of a run, for every object that holds it."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.optim import Optimizer

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def replace_optimizer(old: Optimizer, new: Optimizer, schedulers: Iterable[Any]) -> Callable[[], None]:
    """Replace an optimizer in its schedulers and everywhere else.

    Schedulers, and the schedulers that they step, get the new object. Other references (an
    attribute of the module, a function that encloses it) keep the old object, which from now on
    shares its ``__dict__`` with the new one: groups, state, hooks and ``step``. The groups stay the
    same dictionaries, and hooks that were registered on the old optimizer run on the new one.

    A scheduler that cycles the momentum asked at its construction whether the optimizer has
    ``betas`` or ``momentum``; it asks again here.

    Args:
        old: Optimizer that has not made a step.
        new: Optimizer with as many groups, in the same order.
        schedulers: Schedulers of the run.

    Returns:
        Callable: Gives the old object its own groups and state again, and the old object to
            schedulers.

    Example:
        >>> import torch
        >>> old = torch.optim.AdamW([torch.zeros(1)], lr=0.5)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(old, step_size=1)
        >>> new = torch.optim.SGD([dict(old.param_groups[0])])
        >>> give_back = replace_optimizer(old, new, [scheduler])
        >>> old.step()  # a step of the new optimizer
        >>> scheduler.step()
        >>> new.param_groups[0]["lr"], old.param_groups is new.param_groups
        (0.05, True)
    """
    found = list(held_schedulers(schedulers))
    cycling = [each for each in found if _cycles(each, old)]
    momenta = _momenta(old) if cycling else []
    own = {**vars(old), "param_groups": [dict(group) for group in old.param_groups]}
    _keep_groups(old, new)
    _share(old, new)
    _rebind(found, old, new)
    for scheduler in cycling:
        _match_momentum(scheduler, new, momenta)

    def give_back() -> None:
        old.__dict__ = own
        _rebind(found, new, old)

    return give_back


def _keep_groups(old: Optimizer, new: Optimizer) -> None:
    """Fill the old groups with the new values, because a user may hold the list or one of its dictionaries."""
    for kept, group in zip(old.param_groups, new.param_groups, strict=True):
        if kept is not group:
            kept.clear()
            kept.update(group)
    new.param_groups = old.param_groups


def _share(old: Optimizer, new: Optimizer) -> None:
    # Setting old.__class__ would be simpler, but Python refuses it for classes with another layout.
    for name in _HOOKS:
        hooks = vars(old)[name]  # the same dictionary, which the handles of the user's hooks refer to
        hooks.update(vars(new)[name])
        vars(new)[name] = hooks
    _track_steps(new)
    old.__dict__ = new.__dict__


def _track_steps(optimizer: Optimizer) -> None:
    """Mark steps as a torch scheduler does at its construction; otherwise each scheduler warns at its second step."""
    step_of_class = type(optimizer).step

    @functools.wraps(step_of_class)
    def step(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return step_of_class(optimizer, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step  # type: ignore[method-assign]


def held_schedulers(holders: Iterable[Any]) -> Iterator[Any]:
    """Yield schedulers and all schedulers that they hold, under any attribute, each once.

    Args:
        holders: Schedulers of the run. A scheduler is an object with ``step`` and ``state_dict``.
    """
    seen: set[int] = set()
    waiting = list(holders)
    while waiting:
        each = waiting.pop(0)
        if isinstance(each, (list, tuple)):
            waiting.extend(each)
        elif isinstance(each, dict):
            waiting.extend(each.values())
        elif _is_scheduler(each) and id(each) not in seen:
            seen.add(id(each))
            waiting.extend(vars(each).values())
            yield each


def _is_scheduler(thing: Any) -> bool:
    has_both = hasattr(thing, "step") and hasattr(thing, "state_dict")
    return has_both and hasattr(thing, "__dict__") and not isinstance(thing, (Optimizer, type))


def _rebind(schedulers: Iterable[Any], old: Optimizer, new: Optimizer) -> None:
    for scheduler in schedulers:
        values = vars(scheduler)
        values.update({key: _replaced(value, old, new) for key, value in values.items()})


def _replaced(value: Any, old: Optimizer, new: Optimizer) -> Any:
    """Return a value with the new optimizer in place of the old one; lists are changed in place."""
    if value is old:
        return new
    if isinstance(value, list):
        value[:] = [_replaced(item, old, new) for item in value]
    elif type(value) is tuple and any(item is old for item in value):
        return tuple(_replaced(item, old, new) for item in value)
    return value


def _cycles(scheduler: Any, optimizer: Optimizer) -> bool:
    """Return True if a scheduler of torch cycles the momentum of an optimizer."""
    is_known = getattr(scheduler, "cycle_momentum", False) and hasattr(scheduler, "use_beta1")
    return is_known and scheduler.optimizer is optimizer


def _momenta(optimizer: Optimizer) -> list[Any]:
    uses_beta1 = "betas" in optimizer.defaults
    return [group["betas"][0] if uses_beta1 else group["momentum"] for group in optimizer.param_groups]


def _match_momentum(scheduler: Any, optimizer: Optimizer, momenta: list[Any]) -> None:
    """Let a scheduler cycle what the new optimizer has: beta1, momentum or neither."""
    scheduler.use_beta1 = "betas" in optimizer.defaults
    scheduler.cycle_momentum = scheduler.use_beta1 or "momentum" in optimizer.defaults
    for group, momentum in zip(optimizer.param_groups, momenta, strict=True):
        if scheduler.use_beta1:
            group["betas"] = (momentum, *group["betas"][1:])
        elif scheduler.cycle_momentum:
            group["momentum"] = momentum
