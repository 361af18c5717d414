"""Another optimizer for a module that is not changed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.callbacks.optimizers._carried import forget_marks
from lightning_grad.callbacks.optimizers._created import create_optimizer
from lightning_grad.callbacks.optimizers._matrices import MatrixChooser
from lightning_grad.callbacks.optimizers._names import NAMES, Make, entry_of, find_class, refuse_second_order
from lightning_grad.callbacks.optimizers._needs import OptimizerNeeds, answers_of
from lightning_grad.callbacks.optimizers._options import (
    as_options,
    check_numbers,
    check_options,
    class_of,
    name_of,
    try_options,
)
from lightning_grad.callbacks.optimizers._parted import part_optimizer, parted_words
from lightning_grad.callbacks.optimizers._rates import rates_in_words, refuse_other_scale, remarks, scale_all_
from lightning_grad.callbacks.optimizers._refusals import (
    refuse_new,
    refuse_old,
    refuse_own_values,
    refuse_scheduler,
)
from lightning_grad.callbacks.optimizers._saved import WAY_OUT, description, refuse_other_optimizers
from lightning_grad.core import GradCallback, as_indices, during_fit, no, until_next_fit, wrap_method
from lightning_grad.core.compatibility import Compatibility, yes
from lightning_grad.core.steps.replacement import held_schedulers, replace_optimizer
from lightning_grad.utilities.checks import check_above, check_finite, check_finite_at_least, check_only_one, owned_ids
from lightning_grad.utilities.parameters import as_names, check_patterns

Option = bool | int | float | str | Sequence[float | None] | None

_SCALED = "the checkpoint holds rates and decays that were multiplied by the old value"


class OptimizerSwap(OptimizerNeeds):
    r"""Train with another optimizer than ``configure_optimizers`` returns.

    The new optimizer takes over the parameter groups with their names, learning rates and weight
    decays. Schedulers, and all other objects that hold the module's optimizer, follow the new one.

    Args:
        optimizer: Short name, dotted path of a class, or callable; None keeps the module's class.
            Short names are ``adafactor``, ``adabelief``, ``adahessian``, ``adam``, ``adamp``,
            ``adamw``, ``came``, ``diffgrad``, ``lion``, ``prodigy``, ``schedulefree-adamw``, ``sgd``,
            ``sgdp``, ``soap``, ``sophia`` and ``spam``, and for matrices only ``dct-adamw``,
            ``frugal``, ``galore-adamw``, ``muon`` and ``q-galore``. A callable takes a list of
            parameter groups; in YAML, write ``class_path`` and ``init_args``.
        options: Options of the constructor, such as betas; the others get the defaults of the class.
            If a name or a class is that of the module's optimizer, they get the values of that one.
            ``weight_decay`` replaces a decay that all groups share. Learning rates are no options.
        lr_factor: Factor of all learning rates, also those of schedulers; None leaves them unchanged.
            None raises an error if the usual rates of the two classes differ, as from SGD to AdamW;
            1.0 does not.
        wd_factor: Factor of all weight decays; None leaves them unchanged.
        which: Indices of the optimizers to replace; None replaces all.
        include: Names or wildcards of the matrices for an optimizer that moves matrices only.
            Default: those of all linear and attention layers, except the first and the last layer. The
            module's own optimizer keeps moving all other parameters, with its class and options.
        exclude: Names or wildcards of matrices that stay on the module's own optimizer.
        name: Name of this instance, needed if two are used.

    Raises:
        ValueError: In the constructor for an unknown name or option, and for a factor out of range.
            Before the first batch if an optimizer cannot be replaced (none, LBFGS,
            ``ZeroRedundancyOptimizer``, under DeepSpeed) or cannot be created, if a callable sets a
            learning rate or weight decay, if usual rates differ and ``lr_factor`` is None, for two
            instances on one optimizer, for a checkpoint with the state of another optimizer, and if a
            pattern matches nothing or no matrix is left.
        ModuleNotFoundError: In the constructor if the package of the optimizer is not installed.

    **Hooks.** The strategy's ``setup_optimizers``, so all callbacks and precision plugins see the new
    optimizer only. With an optimizer that averages weights, it shows the averages during validations,
    ``save_checkpoint`` and after the fit. With ``adahessian`` and ``sophia``, the strategy's
    ``backward`` keeps the graph of the gradients. Otherwise it adds nothing to a step.

    **Logs.** Nothing. Lightning's ``LearningRateMonitor`` shows the rates of the new optimizer.

    **State.** Class and options of each new optimizer, and the names of its matrices if it moves
    matrices only. A run resumes only with the same ones. With an optimizer that averages weights, also
    the training weights; the module's are the averages.

    **Cost.** That of the new optimizer.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.OptimizerSwap
                  init_args:
                    optimizer: lion
                    options: {betas: [0.9, 0.98]}
                    lr_factor: 0.2
                    wd_factor: 5.0

    References:
        Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, arXiv 2302.06675,
        section 5: Lion needs learning rates 3 to 10 times smaller, and decays as many times larger,
        than AdamW. The card lists the sources of the other optimizers.
    """

    namespace: ClassVar[str] = "optimizer"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        fsdp2=yes(
            "`adamw`, `adam`, `sgd`, `lion` and `adabelief` train as under DDP on two CPU ranks in tests, and `diffgrad` "
            "with `options={foreach: false}`. Optimizers that need whole parameters raise. A class without a short name "
            "is not checked."
        ),
        deepspeed=no(
            "replaces the module's optimizer, and under {} the engine creates it",
            "Train with strategy='ddp', or choose the optimizer in DeepSpeed's own config",
        ),
        several_optimizers=yes("`which` chooses some of them."),
        sparse_gradients=no(
            "uses an optimizer that takes dense gradients only, and {} computes sparse ones",
            "Create {value} with sparse=False, or skip its optimizer with which=[...]",
        ),
    )
    fixed_settings: ClassVar[Mapping[str, str]] = {"lr_factor": _SCALED, "wd_factor": _SCALED}
    trial: ClassVar[Mapping[str, Any]] = {"optimizer": "lion", "lr_factor": 0.3}
    neutral: ClassVar[Mapping[str, Any] | str] = {"optimizer": None, "lr_factor": None}

    _optimizers = until_next_fit.of(dict[str, dict[str, Any]]).saved()  # class and options of each new optimizer
    # The same, from the checkpoint of a fit that resumes.
    _in_checkpoint = during_fit[Mapping[str, Any] | None](lambda _: None)
    _swapped = during_fit.of(dict[int, str])  # what is said about each
    _remarks = during_fit.of(list[str])

    def __init__(
        self,
        optimizer: str | Callable[[Iterable[Any]], Optimizer] | None,
        options: Mapping[str, Option] | None = None,
        lr_factor: float | None = None,
        wd_factor: float | None = None,
        which: Sequence[int] | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.optimizer = optimizer
        self.options = None if options is None else as_options(options)
        self.lr_factor = check_finite(check_above(lr_factor, 0.0, "lr_factor"), "lr_factor")
        self.wd_factor = check_finite_at_least(wd_factor, 0.0, "wd_factor")
        self.which = as_indices(which, "which")
        self.include, self.exclude = as_names(include), as_names(exclude)
        decay = (self.options or {}).get("weight_decay")
        check_only_one({"options: weight_decay": decay, "wd_factor": wd_factor}, "set the weight decay")
        if self.optimizer is not None:
            refuse_second_order(self.new_class())
            check_options(self.options or {}, self._constructor())
        check_finite_at_least(decay, 0.0, "options: weight_decay")
        if self.moves_matrices:
            check_numbers(self.options or {})
            try_options(self._constructor(), self.options or {})
        elif not (include is None and exclude is None):
            name = "the module's own class" if self.optimizer is None else name_of(self._constructor())
            raise ValueError(
                f"include and exclude choose matrices, but {name} moves all parameters. Remove them, or use "
                f"{', '.join(name for name, named in NAMES.items() if named.only_matrices)}."
            )

    def _constructor(self) -> Make:
        """Return the constructor of the new optimizer."""
        if not isinstance(self.optimizer, str):
            assert self.optimizer is not None
            return self.optimizer
        found, named = find_class(self.optimizer), NAMES.get(self.optimizer)
        return partial(found, **named.options) if named and named.options else found

    @property
    def moves_matrices(self) -> bool:
        """Whether the new optimizer moves matrices only, so the module's own optimizer moves the rest."""
        named = None if self.optimizer is None else entry_of(self.new_class())
        return named is not None and named.only_matrices

    @property
    def is_neutral(self) -> bool:
        """Whether it leaves the module's optimizers as they are."""
        unchanged = all(factor in (None, 1.0) for factor in (self.lr_factor, self.wd_factor))
        return self.optimizer is None and not self.options and unchanged

    @override
    def answers_for(self, kind: Any) -> Compatibility:
        answers, named = super().answers_for(kind), None if self.optimizer is None else entry_of(kind)
        return answers_of(answers, named, self.options)

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting and not self.is_neutral:
            self._refuse_a_second(trainer)
            # All callbacks see the new optimizer in on_fit_start, whatever their order in the list.
            swap = partial(self._swap, trainer, pl_module)
            self.undo.push(wrap_method(trainer.strategy, "setup_optimizers", swap))

    def _refuse_a_second(self, trainer: pl.Trainer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, OptimizerSwap) and other is not self and not other.is_neutral:
                both = None if None in (self.which, other.which) else {*self.which} & {*other.which}  # type: ignore[misc]
                if both is None or both:
                    raise ValueError(
                        f"{self.display_name} and {other.display_name} would replace the same optimizer. Keep one, or "
                        "give each its own with which=[...]."
                    )

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Called without a state in the checkpoint too, unlike load_state_dict.
        is_other = checkpoint.get("optimizer_states") and self.state_key not in checkpoint.get("callbacks", {})
        if self.fitting and not self.is_neutral and is_other:
            raise ValueError(
                f"{self.display_name} cannot resume: the checkpoint was written without it, so it holds the state of "
                f"the module's own optimizer. {WAY_OUT}"
            )

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        self._in_checkpoint = state["optimizers"]
        if self._swapped or self.is_neutral:  # some strategies restore after they set up the optimizers
            refuse_other_optimizers(self.display_name, self._in_checkpoint, self._optimizers)
        super().restore(state)

    # The swap.

    def _swap(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, inner: Callable[..., None], *args: Any, **kwargs: Any
    ) -> None:
        inner(*args, **kwargs)
        strategy = trainer.strategy
        optimizers = list(strategy.optimizers)
        returned = [config.scheduler for config in strategy.lr_scheduler_configs]
        # Under manual optimization, a module may keep schedulers that it does not return.
        schedulers = list(held_schedulers([*returned, *vars(pl_module).values()]))
        self._optimizers = {}
        for index in self._indices(len(optimizers)):
            refuse_old(self.display_name, index, optimizers[index])
            optimizers[index] = self._replace(index, optimizers[index], schedulers, trainer, pl_module)
        if self._in_checkpoint is not None:
            refuse_other_optimizers(self.display_name, self._in_checkpoint, self._optimizers)
        strategy.optimizers = optimizers  # Lightning wraps each in an object of a derived class
        self.prepare(trainer, pl_module)

    def _indices(self, count: int) -> Sequence[int]:
        outside = [index for index in self.which or [] if index >= count]
        if outside:
            raise ValueError(
                f"{self.display_name}: which must hold indices below {count}, the number of optimizers; got {self.which}."
            )
        return range(count) if self.which is None else self.which

    def _replace(
        self,
        index: int,
        old: Optimizer,
        schedulers: Sequence[Any],
        trainer: pl.Trainer,
        module: pl.LightningModule,
    ) -> Optimizer:
        make, groups = self.make(old), [dict(group) for group in old.param_groups]
        refuse_new(self.display_name, make, old)
        # A module may return an optimizer of its matrices itself, of the same class.
        if self.moves_matrices and class_of(make) is not type(old):
            return self._part(index, make, old, schedulers, trainer, module)
        # A callable with options of its own decides about all of them.
        may_keep = isinstance(make, type) or isinstance(self.optimizer, str)
        factors = (self.lr_factor, self.wd_factor)
        new = create_optimizer(self.display_name, make, old, self.options or {}, factors, may_keep)
        self._refuse_moved(new, old, trainer, module)
        if self.lr_factor not in (None, 1.0):
            refuse_scheduler(self.display_name, schedulers, old)
        self.undo.push(partial(forget_marks, new))
        self.undo.push(replace_optimizer(old, new, schedulers))
        if self.lr_factor is not None and self.lr_factor != 1.0:
            self._remarks += scale_all_(new, schedulers, self.lr_factor)
        self._optimizers[str(index)] = description(new)
        words = f"{type(new).__name__} in place of {type(old).__name__}"
        self._swapped[index] = f"{words} ({rates_in_words(new.param_groups)})"
        self._remarks += remarks(old, groups, new, self.lr_factor)
        return new

    def _refuse_moved(self, moved: Optimizer, old: Optimizer, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise if a run cannot use an optimizer for its parameters, or its rates cannot be meant for it."""
        self.refuse_run(type(moved), trainer, module)
        self.answers_for(type(moved)).refuse_parameters(self.display_name, module, owned_ids(moved))
        if self.lr_factor is None:
            refuse_other_scale(self.display_name, old, type(moved))

    def _part(
        self,
        index: int,
        make: Make,
        old: Optimizer,
        schedulers: Sequence[Any],
        trainer: pl.Trainer,
        module: pl.LightningModule,
    ) -> Optimizer:
        """Move the hidden matrices of an optimizer by another class, and the rest by its own."""
        check_patterns(module, self.display_name, include=self.include, exclude=self.exclude)
        choice = MatrixChooser(self.display_name, self.include, self.exclude).choose(trainer, module, old)
        groups, factors = [dict(group) for group in old.param_groups], (self.lr_factor, self.wd_factor)
        new, warned = part_optimizer(self.display_name, make, self.options or {}, factors, old, choice, schedulers)
        for each in warned:  # of matrices that are smaller than the rank
            self.tell_once(each, rank_zero_info, each)
        moved, rest = new.parts[0], type(old)
        refuse_own_values(self.display_name, make, moved)
        self._refuse_moved(moved, old, trainer, module)
        self.compatibility.refuse_parameters(self.display_name, module, owned_ids(moved))  # a sparse table, by name
        self.undo.push(replace_optimizer(old, new, schedulers))
        its_class = f"{rest.__module__}.{rest.__qualname__}"
        self._optimizers[str(index)] = description(moved, matrices=choice.names, rest=its_class)
        self._swapped[index] = parted_words(new, choice, old, self.lr_factor)
        self._remarks += remarks(old, groups, moved, self.lr_factor)
        if choice.left or choice.others:
            self._remarks.append(f"leaves to {rest.__name__}: {choice.words_of_left()}")
        return new

    def make(self, old: Optimizer) -> Make:
        """Return the class or callable that creates the optimizer that replaces one of the module's."""
        return type(old) if self.optimizer is None else self._constructor()

    @override
    def new_class(self) -> Any:
        return None if self.optimizer is None else class_of(self._constructor())

    @override
    def new_optimizers(self, trainer: pl.Trainer) -> Sequence[Optimizer]:
        return [trainer.optimizers[index] for index in self._swapped]

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.is_neutral and not self._swapped:
            raise ValueError(
                f"{self.display_name} found no optimizer to replace: {type(trainer.strategy).__name__} does not call "
                "setup_optimizers. Train with strategy='ddp' or on one device."
            )
        super().on_fit_start(trainer, pl_module)
        words = ", ".join(dict.fromkeys(self._swapped.values())) or "the module's own optimizers"
        self.announce(f"trains with {words}", "optimizers", [f"optimizers[{index}]" for index in self._swapped])
        for remark in dict.fromkeys(self._remarks):
            self.say(remark)
