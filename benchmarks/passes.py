"""Count what each technique adds to an ordinary training step: operators of torch, the bytes they move, and Python calls.

Counts do not depend on the load of the machine, so the test suite compares them with ``passes.json``. They do depend on the
version of torch. A small classifier trains once with each callback at its trial setting and once at its neutral one; the
counts of the same step without a callback are subtracted. One weight is large enough for code that works in pieces. The step
is not a log step. Views, and memory without content, count as nothing. Python calls are those of functions in this package
and in torch.

::

    python benchmarks/passes.py           # print the counts, and what differs from the table
    python benchmarks/passes.py --write   # write the table
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

import lightning_grad
from benchmarks.common import silence
from benchmarks.rows import markdown_table
from lightning_grad import callbacks
from lightning_grad.testing.reference import CLASSES, WIDTH, fit, make_classifier

TABLE = Path(__file__).with_suffix(".json")
HIDDEN = 8192  # x WIDTH: 131,072 entries in one weight
PLAIN, TRIAL, NEUTRAL = "plain", "trial", "neutral"
_COUNTED = tuple(str(Path(str(module.__file__)).parent) for module in (lightning_grad, torch))
_MEMORY_ONLY = ("empty", "new_empty")
_OVERWRITING = ("normal_", "zero_", "fill_", "copy_", "_foreach_zero_", "_foreach_copy_")  # the old content is not read
_OF_HOOKS = ("__setattr__", "__instancecheck__")  # Lightning writes the name of each hook on the module
_SLACK = 1.1  # of Python calls, which a harmless change of the code may move


@dataclass(frozen=True)
class Counts:
    """What one training step did, or how much more than a plain step."""

    calls: int = 0
    read: int = 0
    written: int = 0
    python: int = 0

    def __sub__(self, other: Counts) -> Counts:
        """Subtract each number."""
        mine, others = asdict(self), asdict(other)
        return Counts(**{name: mine[name] - others[name] for name in mine})


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators of torch and the bytes of their arguments and results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = self.read = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(_MEMORY_ONLY):
            arguments = func._schema.arguments
            given = dict(zip([a.name for a in arguments], args, strict=False)) | (kwargs or {})
            changed = [a.name for a in arguments if a.alias_info and a.alias_info.is_write]
            unread = changed if name in _OVERWRITING else [a.name for a in arguments if a.is_out]
            self.calls += 1
            self.read += _bytes_of([value for key, value in given.items() if key not in unread])
            self.written += _bytes_of([given.get(key) for key in changed] or result)
        return result


def _bytes_of(nested: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(nested) if isinstance(leaf, Tensor))


class Counter(pl.Callback):
    """Count operators in the second batch of the second epoch, and Python calls in that of the next two.

    It must be the first callback, so the step includes all others.
    """

    def __init__(self) -> None:
        self._operators, self._python, self._counting = _Operators(), [0, 0], ExitStack()

    @property
    def counts(self) -> Counts:
        """The numbers of the step; of Python calls the smaller one, because finalizers of earlier runs may add some."""
        return Counts(self._operators.calls, self._operators.read, self._operators.written, min(self._python))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._counting.close()
        if batch_idx == 1 and trainer.current_epoch == 1:
            self._counting.enter_context(self._operators)
        elif batch_idx == 1 and trainer.current_epoch > 1:
            self._epoch = trainer.current_epoch - 2
            if gc.isenabled():
                gc.disable()
                self._counting.callback(gc.enable)
            self._counting.callback(sys.setprofile, sys.getprofile())
            sys.setprofile(self._see)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        # Comprehensions are calls in some versions of Python only.
        self._python[self._epoch] += (
            event == "call"
            and code.co_filename.startswith(_COUNTED)
            and code.co_name[0] != "<"
            and code.co_name not in _OF_HOOKS
        )


def count(found: Sequence[Any]) -> Counts:
    """Return the counts of a step with some callbacks."""
    module, counter = make_classifier(), Counter()
    module.hidden, module.norm = nn.Linear(WIDTH, HIDDEN), nn.BatchNorm1d(HIDDEN)
    module.head = nn.Linear(HIDDEN, CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit([counter, *found], module, max_epochs=4, limit_val_batches=1, log_every_n_steps=10**6)
    return counter.counts


def count_all() -> dict[str, Counts]:
    """Return the counts of each technique at its trial and its neutral setting, beyond those of a plain step."""
    plain = count([])
    found = {PLAIN: plain}
    for name in callbacks.__all__:
        technique = getattr(callbacks, name)
        found[f"{name}, {TRIAL}"] = count([technique(**technique.trial)]) - plain
        if technique.neutral and isinstance(technique.neutral, Mapping):
            found[f"{name}, {NEUTRAL}"] = count([technique(**{**technique.trial, **technique.neutral})]) - plain
    return found


def differences(found: Mapping[str, Counts], table: Mapping[str, Any]) -> list[str]:
    """Return what differs from the table: any operator or byte, and a tenth of the Python calls."""
    known = {name: Counts(**row) for name, row in table["steps"].items()}
    lines = [f"{name}: gone" for name in known if name not in found]
    for name, counts in found.items():
        before = known.get(name)
        if before is None:
            lines.append(f"{name}: not in the table")
            continue
        # Negative if an optimizer does less than the plain step's.
        least, most = sorted((before.python / _SLACK, before.python * _SLACK))
        if before != Counts(counts.calls, counts.read, counts.written, before.python) or not (
            least - 5 <= counts.python <= most + 5
        ):
            lines.append(f"{name}: {before} is now {counts}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts, and compare them with the table or write it; return 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # masks are refreshed by other operators with several
    silence()
    found = count_all()
    header = ["step", "operators", "KB read", "KB written", "Python calls"]
    rows = [
        [n, str(c.calls), f"{c.read / 1000:.1f}", f"{c.written / 1000:.1f}", str(c.python)] for n, c in found.items()
    ]
    print(markdown_table(header, rows))
    if options.write:
        rows_of = ",\n".join(f"  {json.dumps(name)}: {json.dumps(asdict(counts))}" for name, counts in found.items())
        TABLE.write_text(f'{{\n "torch": "{version()}",\n "steps": {{\n{rows_of}\n }}\n}}\n')
        return 0
    differing = differences(found, json.loads(TABLE.read_text()))
    print("\n".join(["", *(differing or ["Nothing differs from the table."])]))
    return int(bool(differing))


def version() -> str:
    """Return the version of torch, without the kind of build."""
    return torch.__version__.partition("+")[0]


if __name__ == "__main__":
    sys.exit(main())
