"""Another optimizer for a module that is not changed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.callbacks.optimizers._carried import carried_group
from lightning_grad.callbacks.optimizers._names import NAMES, Make, Named, find_class
from lightning_grad.callbacks.optimizers._needs import OptimizerNeeds
from lightning_grad.callbacks.optimizers._options import as_options, check_options, class_of, own_options
from lightning_grad.core import GradCallback, as_indices, no, until_next_fit, wrap_method
from lightning_grad.core.compatibility import Compatibility
from lightning_grad.core.steps.chosen_rates import scale_rates_, scale_schedules_
from lightning_grad.core.steps.replacement import replace_optimizer
from lightning_grad.utilities.checks import check_above, check_finite, check_finite_at_least

Option = bool | float | str | Sequence[float | None] | None


class OptimizerSwap(OptimizerNeeds):
    """Train with another optimizer than ``configure_optimizers`` returns."""

    namespace: ClassVar[str] = "optimizer"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        deepspeed=no(
            "replaces the module's optimizer, and under {} the engine creates it",
            "Train with strategy='ddp', or set the optimizer in DeepSpeed's config",
        ),
    )
    trial: ClassVar[Mapping[str, Any]] = {"optimizer": "lion", "lr_factor": 0.3}
    neutral: ClassVar[Mapping[str, Any] | str] = {"optimizer": None, "lr_factor": None}

    _optimizers = until_next_fit.of(list[dict[str, Any]]).saved()  # class and options of each optimizer of the run

    def __init__(
        self,
        optimizer: str | Callable[[Iterable[Any]], Optimizer] | None,
        options: Mapping[str, Option] | None = None,
        lr_factor: float | None = None,
        wd_factor: float | None = None,
        which: Sequence[int] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.optimizer = optimizer
        self.options = None if options is None else as_options(options)
        self.lr_factor = check_finite(check_above(lr_factor, 0.0, "lr_factor"), "lr_factor")
        self.wd_factor = check_finite_at_least(wd_factor, 0.0, "wd_factor")
        self.which = as_indices(which, "which")
        if optimizer is not None:
            check_options(self.options or {}, self._make())

    @property
    def named(self) -> Named | None:
        """The entry of the optimizer's short name, or ``None`` for a path or a callable."""
        return NAMES.get(self.optimizer) if isinstance(self.optimizer, str) else None

    def _make(self) -> Make:
        """Return the constructor of the new optimizer."""
        if isinstance(self.optimizer, str):
            found = find_class(self.optimizer)
            return partial(found, **self.named.options) if self.named and self.named.options else found
        assert self.optimizer is not None
        return self.optimizer

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            # Here, every callback's on_fit_start sees the new optimizer, whatever its position in the list.
            self.undo.push(wrap_method(trainer.strategy, "setup_optimizers", partial(self._swap, trainer)))

    def _swap(self, trainer: pl.Trainer, inner: Callable[..., None], *args: Any) -> None:
        inner(*args)
        strategy = trainer.strategy
        optimizers = list(strategy.optimizers)
        schedulers = [config.scheduler for config in strategy.lr_scheduler_configs]
        for index in range(len(optimizers)) if self.which is None else self.which:
            optimizers[index] = self.swap(index, optimizers[index], schedulers)
        strategy.optimizers = optimizers  # Lightning wraps them again; its wrappers copy the class

    def swap(self, index: int, old: Optimizer, schedulers: Sequence[Any]) -> Optimizer:
        """Return the optimizer that replaces one of the module, everywhere where the module's was.

        Args:
            index: Number of the optimizer.
            old: The module's optimizer.
            schedulers: Schedulers of the run.
        """
        new = self.create(old)
        replace_optimizer(old, new, schedulers)
        if self.lr_factor is not None:
            chosen = [(new, list(range(len(new.param_groups))))]
            scale_rates_(chosen, self.lr_factor)
            scale_schedules_(chosen, schedulers, self.lr_factor)
        return new

    def create(self, old: Optimizer) -> Optimizer:
        """Create the new optimizer from the groups of the module's optimizer."""
        make = type(old) if self.optimizer is None else self._make()
        same = class_of(make) is type(old)
        options = {**(own_options(old) if same else {}), **(self.options or {})}
        factor = 1.0 if self.wd_factor is None else self.wd_factor
        groups = [carried_group(group, old, same, factor) for group in old.param_groups]
        return make(groups, **options)

    @override
    def new_class(self) -> Any:
        return None if self.optimizer is None else class_of(self._make())

    @override
    def new_optimizers(self, trainer: pl.Trainer) -> Sequence[Optimizer]:
        if self.optimizer is None:
            return []
        return [o for index, o in enumerate(trainer.optimizers) if self.which is None or index in self.which]

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        indices = range(len(trainer.optimizers)) if self.which is None else self.which
        words = ", ".join(type(trainer.optimizers[index]).__name__ for index in indices)
        self.announce(f"trains with {words}", "optimizers", [f"optimizers[{index}]" for index in indices])
