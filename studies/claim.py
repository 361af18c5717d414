"""The base class of claims: what is compared, by which rule, and how one training runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from lightning.pytorch import Callback, Trainer

from studies.common import Show, build_loggers


def silent(share: float, value: str) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Run:
    """One training to run.

    Args:
        arm: What is trained, one of the arms of its claim.
        seed: Its seed, which also splits the digits.
        rate: Peak learning rate; ``None`` for the rate of the module.
        show: Function that shows the progress.
    """

    arm: str
    seed: int
    rate: float | None = None
    show: Show = field(default=silent, compare=False, repr=False)


@dataclass(frozen=True)
class Result:
    """The result of one training; a family adds its measurements.

    Args:
        arm: What was trained.
        seed: Its seed.
        rate: Its peak learning rate; ``None`` for the rate of the module.
    """

    arm: str
    seed: int
    rate: float | None

    @property
    def metrics(self) -> dict[str, Any]:
        """The measurements by name."""
        return {key: value for key, value in asdict(self).items() if key not in ("arm", "seed", "rate")}


R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Paper:
    """What a paper says about a technique, for the page of evidence.

    Args:
        technique: The technique, as the documentation calls it.
        family: Name of its family, as in ``docs/``.
        says: What the paper claims, in one short sentence.
        source: Name of the paper and its arXiv number.
    """

    technique: str
    family: str
    says: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Claim(Generic[R]):
    """A claim about techniques that trainings can confirm or contradict.

    A subclass adds its settings as fields. They are stored with each result, and ``--set`` changes them. A module in
    ``studies/figures`` with the name of its module has ``print_table(claim, results)``, which prints all measurements and
    what they mean, and ``draw(claim, results)``, which returns figures by name.

    Args:
        name: Name on the command line and of the file of results.
        text: The claim, in one sentence.
        paper: What a paper says about it; ``None`` for a claim of this project alone.
        about: Names of the techniques, if no paper names them.
        default_data: Name of the default data.
        arms: What is trained.
        reference: The arm with which the others are compared.
        metric: Name of the compared measurement.
        higher: Whether a higher value is better.
        margin: The claim holds if the difference is above this; negative for "no worse than".
        margins: Margins of arms that have another one.
        scale: Factor of the metric in reports, 100 for accuracies.
        unit: Unit of the scaled metric.
        rates: Peak learning rates to choose from, for each arm, on a seed that is not reported. One rate needs no choice.
        chosen_by: Measurement by which the rate is chosen.
        seeds: Number of seeds that a verdict needs.
        budget: Minutes that the claim takes on one CPU thread, until trainings are measured; gives its share of ``--budget``.
        data: File or folder of other data; ``None`` for the default, which needs no download.
        output: Folder of logs, tables and figures.
        wandb: ``"offline"`` or ``"online"`` to also log each training to W&B.
        device: ``"cpu"`` or ``"cuda"``.
    """

    result: ClassVar[type[Any]]
    reads: ClassVar[str] = ""  # what --data may be
    devices: ClassVar[Sequence[str]] = ("cpu", "cuda")
    choices: ClassVar[Mapping[str, Sequence[str]]] = {}  # values of settings that are words
    least: ClassVar[Mapping[str, int]] = {}  # smallest values of integer settings, by default 1
    name: str
    text: str
    paper: Paper | None = None
    about: Sequence[str] = ()
    default_data: str = "digits"
    arms: Sequence[str]
    reference: str
    metric: str
    higher: bool = True
    margin: float = 0.0
    margins: Mapping[str, float] = field(default_factory=dict)
    scale: float = 1.0
    unit: str = ""
    rates: Sequence[float] = ()
    chosen_by: str
    seeds: int = 5
    budget: float
    data: Path | None = None
    output: Path = Path("runs/studies")
    wandb: str | None = None
    device: str = "cpu"

    def check(self) -> None:
        """Raise ValueError if the claim cannot run with its settings."""
        if unknown := [arm for arm in self.arms if arm not in self.known]:
            raise ValueError(f"{self.name} has no arm {unknown[0]!r}. There are {', '.join(self.known)}.")
        if self.data and not self.reads:
            raise ValueError(f"{self.name} takes no --data; it would be ignored.")
        if self.data and not self.data.exists():
            raise ValueError(f"--data must be {self.reads}; {self.data} does not exist.")
        if self.device not in self.devices:
            raise ValueError(f"{self.name} runs on {', '.join(self.devices)} only.")
        for name in ("arms", "rates"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ; got {', '.join(map(str, values))}.")
        if not all(rate > 0 for rate in self.rates):
            raise ValueError(f"rates must be above 0; got {', '.join(map(str, self.rates))}.")
        for name, value in self.settings.items():
            if type(value) is int and value < self.least.get(name, 1):
                raise ValueError(f"{name} must be at least {self.least.get(name, 1)}; got {value}.")
            if name in self.choices and value not in self.choices[name]:
                raise ValueError(f"{name} must be {' or '.join(self.choices[name])}; got {value!r}.")

    @property
    def known(self) -> list[str]:
        """All possible arms."""
        declared = type(self).__dataclass_fields__["arms"].default
        return list(self.arms if declared is MISSING else declared)

    @property
    def compared(self) -> tuple[str, float]:
        """The name of the difference in reports, and the factor that gives its unit."""
        return "better by points" if self.unit == "%" else f"better by {self.unit}".rstrip(), self.scale

    def train(self, run: Run) -> R:
        """Run one training, and return its result. The seeds of all random generators are already set."""
        raise NotImplementedError

    def comparisons(self) -> list[tuple[str, str]]:
        """Return pairs of an arm and the arm with which it is compared."""
        return [(arm, self.reference) for arm in self.arms if arm != self.reference]

    def difference(self, results: Mapping[str, R], arm: str, reference: str) -> float:
        """Return how much better an arm is than another one with the same seed.

        Args:
            results: The results of one seed by arm.
            arm: The arm.
            reference: The other arm.
        """
        own, other = (float(getattr(results[name], self.metric)) for name in (arm, reference))
        return better_by(own, other, self.higher)

    def score(self, result: R) -> float:
        """Return the measurement by which a rate is chosen; higher is better."""
        value = float(getattr(result, self.chosen_by))
        return -math.inf if math.isnan(value) else value if self.higher else -value

    @property
    def setting_fields(self) -> list[Any]:
        """The fields that ``--set`` may change; a subclass marks others by ``field(metadata={"setting": False})``."""
        return [each for each in fields(self) if each.metadata.get("setting", True)]

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on, apart from arm, seed, rate and device."""
        general = {each.name for each in fields(Claim)}
        own = {each.name: getattr(self, each.name) for each in self.setting_fields if each.name not in general}
        return {**own, "data": self.data.name if self.data else None}

    def settings_of(self, arm: str) -> dict[str, Any]:
        """What a result of one arm depends on: the settings, and what a family adds for the arm."""
        return self.settings

    def code_roots(self) -> Sequence[Any]:
        """Return what the results depend on besides the class of the claim: classes, functions, modules, and text."""
        return ()

    def label(self, of: Run | R) -> str:
        """Return the name of one training, which is its folder in the output."""
        rate = f"_{of.rate:g}" if of.rate is not None else ""
        return f"{of.arm.replace(' ', '')}{rate}_seed{of.seed}"

    def folder(self, of: Run | R) -> Path:
        """Return the folder of one training."""
        return self.output / self.label(of)

    def trainer(self, run: Run, callbacks: list[Callback], **settings: Any) -> Trainer:
        """Return a Trainer that only logs, and shows nothing."""
        shows = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        logger = build_loggers(self.output, self.label(run), self.name, self.wandb)
        fixed = {"accelerator": self.device, "devices": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 10}
        return Trainer(**{"callbacks": callbacks, "logger": logger, **shows, **fixed, **settings})


def better_by(own: float, other: float, higher: bool = True) -> float:
    """Return by how much a value is better than another; nan is worse than any number, and two of them say nothing.

    Example:
        >>> better_by(3.0, 2.0), better_by(3.0, 2.0, higher=False), better_by(math.nan, 2.0)
        (1.0, -1.0, -inf)
        >>> better_by(math.nan, math.nan)
        nan
    """
    if math.isnan(own) and math.isnan(other):
        return math.nan
    worst = -math.inf
    mine, theirs = (worst if math.isnan(value) else value if higher else -value for value in (own, other))
    return 0.0 if mine == theirs else mine - theirs


def freeze(settings: Mapping[str, Any]) -> str:
    """Return settings as text, equal if and only if they are. A JSON file keeps what this text says."""
    return json.dumps(plain(settings), sort_keys=True)


def plain(value: Any) -> Any:
    """Return a value that JSON can express: paths and non-finite numbers as text, sequences as lists."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def restored(value: Any) -> Any:
    """Return a value of :func:`plain` with its non-finite numbers.

    Example:
        >>> restored({"loss": "nan", "steps": [1.0, "inf"], "outcome": "lost"})
        {'loss': nan, 'steps': [1.0, inf], 'outcome': 'lost'}
    """
    if isinstance(value, dict):
        return {key: restored(each) for key, each in value.items()}
    if isinstance(value, list):
        return [restored(each) for each in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
