"""``lightning-grad check``: try all techniques on the user's own module and data."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from lightning_grad.cli.catalog import is_strategy, techniques
from lightning_grad.cli.check.outcome import Outcome, outcome_of
from lightning_grad.cli.check.report import as_json, as_markdown, as_text
from lightning_grad.cli.check.rounds import Rounds
from lightning_grad.cli.check.rows import ROUNDS, Row
from lightning_grad.cli.check.short_trainer import EPOCHS
from lightning_grad.cli.check.sources import ShortProject, TargetError, source_of
from lightning_grad.cli.check.trial import InterruptedTrialError, try_out, undisturbed
from lightning_grad.functional.choices import hint_for

_ABOUT = (
    "Train your own module for a few batches with each technique, and print which techniques run, what they cost and what "
    "they act on. Your own code runs, with its hooks; loggers and checkpoints are off."
)
_FAILED, _UNUSABLE, _INTERRUPTED = 1, 2, 130


def add_command(commands: Any) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser(
        "check",
        help="try the techniques on your own module and data",
        description=_ABOUT,
        usage="lightning-grad check TARGET [options]",  # --only would take a target behind it for a name
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="YAML file of a LightningCLI, or package.module:function, where the function returns the module and its loaders "
        "or its datamodule",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="techniques or families to try (default: all callbacks)"
    )
    parser.add_argument("--strategies", action="store_true", help="also try the strategies, on two CPU processes")
    parser.add_argument("--batches", type=_batches, default=4, metavar="N", help="batches for each epoch (default: 4)")
    parser.add_argument("--memory", action="store_true", help="also measure the peak memory")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.set_defaults(run=_run)


def _batches(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be an integer >= 2; got {text}")
    return int(text)


def chosen_techniques(only: Sequence[str] | None, strategies: bool) -> list[type[Any]]:
    """Return the techniques to try.

    Args:
        only: Names of techniques and families; ``None`` for all.
        strategies: Whether strategies are tried too, if ``only`` does not name them.

    Raises:
        ValueError: If a name is unknown.
    """
    families = techniques()
    every = {technique.__name__: technique for members in families.values() for technique in members}
    if only is None:
        return [technique for technique in every.values() if strategies or not is_strategy(technique)]
    for name in only:
        if name not in every and name not in families:
            raise ValueError(
                f"--only: there is no technique or family {name!r}.{hint_for(name, [*every, *families])} `lightning-grad "
                "list` prints all names."
            )
    named = {each for name in only for each in families.get(name, [every.get(name)])}
    return [technique for technique in every.values() if technique in named]


def _run(arguments: argparse.Namespace) -> int:
    chosen = chosen_techniques(arguments.only, arguments.strategies)
    _say(f"{arguments.target}: your own code runs, with its hooks. Nothing is logged or saved.")
    try:
        with undisturbed(), redirect_stdout(sys.stderr):
            project = ShortProject(source_of(arguments.target))
        # On the CPU, if processes will be forked.
        bare = try_out(project, None, arguments.batches, "cpu" if any(map(is_strategy, chosen)) else "auto")
    except TargetError as error:
        return _say_unusable(str(error))
    except (KeyboardInterrupt, InterruptedTrialError):
        _say("Interrupted before a technique was tried.")
        return _INTERRUPTED
    except (Exception, SystemExit) as error:
        return _say_unusable(f"{arguments.target} does not load:\n\n{outcome_of(error, None).words[0]}")
    if bare.status != "runs":
        return _say_unusable(f"{arguments.target} does not train without any technique:\n\n{bare.words[0]}")
    return _report(arguments, Rounds(project, chosen, bare.batches // EPOCHS, arguments.memory), bare)


def _device_of(rows: Sequence[Row]) -> str:
    """Return the device on which callbacks were tried; strategies run on the CPU."""
    return next((row.outcome.device for row in rows if row.outcome.device and not is_strategy(row.technique)), "")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _say_unusable(text: str) -> int:
    _say(f"error: {text}")
    return _UNUSABLE


def _report(arguments: argparse.Namespace, rounds: Rounds, bare: Outcome) -> int:
    length = bare.batches // EPOCHS
    _say(f"It trains for {EPOCHS} epochs of {length} batch{'es' if length > 1 else ''}, in {ROUNDS} rounds.")
    is_interrupted = False
    try:
        rounds.run()
    except (KeyboardInterrupt, InterruptedTrialError):
        is_interrupted = True
    rows = list(rounds.rows.values())
    memory = any(row.memory is not None for row in rows)
    if arguments.json:
        about = {"target": arguments.target, "epochs": EPOCHS, "batches": length}
        print(as_json(rows, {**about, "device": _device_of(rows) or bare.device, "interrupted": is_interrupted}))
    else:
        print((as_markdown if arguments.markdown else as_text)(rows, memory))
    if is_interrupted:
        _say("\nInterrupted: this is what was known by then.")
        return _INTERRUPTED
    return _FAILED if any(row.outcome.status == "FAILED" for row in rows) else 0
