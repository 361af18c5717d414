"""Fine-tuning of the layers that fit into a memory budget, as a callback.

The choice is a function in ``functional/fine_tuning/layer_choice.py``; ``_layer_meter.py`` measures what it needs to know, and
``_budget.py`` measures what it chose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_grad.callbacks.fine_tuning._budget import WAY_OUT, Budget, in_bytes
from lightning_grad.callbacks.fine_tuning._layer_meter import LayerMeter, first_step
from lightning_grad.core import (
    WHOLE_WEIGHTS,
    AdapterCallback,
    Compatibility,
    GradCallback,
    during_fit,
    manual,
    no,
    until_next_fit,
    wrap_method,
)
from lightning_grad.functional.choices import check_choice
from lightning_grad.functional.fine_tuning.layer_choice import RULES, LayerRule
from lightning_grad.utilities.checks import check_at_least, check_finite, check_finite_at_least, owned_ids
from lightning_grad.utilities.optimizer_report import optimizer_report
from lightning_grad.utilities.parameters import all_names, as_names, check_patterns, matches, named_owners
from lightning_grad.utilities.reporting import counted, log_many

_FIXED = "the state of the optimizer belongs to the layers that were chosen"
_SMALL = 1024  # bytes of state that do not matter, such as step counts


class SparseUpdate(GradCallback):
    r"""Train only the layers that fit into a memory budget, and freeze the others.

    The budget counts what training needs on top of the weights: gradients, optimizer state, and the activations that
    autograd saves for the backward pass. The last are measured in a training step on one batch. Layers before the first
    trained one need no graph, so their activations are freed at once.

    .. math::
        \max_S \sum_{l \in S} \lVert g_l \rVert^2 \quad \text{with} \quad \text{bytes}(S) \le B

    Gradients :math:`g_l` are those of this batch. The rule "gain" takes the layers with the largest
    :math:`\lVert g_l \rVert^2` per byte, the first-order gain of a step of gradient descent; see
    :func:`lightning_grad.functional.choose_layers`. **This rule is ours.** The paper searches its layers offline for each
    network and lists them by hand: that is ``layers=``, for example the biases of the last layers and the weights of a few.

    Until the fit ends, the other parameters have ``requires_grad=False``, no gradient and no optimizer state, and their
    values do not change, not by a bit. A layer is a module with parameters of its own. Parameters that are frozen when the
    fit begins do not count; a finetuning callback may unfreeze them later, on top of the budget.

    A frozen BatchNorm keeps the mode that the module gives it. In training mode it normalizes by the batch, and its running
    statistics, which are buffers, follow the data of the fit. To keep them, call ``eval()`` on these layers in the module.

    Args:
        budget: Bytes (an integer above 1), or the share (0 to 1) of what training all layers needs; 1.0 trains all.
        layers: Names or wildcards of the parameters or modules to train. With budget, an error if they need more.
        exclude: Names or wildcards of parameters or modules that never train.
        rule: Which layers: "gain" (largest squared gradient per byte), "first", "last" or "random".
        state: Values of optimizer state per weight: 2 for Adam, 1 for SGD with momentum.
            The optimizer does not exist yet when the layers are chosen. After the first step, its real state is measured.
        loader_key: Key or list position of the training loader to use, if there are several.
        seed: Seed of the rule "random".
        name: Name of this instance, for state and log keys.

    Raises:
        ValueError: In the constructor without budget and layers, or for impossible numbers. Before training if the budget is
            below what the smallest layer needs, if a name matches nothing, if no optimizer holds a chosen layer, under
            manual optimization with a budget, for sharded parameters, or together with adapters such as LoRA.
        TypeError: Before training if the training data has no indices, with a budget.

    **Hooks.** Inside ``strategy.setup``, when the module is on its device, before DDP and ``configure_optimizers``: runs
    ``training_step`` on one batch in a quiet module, chooses, freezes. ``on_train_batch_end`` measures the optimizer state,
    once.

    **Logs** under ``fine_tuning/``, once: ``trained_share`` (of all parameters), ``needed_bytes``, ``budget_bytes``,
    ``dense_bytes`` (needed to train all layers), ``gradient_bytes``, ``state_bytes`` (of the optimizer, measured after the
    first step), ``saved_bytes`` (activations, measured).

    **State.** The names of the trained parameters and the bytes. A run that resumes trains the same and measures nothing.

    **Cost.** Before training, some forward passes on one batch (often four) and one backward pass. A step is then cheaper
    than a dense one; see docs/benchmarks.md.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.SparseUpdate
                  init_args:
                    budget: 0.25

    References:
        Lin et al., "On-Device Training Under 256KB Memory", NeurIPS 2022, arXiv 2206.15472, section 3.2. Their int8 graph
        and its scaled gradients are not part of this callback.
    """

    namespace: ClassVar[str] = "fine_tuning"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        **manual(no("runs training_step before training, which under {} steps the optimizers", WAY_OUT)),
        **WHOLE_WEIGHTS,
    )
    fixed_settings: ClassVar[Mapping[str, str]] = dict.fromkeys(("budget", "layers", "exclude", "rule", "seed"), _FIXED)
    trial: ClassVar[Mapping[str, Any]] = {"budget": 0.5}
    neutral: ClassVar[Mapping[str, Any] | str] = {"budget": 1.0}

    memory = until_next_fit.of(dict[str, int]).saved()
    """Bytes by kind: ``budget``, ``needed``, ``dense``, ``gradient``, ``state``, ``saved``. Without a budget only some."""
    _trained = until_next_fit.of(list[str]).saved()  # names of the parameters; empty before the choice
    _put_aside = during_fit.of(list[nn.Parameter])
    _has_chosen = during_fit.of(bool)
    _has_measured = during_fit.of(bool)

    def __init__(
        self,
        budget: int | float | None = None,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        rule: LayerRule = "gain",
        state: float = 2.0,
        loader_key: str | int | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.budget = None if budget is None else check_finite(budget, "budget")
        self.layers = as_names(layers)
        self.exclude = as_names(exclude)
        self.rule = rule
        self.state = check_finite_at_least(state, 0.0, "state")
        self.loader_key = loader_key
        self.seed = check_at_least(seed, 0, "seed")
        check_choice(rule, RULES, "rule")
        if budget is None and layers is None:
            raise ValueError("SparseUpdate needs budget= (bytes or a share) or layers= (names); got neither.")
        if budget is not None and (budget <= 0 or (budget > 1 and budget != int(budget))):
            raise ValueError(
                f"budget must be a share above 0 and at most 1, or an integer number of bytes; got {budget}."
            )

    @override
    def works_with(self) -> Compatibility:
        return self.compatibility if self._measures else GradCallback.compatibility.but(**WHOLE_WEIGHTS)

    @property
    def _measures(self) -> bool:
        return self.budget is not None

    @property
    def _trains_all(self) -> bool:
        return self.budget == 1 and self.layers is None and not self.exclude

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
            for other in callbacks:
                if isinstance(other, AdapterCallback) and other.is_on:
                    raise ValueError(
                        f"{self.display_name} and {other.display_name} would both choose what trains. Keep one of them; to "
                        f"adapt few layers, use {other.display_name}(include=[...])."
                    )
            # No hook is between the move to the device, which the step needs, and DDP and the optimizers.
            self.undo.push(wrap_method(trainer.strategy, "model_to_device", partial(self._choose, trainer, pl_module)))
            self.undo.push(wrap_method(trainer.strategy, "setup_optimizers", partial(self._refuse_missing, pl_module)))

    def _choose(self, trainer: pl.Trainer, pl_module: pl.LightningModule, inner: Callable[[], Any]) -> None:
        inner()
        if self._has_chosen:
            return
        self._has_chosen = True
        check_patterns(pl_module, self.display_name, layers=self.layers, exclude=self.exclude)
        names = all_names(pl_module)
        if not self._trained:
            self._trained = trainer.strategy.broadcast(self._names_to_train(trainer, pl_module))
        trained = set(self._trained)
        for parameter in pl_module.parameters():
            if parameter.requires_grad and names[id(parameter)][0] not in trained:
                parameter.requires_grad_(False)
                self._put_aside.append(parameter)
        self.undo.push(self._unfreeze)

    def _unfreeze(self) -> None:
        for parameter in self._put_aside:
            parameter.requires_grad_(True)

    def _names_to_train(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        """Return the names of the parameters to train, and store the bytes."""
        names = all_names(pl_module)
        layers: dict[str, list[nn.Parameter]] = {}
        known: set[int] = set()
        for name, owner, attribute in named_owners(pl_module):
            parameter = owner._parameters[attribute]
            if parameter is None or id(parameter) in known or not self._may_train(parameter, names[id(parameter)]):
                continue
            known.add(id(parameter))
            layers.setdefault(name.rpartition(".")[0], []).append(parameter)
        if not layers:
            raise ValueError(
                f"{self.display_name} found no parameter to train. Unfreeze some, or set other layers= or exclude=."
            )
        chosen = (
            self._within_budget(trainer, pl_module, layers) if self._measures and not self._trains_all else list(layers)
        )
        return [names[id(parameter)][0] for layer in chosen for parameter in layers[layer]]

    def _may_train(self, parameter: nn.Parameter, names: Sequence[str]) -> bool:
        is_listed = self.layers is None or matches(names, self.layers)
        return parameter.requires_grad and is_listed and not matches(names, self.exclude or [])

    def _within_budget(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, layers: Mapping[str, Sequence[nn.Parameter]]
    ) -> list[str]:
        assert self.budget is not None
        with first_step(trainer, pl_module, self.loader_key, self.display_name) as run:
            trainable = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
            meter = LayerMeter(pl_module, layers, trainable, run, self.state)
            measured, dense = meter.measure()
            limit = self.budget * dense if self.budget <= 1 else self.budget
            budget = Budget(meter, measured, limit, self.display_name)
            chosen = budget.choose(self.rule, self.seed) if self.layers is None else budget.check(list(layers))
            gradient, state = meter.weight_bytes(chosen)
            saved = meter.saved_bytes(chosen)
        needed = gradient + state + saved
        self.memory = {
            "budget": int(limit), "needed": needed, "dense": dense, "gradient": gradient, "state": state, "saved": saved
        }  # fmt: skip
        rank_zero_info(budget.table(chosen))
        return chosen

    def _refuse_missing(self, pl_module: pl.LightningModule, inner: Callable[..., Any], trainer: pl.Trainer) -> None:
        """Refuse a chosen parameter that is in no optimizer, before DDP and the training see it."""
        inner(trainer)
        owned: set[int] = set().union(*map(owned_ids, trainer.strategy.optimizers))
        names = all_names(pl_module)
        missed = [names[id(p)][0] for p in pl_module.parameters() if p.requires_grad and id(p) not in owned]
        if missed and not self._trains_all:
            raise ValueError(
                f"{self.display_name} chose {missed[0]}, but no optimizer of configure_optimizers holds it. Add it there, or "
                f"set exclude=[{missed[0]!r}]."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fits = ""
        if self.memory:
            needed, budget, dense = (in_bytes(self.memory[key]) for key in ("needed", "budget", "dense"))
            fits = f", in {needed} of a budget of {budget}; all layers need {dense}"
        if self._trains_all:
            fits = "; a budget of 1.0 freezes nothing"
        share = f"{100 * trained_share(pl_module):.1f} % of the weights"
        self.announce(f"trains {counted(len(self._trained), 'parameter')}, {share}{fits}", "parameters", self._trained)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for parameter in self._put_aside:
            for optimizer in trainer.optimizers:  # Adagrad makes a state at once, and it may be that of a dense run
                optimizer.state.pop(parameter, None)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._has_measured or trainer.global_step == 0:
            return
        self._has_measured = True
        state = optimizer_report(trainer).state_bytes
        found = {f"{kind}_bytes": float(count) for kind, count in {**self.memory, "state": state}.items()}
        values = {"trained_share": trained_share(pl_module), **found}
        log_many(trainer, {self.log_key(key): value for key, value in values.items()})
        counted_state = self.memory.get("state", 0)
        if self.memory and state > 1.05 * counted_state + _SMALL:
            rank_zero_warn(
                f"{self.display_name} counted {in_bytes(counted_state)} of optimizer state, but the optimizer holds "
                f"{in_bytes(state)}, so training may need more than the budget. Set "
                f"state={self.state * state / max(1, counted_state):.1f}."
            )


def trained_share(module: nn.Module) -> float:
    """Return the share of a module's weights that require a gradient."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return sum(size for size, trains in sizes if trains) / max(1, sum(size for size, _ in sizes))
