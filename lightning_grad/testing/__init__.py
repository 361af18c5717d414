"""Tools to test a technique, which do not need pytest.

The contract suite of this package is built from them, and you can test your own techniques with them. They may import
all other packages, and no other package imports them.

- :func:`check_callback` puts any Lightning callback through the eight guarantees, and returns :class:`Rows` of
  :class:`Row`.
- A small project: :func:`make_classifier`, :func:`make_data`, :func:`loaders` and :class:`ResumableLoader`,
  :func:`make_trainer` and :func:`fit`. Its optimizers are in ``OPTIMIZERS``, its sizes are ``BATCH``, ``BATCHES``,
  ``TOKENS``, ``WIDTH`` and ``CLASSES``.
- Any module with its data: :class:`Project`.
- The state after a run: :func:`state_of`, compared by :func:`assert_identical`.
- Interrupted runs: :class:`StopIn`, :class:`StopAt`, :class:`StopAfter`, :class:`StopInTrainingStep`.
- Traces that a technique leaves: :func:`traces` of a module, :func:`trainer_traces`, :func:`optimizer_traces`, and
  :class:`PicklerOfNoRun`, which raises if a copy of a technique contains parts of the run.
- Host syncs in a step: :class:`NoSync`, :func:`guarded`, :class:`GuardStep`.
- Several processes: :func:`on_ranks`.
"""

from lightning_grad.testing.checker import check_callback
from lightning_grad.testing.project import Project
from lightning_grad.testing.ranks import on_ranks
from lightning_grad.testing.reference import (
    BATCH,
    BATCHES,
    CLASSES,
    OPTIMIZERS,
    TOKENS,
    WIDTH,
    ResumableLoader,
    fit,
    loaders,
    make_classifier,
    make_data,
    make_trainer,
)
from lightning_grad.testing.rows import Row, Rows
from lightning_grad.testing.states import assert_identical, state_of
from lightning_grad.testing.stopping import StopAfter, StopAt, StopIn, StopInTrainingStep
from lightning_grad.testing.syncs import GuardStep, NoSync, guarded
from lightning_grad.testing.traces import PicklerOfNoRun, optimizer_traces, traces, trainer_traces

__all__ = [
    "BATCH",
    "BATCHES",
    "CLASSES",
    "OPTIMIZERS",
    "TOKENS",
    "WIDTH",
    "GuardStep",
    "NoSync",
    "PicklerOfNoRun",
    "Project",
    "ResumableLoader",
    "Row",
    "Rows",
    "StopAfter",
    "StopAt",
    "StopIn",
    "StopInTrainingStep",
    "assert_identical",
    "check_callback",
    "fit",
    "guarded",
    "loaders",
    "make_classifier",
    "make_data",
    "make_trainer",
    "on_ranks",
    "optimizer_traces",
    "state_of",
    "traces",
    "trainer_traces",
]
