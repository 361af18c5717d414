"""What the checks of a callback found: one row for each check, which print as a table."""

from __future__ import annotations

import itertools
import textwrap
from typing import Literal, NamedTuple, get_args

Status = Literal["ok", "failed", "not applicable", "expected failure"]
REFUSES = "refuses before the first batch: "
_WIDTH, _MANY = 120, 3


class Row(NamedTuple):
    """The result of one check.

    Args:
        check: Name of the check. It begins with the guarantee, such as ``"g3_"``.
        status: ``"ok"``, ``"failed"``, ``"not applicable"`` or ``"expected failure"``.
        words: What was found; may be empty if the status is ``"ok"``.
        line: Place in the callback's code, as ``"path:line"``; empty if it was not found.
    """

    check: str
    status: Status
    words: str = ""
    line: str = ""

    @property
    def guarantee(self) -> str:
        """The guarantee, such as ``"G3"``."""
        return self.check.split("_")[0].upper()

    @property
    def refused(self) -> bool:
        """Whether the callback refused the run of this check before the first batch, which is allowed."""
        return self.words.startswith(REFUSES)


class Rows(list[Row]):
    """The rows of one callback. ``print(rows)`` shows a table, and :meth:`markdown` returns one for a page.

    Args:
        rows: The rows.
        title: What was checked, for the first line.

    Example:
        >>> rows = Rows([Row("g1_trains", "ok"), Row("g5_resume", "failed", "count: 3 is not 7", "mine.py:9")], "Mine")
        >>> print(rows)
        Mine: 1 ok, 1 failed
        g1_trains  ok
        g5_resume  FAILED  count: 3 is not 7
                           mine.py:9
        >>> [row.check for row in rows.failed]
        ['g5_resume']
    """

    def __init__(self, rows: list[Row], title: str = "") -> None:
        super().__init__(rows)
        self.title = title

    @property
    def failed(self) -> Rows:
        """The rows of checks that failed and were not expected to."""
        return Rows([row for row in self if row.status == "failed"], self.title)

    def summary(self) -> str:
        """Return the number of rows of each status, in words."""
        counts = {status: sum(row.status == status for row in self) for status in get_args(Status)}
        return ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "no check"

    def __str__(self) -> str:
        lines = [f"{self.title}: {self.summary()}" if self.title else self.summary()]
        shown = self._shown()
        names = max((len(name) for name, _ in shown), default=0)
        states = max((len(row.status) for row in self), default=0)
        for name, row in shown:
            status = row.status.upper() if row.status == "failed" else row.status
            head = f"{name:{names}}  {status:{states}}  "
            words = textwrap.wrap(row.words, max(_WIDTH - len(head), 40)) + [row.line] * bool(row.line)
            lines += [f"{head}{words[0] if words else ''}".rstrip(), *(" " * len(head) + part for part in words[1:])]
        return "\n".join(lines)

    def _shown(self) -> list[tuple[str, Row]]:
        """Return a name and a row for each line; checks in a row that do not apply for the same reason share one."""
        shown: list[tuple[str, Row]] = []
        for reason, rows in itertools.groupby(self, lambda row: row.status == "not applicable" and row.words):
            group = list(rows)
            if reason and len(group) > _MANY:
                shown.append((f"{len(group)} more checks", group[0]))
            else:
                shown += [(row.check, row) for row in group]
        return shown

    def markdown(self) -> str:
        """Return the rows as a table in Markdown."""
        lines = ["| Check | Result | Found |", "|---|---|---|"]
        for name, row in self._shown():
            found = f"{row.words} (`{row.line}`)" if row.line else row.words
            lines.append(f"| {name} | {row.status} | {' '.join(found.split()).replace('|', chr(92) + '|')} |")
        return "\n".join(lines)
