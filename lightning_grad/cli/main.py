"""The commands of ``lightning-grad``."""

import argparse
from collections.abc import Sequence

from lightning_grad.cli import check, listing, scores, show


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: The words after ``lightning-grad``. Default: those of the process.

    Raises:
        SystemExit: With a one-line error message if an argument, or a file that it names, is wrong.
    """
    parsed = _parser().parse_args(arguments)
    try:
        status = parsed.run(parsed)
    except FileNotFoundError as error:
        raise SystemExit(f"error: there is no file {error.filename}") from None
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    if status:
        raise SystemExit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-grad", description="Gradient techniques for any LightningModule, on the command line."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (check, listing, show, scores):
        module.add_command(commands)
    return parser
