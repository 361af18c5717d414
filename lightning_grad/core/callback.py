"""The base of every callback here. Read this first.

A technique derives from :class:`GradCallback`, or from another base that derives from it, and gets: attributes that live
for one fit (``fit.py``); one undo list that runs when the fit ends, however it ends; a state key and log keys that carry
the instance's name; its settings in the config of the run; refusal of what cannot work. The other helpers are functions,
called where a technique needs them: choosing parameters (``utilities.parameters``), where in the run we are
(``progress.py``), figures, tables and files (``utilities.reporting``).
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
from lightning_grad.core.switch import Switchable, SwitchedOff, replace, unless_switched_off
from lightning_grad.core.undo import UndoList
from lightning_grad.utilities.arguments import CheckedArguments, changed_settings, follow_settings, plain
from lightning_grad.utilities.checks import check_name
from lightning_grad.utilities.reporting import log_settings, say_if_no_figures


@dataclass(frozen=True)
class Chosen:
    """What a technique acts on in this fit, as :meth:`GradCallback.chosen` returns it.

    Args:
        words: A clause without subject and full stop, as in the line that is printed when the fit begins.
        kind: What the names are: ``"parameters"``, ``"samples"``, ``"optimizers"``, ``"learning rates"``, ``"inputs"`` or
            ``"losses"``; another word, in the plural, if none of these fits.
        names: A name for each: of parameters as in ``named_parameters()``, of samples the index in the data set, as
            often as an epoch repeats it; of others the expression that leads to them, such as ``optimizers[0]``.

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
    """What every technique shares.

    The rules a technique keeps:

    - each constructor argument is annotated with what YAML can say, and is checked against that before the constructor
      runs; the constructor checks ranges, and stores each argument under its own name; ``setup`` and ``on_fit_start`` check
      the trainer and the module;
    - whatever is added to the module, its optimizers or the trainer goes with a step back to ``self.undo``;
    - what a checkpoint must hold are attributes with ``.saved()``, or ``state_dict`` extends that of the base; it holds
      tensors, numbers, strings, lists and dicts only;
    - ``restore`` extends that of the base, and continues from such a state when a fit resumes;
    - a setting that changes on resume is followed, unless ``fixed_settings`` names it;
    - ``on_fit_start`` calls ``self.announce`` once the technique knows what it acts on.

    Class attributes:

    - ``namespace``: the first part of its log keys.
    - ``compatibility``: what it works with; ``setup`` refuses the rest. What depends on settings goes into ``works_with``.
    - ``fixed_settings``: for each argument that must not differ from a checkpoint's when a run resumes the reason, which
      ends the sentence "it cannot change because ...".
    - ``trial``: constructor arguments with which a few epochs on a small module show what the technique does; they name no
      layer, so that they fit every module. Tests and tools use them.
    - ``progress_bar``: which of the quantities in Logs the progress bar shows. Users set it on an instance:
      ``pruner.progress_bar = ["density"]`` or ``clipper.progress_bar = ["clipped_share"]``.
    - ``neutral``: what of ``trial`` to change so that it changes nothing in a run, or the reason why nothing does that.

    Args:
        name: Name of this instance, needed when two of a class are used; part of its state key and log keys.

    Raises:
        ValueError: For a name that no file or log key can carry.
    """

    namespace: ClassVar[str]
    compatibility: ClassVar[Compatibility] = Compatibility()
    fixed_settings: ClassVar[Mapping[str, str]] = {}
    trial: ClassVar[Mapping[str, Any]] = {}
    neutral: ClassVar[Mapping[str, Any] | str] = {}
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
        if "setup" in vars(cls):
            cls.setup = unless_switched_off(cls.setup)  # type: ignore[method-assign]

    @override
    def switch_off(self, trainer: pl.Trainer) -> None:
        self._end()
        if trainer.state.fn == "fit":
            self.begin_fit()
        replace(trainer, self, SwitchedOff(self))

    @override
    def __getstate__(self) -> dict[str, Any]:
        # Lightning leaves the module's log methods on every callback it has run; a copy must not drag the module along.
        return {key: value for key, value in super().__getstate__().items() if key not in ("log", "log_dict")}

    @property
    def fitting(self) -> bool:
        """Whether a fit is on, rather than a validation or test of its own, or none."""
        return self._stage == "fit"

    @property
    @override
    def state_key(self) -> str:
        return self.display_name

    @property
    @override
    def display_name(self) -> str:
        """The class and the name of this instance, for messages, configs and checkpoints."""
        return type(self).__name__ if self.name is None else f"{type(self).__name__}[{self.name}]"

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as they stand."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        unknown = [name for name in names if not hasattr(self, name)]
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no attribute {unknown[0]!r}. Let its constructor store every argument under its "
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
            log_settings(trainer, self.display_name, self.settings)
            say_if_no_figures(trainer, self)

    def works_with(self) -> Compatibility:
        """Return what this instance works with, where that depends on its settings."""
        return self.compatibility

    def _check_fixed_settings(self) -> None:
        unknown = sorted(self.fixed_settings.keys() - self.settings.keys())
        if unknown:
            raise TypeError(
                f"{type(self).__name__}.fixed_settings names {unknown[0]!r}, which is no argument of its constructor: "
                f"{', '.join(self.settings)}."
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
        """Continue from a checkpoint's state in a fit that resumes.

        Args:
            state: What ``state_dict`` returned. Settings that changed were compared and told.
        """
        self.load_saved(state)

    def changed_settings(self, state_dict: Mapping[str, Any], *names: str) -> list[str]:
        """Return which of some settings differ from those of a checkpoint."""
        return changed_settings(state_dict.get("settings", {}), {name: self.settings[name] for name in names})

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # No teardown follows. Checkpoint callbacks still save after this hook, so what their files need is let go
        # only in the strategy's on_exception, the first thing Lightning calls after all callbacks.
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
        """Print or warn of something once in a fit.

        Args:
            what: The occasion.
            tell: ``rank_zero_info`` or ``rank_zero_warn``.
            text: What is said after the name of the callback.
        """
        if what not in self._said:
            self._said.add(what)
            tell(f"{self.display_name}: {text}")

    def announce(self, words: str, kind: str, names: Sequence[str | int] = ()) -> None:
        """Print what this instance acts on in this fit, and keep it for :meth:`chosen`; called in ``on_fit_start``.

        Args:
            words: A clause without subject and full stop.
            kind: What the names are; see :class:`Chosen`.
            names: What it acts on.
        """
        self._announced = Chosen(words, kind, list(names))
        self.say(words)

    def chosen(self) -> Chosen:
        """Return what this instance acts on in this fit, in words and as a list.

        A technique that finds out more during the fit overrides this.

        Raises:
            RuntimeError: Before its ``on_fit_start``, and after the fit.
        """
        if self._announced is None:
            raise RuntimeError(
                f"{self.display_name} chooses what it acts on when a fit begins, and none is on. Call chosen() during "
                "fit(), in on_fit_start or a later hook of a callback that is listed after it."
            )
        return self._announced

    def log_scalars(
        self,
        pl_module: pl.LightningModule,
        values: Mapping[str, float | Tensor],
        sync_dist: bool = False,
        layers: bool = False,
    ) -> None:
        """Log scalars under their log keys; ``sync_dist`` where Lightning asks for it, in validation."""
        if getattr(pl_module.trainer, "barebones", False):  # Lightning would warn of every value
            return
        for shown in (False, True):
            chosen = {key: value for key, value in values.items() if (key in self.progress_bar) == shown}
            named = {self.log_key(key, layers): value for key, value in chosen.items()}
            pl_module.log_dict(named, prog_bar=shown, sync_dist=sync_dist)

    def log_key(self, quantity: str, layers: bool = False) -> str:
        """Return the log key of a quantity, ``namespace[/name]/quantity``.

        Args:
            quantity: Its name, with that of the layer where it has one: ``"norm/encoder"``.
            layers: Whether there is one for each layer. The first part of these keys is ``grad_layers`` in place of ``grad``,
                which W&B and TensorBoard show in a section of their own.
        """
        section, *rest = self.namespace.split("/")
        return "/".join(
            part for part in (f"{section}_layers" if layers else section, *rest, self.name, quantity) if part
        )
