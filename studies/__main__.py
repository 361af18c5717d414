"""Run the studies: train what the claims miss, store each result, and print the verdicts.

::

    python -m studies --list
    python -m studies --budget 20
    python -m studies --only clipping 'data-pruning*' --seeds 10
    python -m studies --only clipping --set factor=nan steps=60 --figures

At its end, it writes the page of evidence of all results in the folder, ``runs/studies/evidence.md``. ``make docs`` writes
``docs/evidence.md`` from ``studies/results``.

Stop a study at any time: the same command continues it. Two commands at the same time share the work.
"""

from __future__ import annotations

import ast
import os
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from studies import ROOT
from studies.claim import Claim, freeze, plain
from studies.claims import CLAIMS
from studies.evidence import rows_of
from studies.page import Page, write
from studies.plan import CHOICE_SEED
from studies.report import print_estimate, print_report, show_family
from studies.results import FOLDER, Store
from studies.runner import Study, run_claims, verify_claims

GENERAL = ("arms", "rates")  # of the fields of every claim, what --set may change


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the studies of the command line, and return the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        studies = choose(options)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print_estimate([study.plan() for study in studies], texts=True)
        return 0
    code = 0
    try:
        if options.verify:
            code = int(bool(verify_claims(studies)))
        elif not options.report:
            code = int(bool(run_claims(studies, options.budget)))
    except KeyboardInterrupt:
        print("\nStopped. The same command continues.")
        code = 130
    for study in studies:
        print_report(study.plan())
        if options.figures:
            show_family(study.plan())
    print(f"\nAll claims, and what they rest on: {write_page(options.results, options.output)}")
    return code


def write_page(results: Path, folder: Path) -> Path:
    """Write the page of evidence of all results in a folder, and return its path."""
    docs = Path(os.path.relpath(ROOT / "docs", folder)).as_posix() + "/"
    rows = rows_of(CLAIMS.values(), Store(results))
    return write(Page(rows, docs, "", lambda family: family.replace("_", " ").capitalize()), folder)


def build_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser("python -m studies", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", metavar="CLAIM", help="claims to run, also as patterns (default: all)")
    add("--seeds", help="number of seeds, or seeds such as 0,3 or 5-9 (default: as many as each claim needs)")
    add(
        "--budget",
        type=float,
        metavar="MINUTES",
        help="time for all claims together, those first that need the least (default: until all are complete)",
    )
    add("--device", default="cpu", choices=("cpu", "cuda"), help="device of the trainings (default: cpu)")
    add("--threads", type=int, default=1, help="CPU threads (default: 1; more do not speed up so small networks)")
    add("--data", type=Path, help="folder with CIFAR-10, or text for clipping-spikes, instead of the default data")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the claims; lists have commas")
    add("--fresh", action="store_true", help="train again what was trained by other code, versions or hardware")
    add(
        "--verify", action="store_true", help="train one result of each arm again where other code made it, and compare"
    )
    add("--list", action="store_true", help="list the claims and how long they take, and do not run them")
    add("--report", action="store_true", help="print what is known, and do not run anything")
    add("--figures", action="store_true", help="also print all measurements of the family, and draw its figures")
    add(
        "--results",
        type=Path,
        default=FOLDER,
        metavar="FOLDER",
        help="folder of the results (default: studies/results)",
    )
    add(
        "--output",
        type=Path,
        default=Path("runs/studies"),
        help="folder of logs, figures and the page of evidence (default: runs/studies)",
    )
    add("--wandb", nargs="?", const="offline", choices=("offline", "online"), help="also log each training to W&B")
    return parser


def choose(options: Namespace) -> list[Study]:
    """Return the studies of the options. Raise ValueError for names, seeds and settings that do not exist."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here. Use --device cpu.")
    if options.budget is not None and not options.budget > 0:
        raise ValueError(f"--budget must be above 0 minutes; got {options.budget:g}.")
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1; got {options.threads}.")
    torch.set_num_threads(options.threads)
    seeds, studies = None if options.seeds is None else seeds_of(options.seeds), []
    for name in names_of(options.only):
        try:
            studies.append(build(name, options, seeds))
        except ValueError as error:
            if options.only is None or name not in options.only:  # a claim among many, not one that was named
                print(f"skipped: {error}")
                continue
            raise
    if not studies:
        raise ValueError("no claim is left to run; see above.")
    return studies


def build(name: str, options: Namespace, seeds: Sequence[int] | None) -> Study:
    """Return the study of one claim."""
    given = {"device": options.device, "data": options.data, "wandb": options.wandb}
    claim = change(replace(CLAIMS[name], **given), options.set)
    claim.check()
    claim = replace(claim, output=options.output / folder_of(claim))
    return Study(claim, seeds or range(claim.seeds), Store(options.results), options.fresh)


def folder_of(claim: Claim[Any]) -> str:
    """Return the name of the folder of logs and figures; with other settings, a claim has another one.

    Example:
        >>> folder_of(replace(CLAIMS["clipping"], steps=60, device="cuda"))
        'clipping_steps=60_cuda'
    """
    usual, own = CLAIMS[claim.name].settings, claim.settings
    changed = [f"{key}={plain(value)}" for key, value in own.items() if freeze({"": value}) != freeze({"": usual[key]})]
    return "_".join([claim.name, *changed, *([claim.device] if claim.device != "cpu" else [])])


def names_of(only: Sequence[str] | None) -> list[str]:
    """Return the names of the chosen claims.

    Example:
        >>> names_of(["clipping", "data-pruning*"])
        ['clipping', 'data-pruning', 'data-pruning-wrong-labels']
    """
    for pattern in only or ():
        if not any(fnmatch(name, pattern) for name in CLAIMS):
            raise ValueError(f"there is no claim {pattern!r}.{suggest(pattern, CLAIMS)}")
    return [name for name in CLAIMS if only is None or any(fnmatch(name, pattern) for pattern in only)]


def suggest(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    """Return the known words, or those that are similar."""
    close = get_close_matches(word, list(known), 3, 0.5)
    return f" Did you mean {' or '.join(close)}?" if close else f" There are {', '.join(known)}."


def seeds_of(text: str) -> list[int]:
    """Return the seeds of an option.

    Example:
        >>> seeds_of("3"), seeds_of("0,7-9")
        ([0, 1, 2], [0, 7, 8, 9])
    """
    try:
        ranges = [part.split("-") for part in text.split(",")]
        seeds = [seed for ends in ranges for seed in range(int(ends[0]), int(ends[-1]) + 1)]
    except ValueError:
        seeds = []
    if text.isdecimal():
        seeds = list(range(int(text)))
    if not seeds:
        raise ValueError(f"--seeds must be a number such as 5, or seeds such as 0,3 or 5-9; got {text!r}.")
    if CHOICE_SEED in seeds:
        raise ValueError(f"seed {CHOICE_SEED} chooses the rates, so it cannot be reported. Use seeds below it.")
    return list(dict.fromkeys(seeds))


def change(claim: Claim[Any], assignments: Sequence[str]) -> Claim[Any]:
    """Return a claim with other settings."""
    general = {each.name for each in fields(Claim)} - set(GENERAL)
    known = [each.name for each in claim.setting_fields if each.name not in general]
    changes = {}
    for assignment in assignments:
        name, sign, text = assignment.partition("=")
        if name not in known:
            raise ValueError(f"{claim.name} has no setting {name!r}.{suggest(name, known)}")
        if not sign:
            raise ValueError(f"--set {name} has no value. Write NAME=VALUE.")
        changes[name] = read_value(name, text, getattr(claim, name))
    return replace(claim, **changes)


def read_value(name: str, text: str, old: Any) -> Any:
    """Return a value of the type of the old one.

    Example:
        >>> read_value("rates", "0.1,0.3", ()), read_value("factor", "nan", 1.0), read_value("width", "8", None)
        ((0.1, 0.3), nan, 8)
    """
    kinds = {int: "an integer", float: "a number"}
    try:
        if name == "rates":
            return tuple(float(part) for part in text.split(","))
        if isinstance(old, tuple):
            return tuple(text.split(","))
        return type(old)(text) if old is not None else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if old is None:
            return text
        raise ValueError(f"{name} must be {kinds.get(type(old), 'numbers with commas')}; got {text!r}.") from None


if __name__ == "__main__":
    raise SystemExit(main())
