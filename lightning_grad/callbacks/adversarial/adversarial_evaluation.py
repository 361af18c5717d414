"""Evaluate a module on attacked inputs, by the code of its own validation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal
from weakref import WeakSet

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torchmetrics import Metric
from typing_extensions import override

from lightning_grad.callbacks.adversarial._attack import Attack
from lightning_grad.callbacks.adversarial._places import COMPILED
from lightning_grad.callbacks.adversarial._second_state import SecondState
from lightning_grad.callbacks.adversarial._worst_inputs import WorstInputs
from lightning_grad.core.callback import Chosen, GradCallback
from lightning_grad.core.compatibility import AVERAGED, WHOLE_WEIGHTS, Compatibility, manual, yes
from lightning_grad.core.dispatch import WrapOrder, is_empty_hook, overrides, wrap_method
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.quiet import is_quiet, loggers_muted, quiet
from lightning_grad.data.random_streams import random_streams_kept
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.checks import check_count, refuse_dataloader_iter

_STAGES = {"fit": "validation", "validate": "validation", "test": "test"}
_HOOKS = ("on_{}_start", "on_{}_epoch_start", "on_{}_batch_start", "{}_step", "on_{}_batch_end", "on_{}_epoch_end")
_BY_HAND = yes(
    "`validation_step` must return a loss, or call one of `torch.nn.functional`. The loss of `training_step` cannot "
    "be used."
)
_SECOND: WeakSet[pl.LightningModule] = WeakSet()  # modules that are currently in their second run


@dataclass
class Evaluation:
    """The state of one validation or test.

    Args:
        second: State of the module in its second run.
        fresh: The same at the start of the epoch.
        is_prepared: Whether a hook of the module runs before each batch.
        attacked: Output of the step on the attacked batch, and that batch.
    """

    second: SecondState
    fresh: SecondState | None = None
    is_prepared: bool = False
    attacked: tuple[Any, Any] | None = None


class AdversarialEvaluation(GradCallback):
    r"""Run each validation and test a second time on attacked inputs, logged as ``adversarial/...``.

    .. math::
        \text{adversarial/val\_acc} = \frac 1 n \sum_{i=1}^n
            \mathbb 1\bigl[f_\theta(x_i + \delta_i) = y_i\bigr], \qquad
        \delta_i \approx \operatorname*{arg\,max}_{\lVert \delta \rVert \le \epsilon} L(f_\theta(x_i + \delta), y_i)

    for a module that logs its accuracy as ``val_acc``; everything else that it logs is treated the same. After
    each batch, PGD attacks the batch through the module's own loss. Then the module's own ``validation_step``
    and hooks run on the result, with separate metrics and lists of outputs. ``trainer.validate`` and
    ``trainer.test`` are repeated too.

    Args:
        epsilon: Radius of the ball in units of the input, or of pixels if mean and std are set.
            The default is 8/255, as on CIFAR-10.
        steps: Steps of PGD (20 in arXiv 1706.06083, section 5).
        restarts: Attacks per batch; for each sample the one with the highest loss counts.
            With more than one, the loss of each sample must be readable.
        every_n_validations: Attack every this many validations of a fit, beginning with the first.
            Trainer.validate and Trainer.test always attack.
        step_size: Step size of PGD. Default: 2.5 epsilon / steps.
            The default matches the released code of arXiv 1706.06083.
        norm: Norm of the ball, "linf" or "l2".
        random_start: Whether to start at a random point of the ball.
        bounds: Minimum and maximum of an input, such as [0, 1]; None for no limit.
        mean: Mean with which inputs were normalized, one number or one per channel.
            With mean and std, epsilon and bounds are in pixels.
        std: Standard deviation by which inputs were divided, one number or one per channel.
        input_key: Key or position of the input in the batch, or "embedding".
            Join nested keys with dots; "*" stands for every item of a list. Default: the first floating-point
            tensor with at least two dimensions whose name does not denote a target, mask or weight; if the batch
            is a list of samples, that tensor of every sample. If there is none, or an integer tensor comes
            first: the output of the first nn.Embedding.
        loss_index: Index, from 0, of the loss call to maximize.
            Default: the loss that the step returns, or its only loss call.
        seed: Seed of random starts, which are the same in every validation.
        name: Name of this instance, part of its keys: ``adversarial/<name>/val_acc``.

    Raises:
        ValueError: In the constructor for a number out of its range. In setup for sharded strategies, and a
            module without ``validation_step`` (``test_step`` in a test), or one that takes ``dataloader_iter``.
            At the first batch for inputs outside the bounds.
        TypeError: At the first batch, if it has no floating-point tensor, or an integer tensor comes first, and
            the module has no embedding; or if the input is sparse or nested.
        RuntimeError: At the first batch, if neither the step nor ``training_step`` shows a loss that depends on
            the input.

    **Hooks.** ``validation_step`` and the module's own hooks around it are wrapped on the instance. The
    attacked loss is the one that the step returns, or computes with a loss of ``torch.nn.functional``.
    Otherwise it is the loss of ``training_step`` on the same batch.

    **Logs** ``adversarial/<key>`` for every key that the module logs in validation, at the same time. Loggers
    are muted in the second run, so that figures are logged once.

    **State.** The number of validations.

    **Cost.** A forward pass and a backward pass to the input per step: with 20 steps about 50 validations, and
    as many for each restart; see docs/benchmarks.md.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.AdversarialEvaluation
                  init_args:
                    epsilon: 0.03137
                    bounds: [0.0, 1.0]

    References:
        Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, arXiv 1706.06083, section 5 (20
        steps).
    """

    namespace: ClassVar[str] = "adversarial"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        compiled=COMPILED, weight_averaging=yes(AVERAGED), **manual(_BY_HAND), **WHOLE_WEIGHTS
    )
    trial: ClassVar[Mapping[str, Any]] = {"epsilon": 0.1, "steps": 2}

    _validations = until_next_fit.of(int).saved()
    _has_warned = during_fit.of(bool)
    _evaluation = during_fit[Evaluation | None](lambda _: None)

    @during_fit
    def _search(self) -> WorstInputs:
        return WorstInputs(self._attack, self.restarts, self.input_key, self.loss_index, self.seed, self.display_name)

    def __init__(
        self,
        epsilon: float = 8 / 255,
        steps: int = 20,
        restarts: int = 1,
        every_n_validations: int = 1,
        step_size: float | None = None,
        norm: Literal["linf", "l2"] = "linf",
        random_start: bool = True,
        bounds: Sequence[float] | None = None,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        input_key: str | int | None = None,
        loss_index: int | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self._attack = Attack(epsilon, steps, step_size, norm, random_start, bounds, mean, std)
        if restarts > 1 and not random_start:
            raise ValueError(
                f"restarts={restarts} with random_start=False would repeat the same attack. Set random_start=True."
            )
        self.epsilon = epsilon
        self.steps = steps
        self.restarts = check_count(restarts, 1, "restarts")
        self.every_n_validations = check_count(every_n_validations, 1, "every_n_validations")
        self.step_size = step_size
        self.norm = norm
        self.random_start = random_start
        self.bounds = bounds
        self.mean = mean
        self.std = std
        self.input_key = input_key
        self.loss_index = check_count(loss_index, 0, "loss_index")
        self.seed = check_count(seed, 0, "seed")

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage not in _STAGES:
            return
        step = f"{_STAGES[stage]}_step"
        self.works_with().refuse(self.display_name, trainer, pl_module)
        if not overrides(pl_module, step):
            raise ValueError(
                f"{self.display_name} runs {step} on attacked inputs, but {type(pl_module).__name__} has none. Write "
                f"a {step} that returns a loss or logs a metric, or remove the callback."
            )
        refuse_dataloader_iter(getattr(pl_module, step), self.display_name)
        if self.fitting and not trainer.enable_validation:
            self._warn_of_no_validation()
        if getattr(trainer, "barebones", False):
            rank_zero_warn(
                f"{self.display_name} repeats what the module logs, but Trainer(barebones=True) logs nothing. Remove "
                "one of the two."
            )
        for hook in (template.format(_STAGES[stage]) for template in _HOOKS):
            around = partial(self._twice, trainer, hook)
            self.undo.push(wrap_method(pl_module, hook, around, order=WrapOrder.REPEAT))

    def _warn_of_no_validation(self) -> None:
        if not self._has_warned:
            rank_zero_warn(
                f"{self.display_name} attacks validation batches, but this fit has no validation. Pass a validation "
                "loader to fit(), and set limit_val_batches above 0 and check_val_every_n_epoch to at most "
                "max_epochs. Or measure after the fit with trainer.validate() or trainer.test()."
            )
        self._has_warned = True

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        often = (
            "each validation"
            if self.every_n_validations == 1
            else f"one of every {self.every_n_validations} validations"
        )
        self.announce(f"runs {often} a second time on inputs attacked by PGD ({self._attack.described})", "inputs")

    @override
    def chosen(self) -> Chosen:
        """Return the inputs attacked so far; none before the first validation."""
        return replace(super().chosen(), names=self._search.names)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The loaders exist by now if the first epoch is validated.
        is_empty = trainer.val_dataloaders is not None and not sum(trainer.num_val_batches)
        epochs, every = trainer.max_epochs, trainer.check_val_every_n_epoch
        comes_too_late = epochs is not None and every is not None and 0 <= epochs < every
        if is_empty or comes_too_late:
            self._warn_of_no_validation()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._validations:
            self._warn_of_no_validation()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = trainer.sanity_checking or not self.fitting or self._validations % self.every_n_validations == 0
        self._evaluation = Evaluation(SecondState(pl_module)) if due else None

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluation = None
        self._validations += self.fitting and not trainer.sanity_checking

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluation = Evaluation(SecondState(pl_module))

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluation = None

    # Around the module's hooks.

    def _twice(self, trainer: pl.Trainer, hook: str, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a hook of the module as usual, then a second time in the second state, on the attacked batch."""
        evaluation, pl_module = self._evaluation, trainer.lightning_module
        if evaluation is None or pl_module in _SECOND or is_quiet(pl_module):
            return inner(*args, **kwargs)
        if hook.endswith("_step"):
            batch, *rest = args
            kept = copy_of(batch)  # the step may write into its batch
            output = inner(*args, **kwargs)
            evaluation.attacked = self._step(trainer, evaluation, inner, kept, *rest, **kwargs)
            return output
        is_own = not is_empty_hook(inner)
        if hook.endswith("_epoch_start"):
            evaluation.second.take_buffers()  # weight averaging may have swapped the buffers since
        if hook.endswith("_batch_start"):
            evaluation.is_prepared = is_own
        again = copy_of(args) if evaluation.is_prepared and hook.endswith("_batch_start") else args
        output = inner(*args, **kwargs)
        if hook.endswith("_batch_end") and evaluation.attacked is not None:
            again = (*evaluation.attacked, *args[2:])
        if is_own:
            with self._as_second(trainer, evaluation.second):
                inner(*again, **kwargs)
        if hook.endswith("_epoch_start"):  # it may create the lists that a step appends to
            with evaluation.second.used():
                evaluation.fresh = SecondState(pl_module)
        return output

    def _step(
        self, trainer: pl.Trainer, now: Evaluation, inner: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Attack the batch, run the step on it, and return the output and the attacked batch."""

        def run(shown: Any) -> Any:
            return inner(shown, *args, **kwargs)

        if batch is None:  # a collate_fn may return None if it rejects all samples
            with self._as_second(trainer, now.second):
                return run(None), None
        batch_idx, loader = (*args, 0, 0)[:2]
        with self._in_attack_state(trainer, now):
            place, inputs = self._search.run(trainer, run, batch, batch_idx, loader)
        with place.shown(batch, inputs) as shown, self._as_second(trainer, now.second):
            return run(shown), shown

    @contextmanager
    def _in_attack_state(self, trainer: pl.Trainer, evaluation: Evaluation) -> Iterator[None]:
        """Return a context for running the module with gradients; its second state stays as it is."""
        pl_module, state = trainer.lightning_module, evaluation.fresh
        # Inference tensors have no gradient, and metric states created in inference mode cannot be updated
        # outside of it.
        with torch.inference_mode(False), torch.enable_grad():
            # Use the state from the start of the epoch, which quiet restores. A copy of the outputs gathered
            # since would cost more with each batch. It is only needed if a hook before each batch may have
            # set something that the step needs.
            if state is None or evaluation.is_prepared:
                with evaluation.second.used():
                    state = SecondState(pl_module)
            with state.used(), quiet(trainer, pl_module, check=False, display_name=self.display_name):
                yield

    @contextmanager
    def _as_second(self, trainer: pl.Trainer, second: SecondState) -> Iterator[None]:
        """Return a context for the second run: second state, keys ``adversarial/...``, loggers and ``print`` muted."""
        pl_module = trainer.lightning_module
        with ExitStack() as stack:
            stack.callback(wrap_method(pl_module, "log", self._log_again, order=WrapOrder.METHOD))
            stack.callback(wrap_method(pl_module, "print", lambda inner, *args, **kwargs: None))
            _SECOND.add(pl_module)
            stack.callback(_SECOND.discard, pl_module)
            with second.used(), loggers_muted(trainer), random_streams_kept():
                yield

    def _log_again(self, inner: Callable[..., Any], name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(value, Metric):
            kwargs.setdefault("metric_attribute", name)  # Lightning does not find it in the module
        inner(self.log_key(name), value, *args, **kwargs)
