"""Run the scripts that measure speed and memory, one after another, and write what they measure to ``benchmarks/results``.

Each script runs in a process of its own. If one fails, its old results are gone and the others are kept. Then
``docs/tables.py`` writes the tables of docs/benchmarks.md. Run it on an idle machine.

::

    python -m benchmarks
    python -m benchmarks clipping memory
    python -m benchmarks --quick
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import RESULTS, SCRIPTS

ROUNDS = {"sparsity": 2}  # fewer than the script's default: its rows are steady, and there are many
HERE = Path(__file__).resolve().parent
FIGURE = HERE.parent / "docs/images/communication_slow_link.png"


def command_of(script: str, options: argparse.Namespace) -> list[str]:
    """Return the command that runs one script."""
    command = [sys.executable, str(HERE / f"{script}.py"), "--out", str(RESULTS / f"{script}.json")]
    if script == "several_machines" and not options.quick:
        command += ["--figure", str(FIGURE)]
    if options.quick:
        return [*command, "--quick"]
    return [*command, *(["--rounds", str(ROUNDS[script])] if script in ROUNDS else [])]


def run(script: str, options: argparse.Namespace) -> bool:
    """Run one script, which writes its results; return True if it succeeded."""
    (RESULTS / f"{script}.json").unlink(missing_ok=True)
    return subprocess.run(command_of(script, options)).returncode == 0


def write_tables() -> bool:
    """Write the tables of the documentation; return True if it succeeded."""
    return subprocess.run([sys.executable, str(HERE.parent / "docs/tables.py")]).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scripts of the command line, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", metavar="script", help=f"scripts to run (default: {' '.join(SCRIPTS)})")
    parser.add_argument("--quick", action="store_true", help="a rough answer of each script; do not commit it")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.scripts if name not in SCRIPTS]:
        parser.error(f"no such script: {', '.join(unknown)}. Choose from {', '.join(SCRIPTS)}.")
    chosen = options.scripts or SCRIPTS
    failed, begin = [], time.monotonic()
    for number, script in enumerate(chosen, 1):
        rest = f"; then {', '.join(chosen[number:])}" if chosen[number:] else ""
        minutes = (time.monotonic() - begin) / 60
        print(f"\n[{number}/{len(chosen)}] {script}.py, after {minutes:.0f} minutes{rest}", flush=True)
        if not run(script, options):
            failed.append(script)
    minutes = (time.monotonic() - begin) / 60
    print(f"\n{len(chosen) - len(failed)} of {len(chosen)} scripts succeeded in {minutes:.0f} minutes.", flush=True)
    if failed:
        print(f'Failed: {", ".join(failed)}. Run `make bench ONLY="{" ".join(failed)}"` again.', flush=True)
    written = write_tables()
    return int(bool(failed) or not written)


if __name__ == "__main__":
    sys.exit(main())
