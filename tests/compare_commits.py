"""Compare what every technique trains on two commits, bit for bit.

    python tests/compare_commits.py main                        # the working tree against main
    python tests/compare_commits.py v0.2.0 v0.3.0 --only ZClip  # one technique on two commits

Each exported callback and strategy trains a small classifier at its trial setting, once with the code of each commit, in
this environment. Then weights, optimizer states, the technique's own state, logged metrics, random states and messages
are compared. Results of another machine are never used: float arithmetic differs between CPUs.

The settings are those of the newer commit. Where an older constructor does not take them, because an argument was renamed,
the older commit's own setting is used. The module and the data are those of the tree that this file stands in.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("weights", "optimizers", "state", "metrics", "random", "messages")
SHOWN = 3  # differences of one technique and part


# Two trees.


@contextlib.contextmanager
def tree_of(revision: str, folder: Path) -> Iterator[Path]:
    """Give the folder that a revision names, or check a commit out into a worktree in ``folder``."""
    if Path(revision, "lightning_grad").is_dir():
        yield Path(revision).resolve()
        return
    git("worktree", "add", "--quiet", "--detach", str(folder), revision)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def git(*arguments: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)} failed: {done.stderr.strip()}")


def run_tree(tree: Path, only: Sequence[str], every: bool, entries: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Train the techniques of one tree in a process of its own, and return its settings and what is left.

    Raises:
        SystemExit: If the process fails, or imports another tree's package.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "request.pt"), Path(folder, "answer.pt")
        torch.save({"only": list(only), "every": every, "entries": entries}, request)
        command = [sys.executable, "-P", str(ROOT / "tests" / "trial_runs.py"), str(request), str(answer)]
        variables = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"The runs in {tree} ended with an error:\n{done.stderr[-3000:]}")
        result: dict[str, Any] = torch.load(answer, weights_only=False)
    if not Path(result["package"]).is_relative_to(tree):
        raise SystemExit(f"The runs in {tree} imported {result['package']}. Uninstall that package, or give its tree.")
    return result


# What differs.


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Return where two nested containers differ in a bit.

    Example:
        >>> differences({"a": [1.0, 0.0]}, {"a": [1.0, -0.0]})
        ['a.1: 0.0 is now -0.0']
    """
    inner = f"{where}." if where else ""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return [] if same_bits(old, new) else [f"{where}: {distance(old, new)}"]
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lost = [f"{inner}{key}: gone" for key in old if key not in new]
        added = [f"{inner}{key}: new" for key in new if key not in old]
        both = [line for key in old if key in new for line in differences(old[key], new[key], f"{inner}{key}")]
        return [*lost, *added, *both]
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        if len(old) != len(new):
            return [f"{where}: {len(old)} entries are now {len(new)}"]
        return [
            line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in differences(a, b, f"{inner}{i}")
        ]
    return [] if type(old) is type(new) and repr(old) == repr(new) else [f"{where}: {old!r} is now {new!r}"]


def same_bits(old: Tensor, new: Tensor) -> bool:
    if old.dtype != new.dtype or old.shape != new.shape:
        return False
    if old.is_complex():
        old, new = torch.view_as_real(old), torch.view_as_real(new)
    return torch.equal(*(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (old, new)))


def distance(old: Tensor, new: Tensor) -> str:
    if old.dtype != new.dtype or old.shape != new.shape:
        return f"{old.dtype} {tuple(old.shape)} is now {new.dtype} {tuple(new.shape)}"
    return f"differs by up to {(old.double() - new.double()).abs().max():.3g}"


def compare(old: Mapping[str, Any], new: Mapping[str, Any], parts: Sequence[str]) -> dict[str, list[str]]:
    """Return by technique where its two runs differ; a run that failed differs, a technique that is new does not."""
    found = {}
    for name, run in new["results"].items():
        before = old["results"].get(name)
        found[name] = compare_runs({} if before is None else before["left"], run["left"], parts)
    return found


def gone(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the techniques that only the older commit has."""
    here, before = ({entry["name"] for entry in side["own"].values()} for side in (new, old))
    return sorted(before - here)


def compare_runs(old: Mapping[str, Any], new: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    errors = [
        f"{when} failed: {side['error'].strip()}" for when, side in (("old", old), ("new", new)) if "error" in side
    ]
    if errors or not old:
        return errors
    if "ranks" in old:
        ranks = enumerate(zip(old["ranks"], new["ranks"], strict=True))
        return [f"rank {rank}, {line}" for rank, (a, b) in ranks for line in compare_runs(a, b, parts)]
    return [f"{part}: {line}" for part in parts for line in differences(old[part], new[part])[:SHOWN]]


# What is printed.


def table(old: Mapping[str, Any], new: Mapping[str, Any], found: Mapping[str, list[str]]) -> str:
    """Return one line a technique, and below it what differs."""
    width = max(len(name) for name in found)
    lines = []
    for name, differing in found.items():
        before = old["results"].get(name)
        verdict = "DIFFERS" if differing else "new" if before is None else "same"
        if before is not None and before["entry"] != new["results"][name]["entry"]:
            verdict += " (each commit by its own setting)"
        lines += [f"{name:{width}}  {verdict}", *(f"    {line}" for line in differing)]
    return "\n".join([*lines, *(f"{name:{width}}  gone" for name in gone(old, new))])


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if nothing differs, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit, branch or tag, or a folder that holds the package")
    parser.add_argument("new", nargs="?", default=str(ROOT), help="the same; by default the working tree of this file")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="techniques to run; by default all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is compared; by default all")
    parser.add_argument(
        "--every-setting", action="store_true", help="run every entry of the contract suite, not only trial"
    )
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        trees = [stack.enter_context(tree_of(getattr(chosen, side), Path(folder, side))) for side in ("old", "new")]
        new = run_tree(trees[1], chosen.only, chosen.every_setting)
        if not new["results"]:
            raise SystemExit(f"No technique is called {' or '.join(chosen.only)}. There are {', '.join(new['own'])}.")
        old = run_tree(trees[0], chosen.only, chosen.every_setting, new["own"])
    found = compare(old, new, chosen.parts)
    print(table(old, new, found))
    return int(any(found.values()) or bool(gone(old, new)))


if __name__ == "__main__":
    sys.exit(main())
