"""The base of every callback in this package. Read this file first.

A technique derives from :class:`GradCallback`, or from a base that derives from it. It gets
attributes that live for one fit (``fit.py``), an undo list that runs when the fit ends for any
reason, a state key and log keys that carry the instance's name, its settings in the run's config,
and the refusal of what cannot work. Other helpers are functions that a technique calls where it
needs them: ``utilities.parameters`` selects parameters, ``progress.py`` returns the share of the
run that is done, ``utilities.reporting`` writes figures, tables and files.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_grad.core.compatibility import Compatibility
from lightning_grad.core.dispatch import wrap_method
from lightning_grad.core.fit import FitScope, during_fit
from lightning_grad.core.steps.loading import hide_steps_of_loading
from lightning_grad.core.switch import Switchable, is_named, unless_switched_off
from lightning_grad.core.undo import UndoList
from lightning_grad.utilities.arguments import CheckedArguments, changed_settings, follow_settings, plain
from lightning_grad.utilities.checks import check_name, is_sharded
from lightning_grad.utilities.reporting import log_settings, say_if_no_figures


@dataclass(frozen=True)
class Chosen:
    """What a technique acts on in this fit. :meth:`GradCallback.chosen` returns it.

    Args:
        words: A clause without subject and full stop; it is printed when the fit begins.
        kind: What the names are: ``"parameters"``, ``"samples"``, ``"optimizers"``, ``"learning
            rates"``, ``"inputs"``, ``"losses"`` or another plural noun.
        names: One name for each. Parameters are named as in ``named_parameters()``, samples by
            their index in the data set (repeated as often as in the epoch), others by an expression
            such as ``optimizers[0]``.

    Example:
        >>> chosen = Chosen("acts on 2 parameters", "parameters", ["head.weight", "head.bias"])
        >>> print(chosen)
        acts on 2 parameters: head.weight, head.bias
        >>> print(Chosen("trains on all samples", "samples", range(50_000)))
        trains on all samples: 0, 1, 2, 3, 4, ... and 49995 more
    """

    words: str
    kind: str
    names: Sequence[str | int]

    def __str__(self) -> str:
        shown = ", ".join(str(name) for name in self.names[:_SHOWN])
        more = f", ... and {len(self.names) - _SHOWN} more" if len(self.names) > _SHOWN else ""
        return f"{self.words}: {shown}{more}" if shown else self.words


_SHOWN = 5


class GradCallback(Switchable, FitScope, CheckedArguments, Callback):
    """Base class of all techniques.

    Every technique follows these rules:

    - Each constructor argument has a type annotation that YAML can express. The argument is checked
      against it before the constructor runs. The constructor checks ranges and stores each argument
      under its own name. ``setup`` and ``on_fit_start`` check the trainer and the module.
    - For everything that it adds to the module, the optimizers or the trainer, it pushes an undo
      step to ``self.undo``.
    - State that a checkpoint must hold is an attribute with ``.saved()``, or an entry of an extended
      ``state_dict``: tensors, numbers, strings, lists and dicts only.
    - If it extends ``state_dict``, it extends ``restore``, which continues from that state when a
      fit resumes.
    - If a setting differs on resume, the new value applies, unless ``fixed_settings`` names the
      setting.
    - ``on_fit_start`` calls ``self.announce`` once the technique knows what it acts on.

    Class attributes:

    - ``namespace``: the first part of the log keys.
    - ``compatibility``: what the technique works with; ``setup`` refuses the rest. Override
      ``works_with`` if this depends on settings.
    - ``fixed_settings``: the arguments that must not change when a run resumes, each with the
      reason, which ends the sentence "it cannot change because ...".
    - ``trial``: constructor arguments with which a few epochs on a small module show what the
      technique does. They name no layer, so they fit every module. Tests and tools use them.
    - ``progress_bar``: the quantities that the progress bar shows. Users set it on an instance:
      ``pruner.progress_bar = ["density"]`` or ``clipper.progress_bar = ["clipped_share"]``.
    - ``neutral``: changes to ``trial`` with which the technique changes nothing in a run, or the
      reason why there are none.
    - ``of_batch``: names of attributes that belong to the current batch. When a step is repeated
      (:meth:`StepClosure.again`), each batch finds its own.

    Args:
        name: Name of this instance, needed if two of a class are used; part of state and log keys.

    Raises:
        ValueError: If ``name`` cannot be part of a file name or log key.
    """

    namespace: ClassVar[str]
    compatibility: ClassVar[Compatibility] = Compatibility()
    fixed_settings: ClassVar[Mapping[str, str]] = {}
    trial: ClassVar[Mapping[str, Any]] = {}
    neutral: ClassVar[Mapping[str, Any] | str] = {}
    of_batch: ClassVar[tuple[str, ...]] = ()
    progress_bar: Sequence[str] = ()

    undo = during_fit.of(UndoList)
    undo_after_saving = during_fit.of(UndoList)
    _stage = during_fit.of(str)
    _said = during_fit.of(set[str])
    _announced = during_fit[Chosen | None](lambda _: None)

    def __init__(self, name: str | None = None) -> None:
        check_name(name)
        self.name = name

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.setup = unless_switched_off(cls.setup)  # type: ignore[method-assign]

    @override
    def switch_off(self, trainer: pl.Trainer) -> None:
        self._end()
        if trainer.state.fn == "fit":
            self.begin_fit()
        placeholder = SwitchedOff(self)
        _replace(trainer, self, placeholder)
        # Last, so a checkpoint that is saved after an exception lacks its state.
        self.undo_after_saving.push(lambda: _replace(trainer, placeholder, self))

    @override
    def __getstate__(self) -> dict[str, Any]:
        # Lightning sets the module's log methods on every callback it runs; a copy must not hold
        # the module.
        return {key: value for key, value in super().__getstate__().items() if key not in ("log", "log_dict")}

    @property
    def fitting(self) -> bool:
        """Whether a fit is running, as opposed to ``validate``, ``test``, ``predict`` or nothing."""
        return self._stage == "fit"

    @property
    @override
    def state_key(self) -> str:
        return self.display_name

    @property
    @override
    def display_name(self) -> str:
        """Class and name of this instance, for messages, configs and checkpoints."""
        return type(self).__name__ if self.name is None else f"{type(self).__name__}[{self.name}]"

    @property
    def settings(self) -> dict[str, Any]:
        """The current values of the constructor's arguments."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        unknown = [name for name in names if not hasattr(self, name)]
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no attribute {unknown[0]!r}. Store every constructor argument under its "
                "own name, and call super().__init__(name)."
            )
        return {name: getattr(self, name) for name in names}

    @override
    @unless_switched_off
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()
        if stage == "fit":
            self.begin_fit()
        self._stage = stage
        if self.fitting:
            self._check_fixed_settings()
            self.works_with().refuse(self.display_name, trainer, pl_module)
            if is_sharded(trainer):
                self.undo.push(hide_steps_of_loading(trainer))
            log_settings(trainer, self.display_name, self.settings)
            say_if_no_figures(trainer, self)

    @property
    def why_not_portable(self) -> str:
        """Why the weights of a checkpoint alone do not compute what was validated, as a sentence; empty if they do."""
        return ""

    def works_with(self) -> Compatibility:
        """Return what this instance works with; override it if this depends on settings."""
        return self.compatibility

    def _check_fixed_settings(self) -> None:
        unknown = sorted(self.fixed_settings.keys() - self.settings.keys())
        if unknown:
            raise TypeError(
                f"{type(self).__name__}.fixed_settings must name arguments of the constructor "
                f"({', '.join(self.settings)}); got {unknown[0]!r}."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"settings": {name: plain(value) for name, value in self.settings.items()}, **self.saved_state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.fitting:  # Lightning calls this for validate and test too
            follow_settings(self.display_name, state_dict.get("settings", {}), self.settings, self.fixed_settings)
            self.restore(state_dict)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state when a fit resumes.

        Args:
            state: What ``state_dict`` returned. Changed settings have already been checked and
                reported.
        """
        self.load_saved(state)

    def changed_settings(self, state_dict: Mapping[str, Any], *names: str) -> list[str]:
        """Return the named settings that differ from a checkpoint's."""
        return changed_settings(state_dict.get("settings", {}), {name: self.settings[name] for name in names})

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown after this hook, but checkpoint callbacks still save after it.
        # What their files need is therefore dropped in the strategy's on_exception, which Lightning
        # calls right after all callbacks.
        self.undo.run()

        def last(inner: Callable[..., Any], *args: Any) -> None:
            self._end()
            inner(*args)

        self.undo_after_saving.push(wrap_method(trainer.strategy, "on_exception", last))

    def _end(self) -> None:
        self.undo.run()
        self.undo_after_saving.run()
        self.end_fit()

    def say(self, what: str) -> None:
        """Print one line about this instance."""
        rank_zero_info(f"{self.display_name} {what}.")

    def tell_once(self, what: str, tell: Callable[[str], Any], text: str) -> None:
        """Print a line or a warning once per fit.

        Args:
            what: Key of the message; later calls with the same key do nothing.
            tell: ``rank_zero_info`` or ``rank_zero_warn``.
            text: Message, which follows the name of the callback.
        """
        if what not in self._said:
            self._said.add(what)
            tell(f"{self.display_name}: {text}")

    def announce(self, words: str, kind: str, names: Sequence[str | int] = ()) -> None:
        """Print what this instance acts on in this fit and store it for :meth:`chosen`. Call it in ``on_fit_start``.

        Args:
            words: A clause without subject and full stop.
            kind: What the names are; see :class:`Chosen`.
            names: Names of what it acts on.
        """
        self._announced = Chosen(words, kind, list(names))
        self.say(words)

    def chosen(self) -> Chosen:
        """Return what this instance acts on in this fit, in words and as a list.

        Override it if the choice changes during the fit.

        Raises:
            RuntimeError: Before the callback's ``on_fit_start``, and after the fit.
        """
        if self._announced is None:
            raise RuntimeError(
                f"{self.display_name} has not chosen what it acts on, because no fit is running. Call chosen() during "
                "fit(), in on_fit_start or a later hook of a callback that comes after it in the list."
            )
        return self._announced

    def log_scalars(
        self,
        pl_module: pl.LightningModule,
        values: Mapping[str, float | Tensor],
        sync_dist: bool = False,
        layers: bool = False,
    ) -> None:
        """Log scalars under their log keys. Lightning asks for ``sync_dist`` in validation."""
        if getattr(pl_module.trainer, "barebones", False):  # Lightning would warn about every value
            return
        for key, value in values.items():
            pl_module.log(self.log_key(key, layers), value, prog_bar=key in self.progress_bar, sync_dist=sync_dist)

    def log_key(self, quantity: str, layers: bool = False) -> str:
        """Return the log key of a quantity: ``namespace[/name]/quantity``.

        Args:
            quantity: Its name, followed by the layer if there is one: ``"norm/encoder"``.
            layers: Whether there is one value per layer. Such keys begin with ``grad_layers`` in
                place of ``grad``, so W&B and TensorBoard show them in their own section.
        """
        section, *rest = self.namespace.split("/")
        return "/".join(
            part for part in (f"{section}_layers" if layers else section, *rest, self.name, quantity) if part
        )


class SwitchedOff(Callback):
    """Placeholder in the Trainer's list of callbacks for a technique that is turned off, until the run ends.

    Args:
        technique: Callback that this replaces.
    """

    def __init__(self, technique: GradCallback) -> None:
        self.technique = technique

    @property
    @override
    def state_key(self) -> str:  # so Lightning does not warn that a callback of the checkpoint is missing
        return self.technique.state_key

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # An exception in another callback's on_exception leaves the placeholder behind.
        if not is_named(type(self.technique)):
            _replace(trainer, self, self.technique)
            self.technique.setup(trainer, pl_module, stage)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.technique._end()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        GradCallback.on_exception(self.technique, trainer, pl_module, exception)


def _replace(trainer: pl.Trainer, old: Callback, new: Callback) -> None:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [new if callback is old else callback for callback in callbacks]  # Lightning may iterate over it
