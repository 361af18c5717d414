"""The base of every callback that changes gradients before the optimizer uses them. Read ``callback.py`` first.

A technique derives from :class:`GradientConditioner`, sets its ``role``, and defines one method,
``condition``: the rule, which changes gradients in place and returns the values to log. In each
optimizer step the base calls it once for each bucket, a set of parameters with the same threshold.
The base also keeps, saves and restores the rule's state, logs, and refuses what cannot work. The
rules are in ``functional/clipping``.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core.callback import Chosen, GradCallback
from lightning_grad.core.compatibility import NO_ENGINE, SCALED, Compatibility, no, yes
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.gradient_step import GradientStep, Memory, gather
from lightning_grad.core.roles import ANSWERS, Role, refuse_order, warn_of_other_clippers
from lightning_grad.functional.plain_tensors import on_plain_tensors
from lightning_grad.utilities.arguments import plain
from lightning_grad.utilities.checks import check_above, warn_of_missing_momentum
from lightning_grad.utilities.optimizers import Shape, optimizer_index, optimizer_shape
from lightning_grad.utilities.parameters import all_names, as_names, check_patterns, selects, why_none_left
from lightning_grad.utilities.reporting import counted, is_log_step, listed, log_summary
from lightning_grad.utilities.thresholds import Bucket, Threshold, as_threshold, choose_buckets

__all__ = ["ELEMENTWISE", "GradientConditioner", "GradientStep", "Role"]


class GradientConditioner(GradCallback):
    """A rule that changes gradients after accumulation, unscaling and reduction, and before the optimizer's step.

    Class attributes:

    - ``role``: its place among other techniques: guard, center, clip, noise, observe.
    - ``threshold_name``: the constructor argument that may be one number, a mapping from name
      patterns to numbers, or a key of the optimizer's param groups.
    - ``acts_without_threshold``: whether the rule still acts if the threshold of a param group is
      ``None``.

    Args:
        include: Names or wildcards of parameters or modules to act on. Default: all.
        exclude: Names or wildcards of parameters or modules to skip.
        name: Name of this instance, needed if two of a class are used; part of state and log keys.
    """

    role: ClassVar[Role]
    threshold_name: ClassVar[str | None] = None
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        fp16=yes(
            "It sees unscaled gradients. The GradScaler skips steps that overflow; their norms do not enter the "
            "statistics."
        ),
        fused_fp16=SCALED,
        local_steps=yes("It acts on the gradient of each rank, not on the mean."),
        fsdp2=yes(
            "`ModelParallelStrategy` with `fully_shard`. Gradients are DTensors there, and norms are computed over "
            "whole gradients. Tests compare fits under `fully_shard` on two CPU ranks with fits under DDP. None ran on "
            "GPUs."
        ),
        fsdp1=no(
            "needs gradients in their original shapes, and under {} each rank sees flat shards",
            "Use ModelParallelStrategy with fully_shard (FSDP2), whose gradients are DTensors",
        ),
        deepspeed=NO_ENGINE,
        manual_optimization=yes(
            "Call `step()` on an optimizer from `self.optimizers()`. If you call it on the raw torch optimizer, gradients "
            "are not changed, and a warning says so."
        ),
        sparse_gradients=no(
            "needs dense gradients, and {} creates sparse ones",
            "Build it with sparse=False, or exclude it: exclude=[{value}]",
        ),
    )
    acts_without_threshold: ClassVar[bool] = False

    _memory = until_next_fit.of(dict[int, Memory])
    _chosen = during_fit.of(dict[int, tuple[Shape, list[Bucket]]])
    _not_chosen = during_fit.of(dict[int, list[str]])
    _hook_fired = during_fit.of(set[int])
    _choice_changed = during_fit.of(bool)

    def __init__(
        self, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None, name: str | None = None
    ) -> None:
        super().__init__(name)
        if getattr(self, "role", None) not in get_args(Role):
            got = repr(self.role) if hasattr(self, "role") else "none"
            raise TypeError(
                f"The class attribute role of {type(self).__name__} must be one of "
                f"{', '.join(map(repr, get_args(Role)))}; got {got}."
            )
        self.include = as_names(include)
        self.exclude = as_names(exclude)

    @abstractmethod
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        """Change gradients in place and return the values to log.

        A value named ``clipped`` (1 if something was clipped, else 0) is summed over all steps and
        logged as ``clipped_share``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define condition(step).")

    @property
    def _threshold(self) -> Threshold:
        return None if self.threshold_name is None else getattr(self, self.threshold_name)

    def as_threshold(self, value: Threshold) -> Any:
        """Return a threshold of the constructor in plain types, with each number checked by :meth:`check_threshold`."""
        if value is None and not self.acts_without_threshold:
            raise ValueError(
                f"{self.threshold_name} must be a number or a mapping from name patterns to numbers; got None."
            )
        return as_threshold(value, str(self.threshold_name), self.check_threshold)

    def check_threshold(self, number: float) -> None:
        """Raise if a threshold of the constructor or of a param group is invalid. Default: it must be above 0."""
        check_above(number, 0.0, str(self.threshold_name))

    def changes(self, parameter: Tensor) -> bool:
        """Return False if the rule never changes the gradient of this parameter."""
        return True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.compatibility = cls.compatibility.but(**ANSWERS.get(getattr(cls, "role", "guard"), {}))

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            refuse_order(trainer)

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._memory = {int(index): Memory.load(saved) for index, saved in state["optimizers"].items()}
        saved = state.get("settings", {})
        now, before = self._choice(self.settings), self._choice(saved)
        self._choice_changed = bool(saved) and any(now[name] != before[name] for name in before)

    def _choice(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that decide which parameters share a state."""
        given = {name: plain(settings[name]) for name in ("include", "exclude") if name in settings}
        threshold = settings.get(str(self.threshold_name))
        return given | {"patterns": list(threshold) if isinstance(threshold, Mapping) else None}

    @override
    @on_plain_tensors
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        named = {str(self.threshold_name): self._threshold} if isinstance(self._threshold, Mapping) else {}
        check_patterns(pl_module, self.display_name, include=self.include, exclude=self.exclude, **named)
        restarted: list[str] = []
        for index, optimizer in enumerate(trainer.optimizers):
            self._watch_for_bypass(optimizer)
            self._choose(index, optimizer, pl_module, restarted)
            self._refuse_optimizer(trainer, index, optimizer)
        self.check_choice(pl_module)
        self.works_with().refuse_parameters(self.display_name, pl_module, set(map(id, self.parameters())))
        self._announce(trainer, pl_module)
        if restarted:
            self._say_what_restarts(restarted)

    def _say_what_restarts(self, names: Sequence[str]) -> None:
        named = ", ".join(repr(name) for name in names if name)
        where = f" for {named}" if named else ""
        self.say(f"restarts its statistics{where}, because the checkpoint's statistics belong to other parameters")

    def excluded(self, pl_module: pl.LightningModule) -> list[str]:
        """Return name patterns of the parameters to skip; a technique may add some to the user's."""
        return self.exclude or []

    def check_choice(self, pl_module: pl.LightningModule) -> None:
        """Raise if the name patterns select nothing; warn if no optimizer holds what they select yet."""
        if self.parameters():
            return
        excluded = self.excluded(pl_module)
        if not any(selects(names, self.include, excluded) for names in all_names(pl_module).values()):
            raise ValueError(
                f"{self.display_name} has no parameter to act on. {why_none_left(pl_module, self.include, excluded)}"
            )
        rank_zero_warn(
            f"{self.display_name} has nothing to act on yet: no optimizer holds any of the selected parameters. Add "
            "them to the optimizer that configure_optimizers returns, or let a callback add them later."
        )

    def _choose(
        self, index: int, optimizer: Optimizer, pl_module: pl.LightningModule, restarted: list[str] | None = None
    ) -> None:
        """Sort an optimizer's parameters into buckets, and move a resumed state to them if the choice changed."""
        buckets, self._not_chosen[index] = choose_buckets(
            optimizer, pl_module, self._threshold, self.threshold_name, self.include, self.excluded(pl_module)
        )
        for bucket in buckets:
            if bucket.group is not None:
                as_threshold(bucket.threshold, f"{bucket.key} of the optimizer's {bucket.name}", self.check_threshold)
        self._chosen[index] = (optimizer_shape(optimizer), buckets)
        memory = self._memory.setdefault(index, Memory())
        if restarted is not None and self._choice_changed:
            restarted += memory.assign(buckets)
        memory.note(buckets)

    def _refuse_optimizer(self, trainer: pl.Trainer, index: int, optimizer: Optimizer) -> None:
        if self._chosen[index][1]:
            self.works_with().refuse_optimizer(self.display_name, trainer, optimizer)

    def choose_again(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the parameters again, because :meth:`excluded` returns other patterns than when the fit began."""
        for index, optimizer in enumerate(trainer.optimizers):
            self._choose(index, optimizer, pl_module)

    def parameters(self, index: int | None = None) -> list[Tensor]:
        """Return the parameters whose gradients are changed in this fit, of all optimizers or of one."""
        chosen = [buckets for i, (_, buckets) in self._chosen.items() if index in (None, i)]
        return [parameter for buckets in chosen for bucket in buckets for parameter in bucket.parameters]

    def states(self) -> list[dict[str, Tensor]]:
        """Return the rule's ``step.state`` of each bucket."""
        return [state for memory in self._memory.values() for state in memory.states.values()]

    @override
    def chosen(self) -> Chosen:
        super().chosen()  # raises outside of a fit
        return self._describe()  # parameters may have joined the optimizer since the fit began

    def _describe(self) -> Chosen:
        buckets = [bucket for _, chosen in self._chosen.values() for bucket in chosen]
        named = [pair for bucket in buckets for pair in zip(bucket.names, bucket.parameters, strict=True)]
        names = [name for name, parameter in named if self.changes(parameter)]
        skipped = [name for names in self._not_chosen.values() for name in names]
        skipped += [name for name, parameter in named if not self.changes(parameter)]
        rest = f"; {len(skipped)} skipped ({listed(skipped)})" if skipped else ""
        return Chosen(f"acts on {counted(len(names), 'parameter')}{rest}", "parameters", names)

    def _announce(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        chosen = self._describe()
        self.announce(chosen.words, chosen.kind, chosen.names)
        if self.role == "noise":
            warn_of_missing_momentum(trainer, self.display_name, "noise")
        if self.role == "clip":
            warn_of_other_clippers(trainer, pl_module, self, {id(parameter) for parameter in self.parameters()})

    def _watch_for_bypass(self, optimizer: Optimizer) -> None:
        def after_step(stepped: Optimizer, *_: Any) -> None:
            if id(stepped) not in self._hook_fired:
                lost = "an optimizer stepped without Lightning's hooks, so its gradients were not changed"
                way_out = "Call step() on an optimizer from self.optimizers()."
                self.tell_once("bypass", rank_zero_warn, f"{lost}. {way_out}")
            self._hook_fired.discard(id(stepped))

        self.undo.push(optimizer.register_step_post_hook(after_step).remove)

    # One optimizer step.

    @override
    @torch.no_grad()
    @on_plain_tensors
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._hook_fired.add(id(optimizer))
        index = optimizer_index(trainer, optimizer, self.display_name)
        if self._chosen.get(index, ((), []))[0] != optimizer_shape(optimizer):
            self._choose(index, optimizer, pl_module)
            self._refuse_optimizer(trainer, index, optimizer)  # its first parameters may have been added during the fit
        memory, measured = self._memory.setdefault(index, Memory()), is_log_step(trainer)
        for bucket in self._chosen[index][1]:
            step = gather(bucket, memory, measured, optimizer, index)
            off = step.threshold is None and self.threshold_name is not None and not self.acts_without_threshold
            if step.gradients and not off:
                seen = memory.steps + 1 - memory.since.get(bucket.name, 0)
                values = self._count(step, self.condition(step), seen)
                if measured and values:
                    owner = f"optimizer{index}" if len(trainer.optimizers) > 1 else ""
                    names = {key: "/".join(filter(None, (owner, key, bucket.name))) for key in values}
                    shown = {names[key]: value for key, value in values.items()}
                    self.log_scalars(pl_module, shown, layers=bool(bucket.name))
        memory.steps += 1

    def _count(self, step: GradientStep, values: Mapping[str, Tensor | float], seen: int) -> dict[str, Tensor | float]:
        """Replace the value ``clipped`` with the share of clipped steps; the count stays on the device."""
        if values is None:
            raise TypeError(
                f"{self.display_name}.condition must return a mapping of the values to log; got None. Return {{}} to "
                "log none."
            )
        shown = dict(values)
        clipped = shown.pop("clipped", None)
        if isinstance(clipped, Tensor):
            if "clipped" not in step.state:
                step.state["clipped"] = torch.zeros((), dtype=torch.int64, device=clipped.device)
            step.state["clipped"] += clipped
            if step.measured:
                shown["clipped_share"] = step.state["clipped"] / seen
        return shown

    @override
    def state_dict(self) -> dict[str, Any]:
        memories = {str(index): memory.save() for index, memory in self._memory.items()}
        return {**super().state_dict(), "optimizers": memories}

    # The fit ends.

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        clipped = [
            (state["clipped"].item(), memory.steps - memory.since.get(name, 0))
            for memory in self._memory.values()
            for name, state in memory.states.items()
            if "clipped" in state
        ]
        if clipped:
            share = sum(count for count, _ in clipped) / max(sum(steps for _, steps in clipped), 1)
            log_summary(trainer, {self.log_key("clipped_share"): share})


ELEMENTWISE: Compatibility = GradientConditioner.compatibility.but(
    fsdp1=GradCallback.compatibility.fsdp1,
    complex_parameters=no("cannot compare complex numbers, and {} holds them", "Exclude it: exclude=[{value}]"),
)
"""Answers of a rule that acts on each entry separately, so a shard of a gradient is enough."""
