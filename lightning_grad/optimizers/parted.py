"""One optimizer in front of several: chosen parameters move by other classes, the rest by the class of the user."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from lightning_grad.utilities.checks import check_finite_above, check_finite_at_least


@dataclass(frozen=True, eq=False)
class Part:
    """Parameters of an optimizer that move by another class.

    Args:
        parameters: The parameters, as tensors or as pairs (name, tensor). Each must be in a group of the optimizer.
        make: Class or function that creates an optimizer from groups.
        options: Its options; the others get their defaults.
        lr_factor: Factor of the learning rates of the groups.
        wd_factor: Factor of the weight decays of the groups.
        weight_decay: Weight decay in place of those of the groups.
        cycle_momentum: Take over the momentum of the groups, or beta1, before each step. For schedulers that cycle it.

    Raises:
        ValueError: For a factor or a decay that is negative or not finite, and for an ``lr_factor`` of 0.
    """

    parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]]
    make: Callable[..., Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    lr_factor: float = 1.0
    wd_factor: float = 1.0
    weight_decay: float | None = None
    cycle_momentum: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))  # an iterator would be empty the second time
        check_finite_above(self.lr_factor, 0, "lr_factor")
        check_finite_at_least(self.wd_factor, 0, "wd_factor")
        check_finite_at_least(self.weight_decay, 0, "weight_decay")

    @property
    def named(self) -> dict[int, tuple[str | None, Tensor]]:
        """Name and tensor of each parameter, by its id."""
        pairs = [(None, each) if isinstance(each, Tensor) else each for each in self.parameters]
        return {id(parameter): (name, parameter) for name, parameter in pairs}

    def follow(self, inner: dict[str, Any], outer: Mapping[str, Any]) -> None:
        """Set the rate, the decay and the momentum of a group of the part from the user's group."""
        inner["lr"] = _times(outer["lr"], self.lr_factor)
        if "weight_decay" in inner:
            inner["weight_decay"] = self.decay_of(outer)
        momentum = outer["betas"][0] if "betas" in outer else outer.get("momentum")
        if self.cycle_momentum and momentum is not None:
            if "betas" in inner:
                inner["betas"] = (momentum, *inner["betas"][1:])
            elif "momentum" in inner:
                inner["momentum"] = momentum

    def decay_of(self, outer: Mapping[str, Any]) -> float:
        """Return the weight decay of the part for one of the user's groups."""
        decay = outer.get("weight_decay", 0.0) * self.wd_factor if self.weight_decay is None else self.weight_decay
        return float(decay)


def _times(rate: Any, factor: float) -> Any:
    return rate if factor == 1.0 else rate * factor


@dataclass
class _Inner:
    """An optimizer behind, with the number of the user's group of each of its groups."""

    optimizer: Optimizer
    numbers: list[int]

    def pairs(self, outer: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield each of its groups with the user's group."""
        for inner, number in zip(self.optimizer.param_groups, self.numbers, strict=True):
            yield inner, outer[number]


class PartedOptimizer(Optimizer):
    r"""Move chosen parameters by other optimizer classes, and the rest by the class and the options that it has.

    It holds the very groups of the optimizer that it takes over: the same list, the same dictionaries. So schedulers,
    monitors and everything else that reads or sets rates see the groups that they know. Before each step, the
    optimizers behind it take over rates and weight decays, each multiplied by the factors of its part. The rest
    follows all options of the groups, such as betas that a scheduler cycles.

    ``state`` holds the state of all parameters. ``state_dict`` also holds what the parts keep in their groups.
    Parameters that are added later belong to the rest.

    Args:
        optimizer: The optimizer to take over, before its first step. Its schedulers must be created on the new object.
        parts: The parameters that move by other classes. Each parameter belongs to one part at most.

    Raises:
        ValueError: If a part has no parameter, one that the optimizer does not hold, or one of another part; if the
            optimizer evaluates closures itself or has modes for training and evaluation; and for a state that was
            saved with other parts.

    Example:
        >>> weight, bias = (torch.nn.Parameter(torch.ones(*shape)) for shape in ((4, 4), (4,)))
        >>> adamw = torch.optim.AdamW([weight, bias], lr=0.1)
        >>> optimizer = PartedOptimizer(adamw, [Part([weight], torch.optim.SGD, {"momentum": 0.9}, lr_factor=10.0)])
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
        >>> (weight.sum() + bias.sum()).backward()
        >>> optimizer.step()
        >>> list(optimizer.state[weight]), list(optimizer.state[bias])
        (['momentum_buffer'], ['step', 'exp_avg', 'exp_avg_sq'])
    """

    def __init__(self, optimizer: Optimizer, parts: Sequence[Part]) -> None:
        _refuse(optimizer)
        _check_parts(optimizer, parts)
        own_state = optimizer.state
        # The constructor would copy the lists of parameters, and refuse their names.
        super().__init__(
            next(group["params"] for group in optimizer.param_groups if group["params"]), optimizer.defaults
        )
        self.param_groups = optimizer.param_groups
        self._parts = tuple(parts)
        taken = {key for part in parts for key in part.named}
        self._known = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        self._behind = [self._make(part) for part in parts]
        self._rest = self._left(optimizer, taken)
        self.state = defaultdict(dict, {p: own_state[p] for p in own_state if id(p) not in taken})
        for inner in self._behind:
            self.state.update(inner.optimizer.state)  # of classes that begin with a state
        self._share_state()
        self._seen = [self._values(group) for group in self.param_groups]

    def _make(self, part: Part) -> _Inner:
        """Create the optimizer of a part."""
        named, groups, numbers = part.named, [], []
        for number, outer in enumerate(self.param_groups):
            chosen = [named[id(parameter)] for parameter in outer["params"] if id(parameter) in named]
            if chosen:
                has_names = all(name is not None for name, _ in chosen)
                params = chosen if has_names else [parameter for _, parameter in chosen]
                groups.append({"params": params, "lr": _times(outer["lr"], part.lr_factor)})
                groups[-1]["weight_decay"] = part.decay_of(outer)
                numbers.append(number)
        made = part.make(groups, **part.options)
        if "weight_decay" not in made.defaults:
            for group in made.param_groups:
                del group["weight_decay"]
        return _Inner(made, numbers)

    def _left(self, optimizer: Optimizer, taken: set[int]) -> _Inner:
        """Return an optimizer of the user's class with the parameters of no part.

        It gets the attributes of the user's optimizer, because a constructor may take options that it stores nowhere.
        """
        rest = object.__new__(type(optimizer))
        rest.__dict__.update({key: value for key, value in vars(optimizer).items() if key != "step"})
        for key, value in vars(optimizer).items():
            if isinstance(value, OrderedDict) and key.endswith("_hooks"):
                vars(rest)[key] = OrderedDict()  # the user's hooks run around the step of the whole
        left = [[p for p in group["params"] if id(p) not in taken] for group in self.param_groups]
        numbers = [number for number, parameters in enumerate(left) if parameters]
        rest.param_groups = [{**self._values(self.param_groups[number]), "params": left[number]} for number in numbers]
        return _Inner(rest, numbers)

    def _share_state(self) -> None:
        """Let all optimizers use one state: their parameters differ."""
        for inner in self._all:
            inner.optimizer.state = self.state

    @property
    def _all(self) -> list[_Inner]:
        return [*self._behind, self._rest]

    @property
    def parts(self) -> tuple[Optimizer, ...]:
        """The optimizers behind it that hold parameters; that of the user's class is the last one."""
        return tuple(inner.optimizer for inner in self._all if inner.numbers)

    def group_of(self, part: Optimizer, index: int) -> int:
        """Return the index of the user's group that a group of one of the parts belongs to."""
        return next(inner.numbers[index] for inner in self._all if inner.optimizer is part)

    @staticmethod
    def _values(group: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in group.items() if key not in ("params", "param_names")}

    # One step.

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @_disable_dynamo  # which takes the counts of steps of all classes for tensors
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step with all parameters.

        Args:
            closure: Evaluates the loss; called once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adopt()
        self.follow()
        for part in self.parts:
            part.step()
        self._show()
        return loss

    def _adopt(self) -> None:
        """Give parameters that were added since the last step to the rest."""
        if self._known.issuperset(id(parameter) for group in self.param_groups for parameter in group["params"]):
            return
        rest = self._rest
        for number, group in enumerate(self.param_groups):
            new = [parameter for parameter in group["params"] if id(parameter) not in self._known]
            if new and number in rest.numbers:
                rest.optimizer.param_groups[rest.numbers.index(number)]["params"].extend(new)
            elif new:
                rest.optimizer.param_groups.append({**self._values(group), "params": new})
                rest.numbers.append(number)
            self._known.update(map(id, new))
        self._seen += [self._values(group) for group in self.param_groups[len(self._seen) :]]

    def follow(self) -> None:
        """Take over rates and other options from the groups. :meth:`step` does so first."""
        for part, inner in zip(self._parts, self._behind, strict=True):
            for group, outer in inner.pairs(self.param_groups):
                part.follow(group, outer)
        # The class of the user may keep a state in its groups, so only what others assigned goes there.
        for number, (group, outer) in zip(self._rest.numbers, self._rest.pairs(self.param_groups), strict=True):
            seen = self._seen[number]
            group.update({key: each for key, each in self._values(outer).items() if seen.get(key) is not each})
            group["lr"] = outer["lr"]

    def _show(self) -> None:
        """Show in the user's groups what the rest has changed in its own."""
        for number, (group, outer) in zip(self._rest.numbers, self._rest.pairs(self.param_groups), strict=True):
            outer.update(self._values(group))
            self._seen[number] = self._values(outer)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Return the state of an optimizer, and under ``parts`` the options and states of the groups of each part."""
        groups = [[self._values(group) for group in inner.optimizer.param_groups] for inner in self._behind]
        return {**super().state_dict(), "parts": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of an optimizer with the same parts. Each part restores the types of its own state.

        Raises:
            ValueError: If it was saved by another optimizer, or with other parts.
        """
        saved = state_dict.get("parts")
        sizes = [len(inner.numbers) for inner in self._behind]
        if saved is None or [len(groups) for groups in saved] != sizes:
            was = "no parts" if saved is None else f"groups {[len(groups) for groups in saved]}"
            raise ValueError(f"the state must have parts with {sizes} groups; got {was}. Load it with the same parts.")
        self._adopt()
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "parts"})
        groups, states = state_dict["param_groups"], state_dict["state"]
        ids: dict[int, int] = {}
        for group, loaded in zip(groups, self.param_groups, strict=True):
            ids |= {id(p): key for p, key in zip(loaded["params"], group["params"], strict=True)}
        own = [self._values(self.param_groups[number]) for number in self._rest.numbers]
        whole = self.state
        for inner, values in zip(self._all, [*saved, own], strict=True):
            keys = [[ids[id(p)] for p in group["params"]] for group in inner.optimizer.param_groups]
            inner_groups = [{**each, "params": its} for each, its in zip(values, keys, strict=True)]
            inner_states = {key: states[key] for its in keys for key in its if key in states}
            _load(inner.optimizer, {"state": inner_states, "param_groups": inner_groups})
            whole.update(inner.optimizer.state)
        self._share_state()
        self._seen = [self._values(group) for group in self.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds."""
        own = {key: vars(self)[key] for key in ("_parts", "_behind", "_rest", "_seen")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, a pickle or a state dict."""
        super().__setstate__(state)
        self._known = {id(parameter) for group in self.param_groups for parameter in group["params"]}


def _load(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    names = [group.get("param_names") for group in optimizer.param_groups]
    for group, known in zip(state_dict["param_groups"], names, strict=True):
        if known is not None:
            group["param_names"] = known
    optimizer.load_state_dict(state_dict)


def _refuse(optimizer: Optimizer) -> None:
    kind = type(optimizer).__name__
    if kind == "LBFGS":
        raise ValueError("LBFGS moves all parameters along one line, so it cannot be parted. Use another optimizer.")
    if hasattr(optimizer, "train") and hasattr(optimizer, "eval"):
        raise ValueError(f"{kind} averages weights in modes of its own, so it cannot be parted. Use another optimizer.")


def _check_parts(optimizer: Optimizer, parts: Iterable[Part]) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    seen: set[int] = set()
    for part in parts:
        keys = part.named.keys()
        if not keys or not keys <= held:
            what = "no parameter" if not keys else f"{len(keys - held)} parameters that no group holds"
            raise ValueError(f"each part must have parameters of the {type(optimizer).__name__}; got {what}.")
        if keys & seen:
            raise ValueError(f"each parameter must be in one part at most; {len(keys & seen)} are in two.")
        seen |= keys
