"""``lightning-grad list``: all techniques, each in one line."""

import argparse
from typing import Any

from lightning_grad.cli.catalog import as_text, summary_of, techniques


def add_command(commands: Any) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser("list", help="list the techniques", description="List the techniques by family.")
    parser.set_defaults(run=_run)


def _run(_: argparse.Namespace) -> None:
    families = techniques()
    width = max(len(technique.__name__) for members in families.values() for technique in members)
    blocks = (
        "\n".join([family, *(f"  {each.__name__:<{width}}  {as_text(summary_of(each))}" for each in members)])
        for family, members in families.items()
    )
    print("\n\n".join(blocks))
    print("\nlightning-grad show NAME prints the arguments of a technique and how to use it.")
