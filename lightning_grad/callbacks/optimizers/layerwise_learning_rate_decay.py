"""Smaller learning rates for earlier layers. The rule is :func:`lightning_grad.functional.layer_factors`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core import (
    Compatibility,
    OptimizerCallback,
    check_above,
    check_between,
    during_fit,
    is_log_step,
    no,
    until_next_fit,
    yes,
)
from lightning_grad.core.steps.averaged_weights import averages
from lightning_grad.core.steps.parameter_rates import ParameterRates
from lightning_grad.functional import layer_factors
from lightning_grad.utilities.forward_order import ForwardOrder
from lightning_grad.utilities.module_layers import layers_of, placing_names
from lightning_grad.utilities.optimizers import Shape, optimizer_shape
from lightning_grad.utilities.parameters import all_names, as_names, check_patterns
from lightning_grad.utilities.reporting import counted, listed

_MOST_LOGGED, _MOST_SAID = 32, 12
_REFUSED: Mapping[str, str] = {  # by class name, because derived classes count too
    "Frugal": "chooses its block among all matrices of a group",
    "LBFGS": "moves all parameters along one line",
    "ZeroRedundancyOptimizer": "copies its groups into an optimizer of its own",
}


class LayerwiseLearningRateDecay(OptimizerCallback):
    r"""Give earlier layers smaller learning rates: each layer has ``decay`` times the rate of the layer after it.

    .. math::
        \eta_l = \eta \, \xi^{L - l}, \qquad l = 1, \dots, L

    :math:`\eta` is the rate of the user's group and its schedule, :math:`\xi` the decay, and L the number of layers,
    in the order in which the first step calls them. The last layer keeps the user's rate. Layers are the blocks of a
    stack, and what stands before and after them, each with the norms that follow it; ``layers`` names others. Every
    optimizer counts its own layers.

    Param groups, and so schedulers and checkpoints, stay as they are. Weight decays stay too, and decoupled decay
    acts times the rate, as in groups made by hand. A tied weight belongs to the layer that uses it first. A layer
    that the first step does not call gets the factor of the layer registered before it.

    Args:
        decay: Factor from each layer to the one before it, in (0, 1]; 1 changes nothing.
        layers: Names or wildcards of modules that are one layer each, such as "encoder.layer.*".
            Default: the items of stacks, and other modules that hold parameters.
        name: Name of this instance, part of its log keys and its state.

    Raises:
        ValueError: In the constructor if decay is outside (0, 1]. Before the first batch with DeepSpeed, FSDP1,
            LBFGS, an optimizer that wraps another or averages weights, a second instance, or a pattern that matches
            nothing.
        RuntimeError: In the first step with an optimizer that keeps values in its groups that depend on the rate.

    **Hooks.** Forward hooks during the first step, for the order of the layers. The groups of an optimizer are split
    while it updates, and only then.

    **Logs** under ``layer_rate/``, at log steps: the rate of each layer (in its first group), at most 32 layers.
    ``LearningRateMonitor`` shows the rates of the groups, before the factors, with which only the last layer
    trains; ``optimizer_report`` shows all rates.

    **State.** The order of the layers.

    **Cost.** That of an optimizer with a group for each layer.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.LayerwiseLearningRateDecay
                  init_args:
                    decay: 0.75

    References:
        Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018, arXiv 1801.06146,
        section 3.2 (1 / 2.6). Clark et al., "ELECTRA", ICLR 2020, arXiv 2003.10555, appendix B (0.8 and 0.9). Bao et
        al., "BEiT", ICLR 2022, arXiv 2106.08254, appendix (0.65 and 0.75).
    """

    namespace: ClassVar[str] = "layer_rate"
    compatibility: ClassVar[Compatibility] = OptimizerCallback.compatibility.but(
        fused_fp16=yes(),
        fsdp1=no(
            "gives each parameter its own rate, and {} may join them in flat ones",
            "Train with ModelParallelStrategy or ddp",
        ),
        several_optimizers=yes("Each optimizer counts its own layers."),
    )
    trial: ClassVar[Mapping[str, Any]] = {"decay": 0.75}
    neutral: ClassVar[Mapping[str, Any] | str] = {"decay": 1.0}

    _orders = until_next_fit.of(dict[str, list[str]]).saved()  # the layers that were called, by optimizer
    _factors = until_next_fit.of(dict[int, dict[str, float]])  # of each parameter, by optimizer and name
    _layers = during_fit.of(dict[str, str])  # of each name of a parameter
    _placing = during_fit.of(list[str])  # names of the parameters that place their layers in the order
    _names = during_fit.of(dict[int, list[str]])  # of each parameter
    _held = during_fit.of(dict[int, ParameterRates])
    _layer_of = during_fit.of(dict[int, dict[int, str]])  # of each parameter, by optimizer and id, in order
    _shapes = during_fit.of(dict[int, Shape])  # of the optimizers whose factors are known
    _order = during_fit[ForwardOrder]()
    _trainer = during_fit[pl.Trainer]()

    def __init__(self, decay: float = 0.75, layers: Sequence[str] | None = None, name: str | None = None) -> None:
        super().__init__(name)
        self.decay = check_between(check_above(decay, 0.0, "decay"), 0.0, 1.0, "decay")
        self.layers = as_names(layers)

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        others = [c for c in trainer.callbacks if isinstance(c, LayerwiseLearningRateDecay)]  # type: ignore[attr-defined]
        if self.fitting and len(others) > 1:
            raise ValueError("Use only one LayerwiseLearningRateDecay per Trainer: the factors of two would multiply.")

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        if self.changed_settings(state, "layers"):
            self._orders = {}  # of other layers
        self._shapes.clear()  # a search for a learning rate restores during the fit

    @override
    def acts_on(self, index: int, optimizer: Optimizer) -> bool:
        if self.decay == 1.0:
            return False
        for part in getattr(optimizer, "parts", [optimizer]):
            self._refuse(part)
        self._shapes.pop(index, None)
        self._held[index] = ParameterRates(optimizer, self.display_name)
        self.undo.push(self._held[index].stop)
        return True

    def _refuse(self, optimizer: Optimizer) -> None:
        names = [cls.__name__ for cls in type(optimizer).__mro__]
        reason = next((_REFUSED[name] for name in names if name in _REFUSED), None)
        if averages(optimizer):
            reason = "averages weights with its largest rate"
        elif any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
            reason = "moves parameters by another optimizer inside it"
        if reason is not None:
            raise ValueError(
                f"{self.display_name} gives each layer its own rate, and {names[0]} {reason}. Train with a plain "
                "optimizer, such as AdamW or SGD."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_patterns(pl_module, self.display_name, layers=self.layers)
        self._trainer, self._order = trainer, ForwardOrder(pl_module)
        self.undo.push(self._order.stop)
        self._names, self._layers = all_names(pl_module), layers_of(pl_module, self.layers)
        self._placing = placing_names(pl_module, self._layers)
        super().on_fit_start(trainer, pl_module)
        layers = list(dict.fromkeys(self._layers.values()))
        words = f"multiplies learning rates by {self.decay:g} from each of {counted(len(layers), 'layer')} to the one before"
        self.announce(words if self._held else "changes nothing, because decay is 1", "layers", layers)

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_start(trainer, pl_module, *args)
        for held in self._held.values():
            held.give_back()  # a step of the raw torch optimizer may have raised
        if any(str(index) not in self._orders for index in self._held):
            self._order.watch()

    # One optimizer step.

    @override
    def before_step(self, index: int, optimizer: Optimizer) -> None:
        self._learn(index, optimizer)  # a step of the raw torch optimizer does not call before_update

    @override
    def before_update(self, index: int, optimizer: Optimizer) -> None:
        self._learn(index, optimizer)
        if is_log_step(self._trainer):
            self._log(index, optimizer)

    def _learn(self, index: int, optimizer: Optimizer) -> None:
        """Set the factors of an optimizer, at first and when parameters are added."""
        shape = optimizer_shape(optimizer)
        if self._shapes.get(index) == shape:
            return
        if str(index) not in self._orders:
            called = self._called()
            if not called:
                return  # before the first forward pass
            self._orders[str(index)] = list(self._trainer.strategy.broadcast(called))
            if all(str(each) in self._orders for each in self._held):
                self._order.stop()
        self._shapes[index] = shape
        order = self._orders[str(index)]
        layer_of = self._layers_of(optimizer, order)
        held = [layer for layer in order if layer in set(layer_of.values())]
        factors = layer_factors(held, list(dict.fromkeys(self._layers.values())), self.decay)
        places = {layer: place for place, layer in enumerate(factors)}
        self._layer_of[index] = dict(sorted(layer_of.items(), key=lambda pair: places[pair[1]]))
        self._held[index].factors = {key: factors[layer] for key, layer in layer_of.items()}
        self._factors[index] = {self._names[key][0]: factors[layer] for key, layer in layer_of.items()}
        self._tell(index, {layer: factors[layer] for layer in self._layer_of[index].values()}, held)

    def _called(self) -> list[str]:
        """Return the layers in the order of their calls, or as registered if compiled modules hide the calls."""
        networks = self._order.networks([self._placing])
        if networks is None:
            return list(dict.fromkeys(self._layers.values()))
        called = [self._layers[name] for network in networks for name in network]
        root = [layer for name, layer in self._layers.items() if "." not in name]  # nothing calls its parameters
        return list(dict.fromkeys([*root, *called])) if called else []

    def _layers_of(self, optimizer: Optimizer, order: Sequence[str]) -> dict[int, str]:
        """Return the layer of each parameter of an optimizer; of a tied one, the layer that is called first."""
        places = {layer: place for place, layer in enumerate(order)}
        keys = [id(p) for group in optimizer.param_groups for p in group["params"] if id(p) in self._names]
        layers = {key: [self._layers[name] for name in self._names[key]] for key in keys}
        return {key: min(those, key=lambda each: places.get(each, len(places))) for key, those in layers.items()}

    def _tell(self, index: int, factors: Mapping[str, float], called: Sequence[str]) -> None:
        shown = [f"{layer} {factor:.3g}" for layer, factor in factors.items()]
        if len(shown) > _MOST_SAID:
            shown = [*shown[: _MOST_SAID // 2], "...", *shown[-_MOST_SAID // 2 :]]
        if len(called) < 2:
            self.say(f"changes nothing in optimizers[{index}], which holds one layer. Name more with layers=[...]")
        else:
            self.say(f"multiplies the learning rates of optimizers[{index}] by layer: {', '.join(shown)}")
        unused = [layer for layer in factors if layer not in called]
        if unused:
            self.say(f"gives layers that the first step did not call the factor of the layer before: {listed(unused)}")

    def _log(self, index: int, optimizer: Optimizer) -> None:
        rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        rates: dict[str, Any] = {}
        for key, layer in self._layer_of.get(index, {}).items():
            if layer not in rates:
                rates[layer] = rate_of[key] * self._held[index].factors[key]
        step = max(1, -(-len(rates) // _MOST_LOGGED))
        shown = list(rates)[::-step]  # with the last layer
        self.log_scalars(self._trainer.lightning_module, {self.quantity_of(index, each): rates[each] for each in shown})

    def rate_factors(self, index: int) -> Mapping[str, float]:
        """Return the factors of the parameters of an optimizer, by name; empty before its first step.

        :func:`lightning_grad.utilities.optimizer_report` shows the products of these factors and the rates of groups.
        """
        return self._factors.get(index, {})
