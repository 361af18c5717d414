"""Base classes and tools for authors of techniques. Nothing here depends on a particular technique.

Every technique derives from one of these bases. Read ``callback.py`` first: it holds what all of
them share. Attributes that live for one fit are in ``fit.py``.

- :class:`GradientConditioner`: a rule on the gradients of one optimizer step.
- :class:`WeightCallback`: computes the weights that the module sees from the weights that train.
- :class:`AdapterCallback`: trains parameters next to frozen weights.
- :class:`OptimizerCallback`: changes optimizers, their steps, learning rates, moments and closures.
- :class:`AveragingCallback`: shows averaged weights in validation and checkpoints.
- :class:`SubsetCallback`: chooses the samples of each epoch.
- :class:`MonitoredCallback`: acts on the values of a metric.
- :class:`ProbeCallback`: measures the module at regular intervals and logs the results; changes
  nothing.

All bases share ``undo.py`` (restores what was changed), ``dispatch.py`` (wraps methods in a fixed
order), ``quiet.py`` and ``module_state.py`` (run the module without a trace), ``ranks.py`` (sums
and means over ranks), ``progress.py`` (the share of the run that is done), ``compatibility.py``
(what a technique works with) and ``record.py`` (the rows that a technique records in a run). Four
folders hold the parts of the bases; the ``__init__.py`` of each lists its files:

- ``losses/``: losses of single samples: captured in the module's step, reweighted in it, or
  measured over a training set;
- ``views/``: weights that the module sees in place of those that train;
- ``steps/``: repeated optimizer steps, temporary learning rates and frozen moments;
- ``samples/``: the training loader, its batches, and the length of epochs and schedules.
"""

from lightning_grad.core.adapters import AdapterCallback
from lightning_grad.core.averaging import AveragingCallback
from lightning_grad.core.callback import Chosen, GradCallback
from lightning_grad.core.compatibility import WHOLE_WEIGHTS, Compatibility, manual, no, stand_in, yes
from lightning_grad.core.conditioner import ELEMENTWISE, GradientConditioner, GradientStep, Role
from lightning_grad.core.dispatch import WrapOrder, wrap_method
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.losses.given_functions import LossRequest
from lightning_grad.core.losses.look import Look
from lightning_grad.core.losses.loss_tap import add_to_losses, read_losses, reweight_losses
from lightning_grad.core.losses.scoring import look_at_all
from lightning_grad.core.monitored import Interval, Mode, MonitoredCallback
from lightning_grad.core.optimizers import OptimizerCallback
from lightning_grad.core.probe import ProbeCallback
from lightning_grad.core.probe_reading import Picture, Reading, Table
from lightning_grad.core.probe_samples import ProbeLook
from lightning_grad.core.progress import run_progress, total_steps
from lightning_grad.core.quiet import is_quiet, quiet
from lightning_grad.core.ranks import mean_over_ranks, sum_over_ranks
from lightning_grad.core.record import RunRecord
from lightning_grad.core.samples.training_set import TrainingSet
from lightning_grad.core.steps.averaged_weights import AveragedCopies
from lightning_grad.core.steps.chosen_rates import ChosenRates, as_indices
from lightning_grad.core.steps.frozen_moments import FrozenMoments
from lightning_grad.core.steps.held_rates import HeldRates
from lightning_grad.core.steps.replacement import replace_optimizer
from lightning_grad.core.steps.step_window import StepClosure, is_repeated
from lightning_grad.core.subset import SubsetCallback
from lightning_grad.core.undo import UndoList
from lightning_grad.core.views.adapted_layer import Adapter
from lightning_grad.core.views.weight_chain import Stage, ViewedWeight
from lightning_grad.core.views.weight_choice import FoundWeight, WeightChoice
from lightning_grad.core.views.weight_view import attach_view
from lightning_grad.core.weights import WeightCallback
from lightning_grad.utilities.batches import find_input, input_at, with_input
from lightning_grad.utilities.checks import check_above, check_at_least, check_between, check_count
from lightning_grad.utilities.reporting import is_log_step

__all__ = [
    "ELEMENTWISE",
    "WHOLE_WEIGHTS",
    "Adapter",
    "AdapterCallback",
    "AveragedCopies",
    "AveragingCallback",
    "Chosen",
    "ChosenRates",
    "Compatibility",
    "FoundWeight",
    "FrozenMoments",
    "GradCallback",
    "GradientConditioner",
    "GradientStep",
    "HeldRates",
    "Interval",
    "Look",
    "LossRequest",
    "Mode",
    "MonitoredCallback",
    "OptimizerCallback",
    "Picture",
    "ProbeCallback",
    "ProbeLook",
    "Reading",
    "Role",
    "RunRecord",
    "Stage",
    "StepClosure",
    "SubsetCallback",
    "Table",
    "TrainingSet",
    "UndoList",
    "ViewedWeight",
    "WeightCallback",
    "WeightChoice",
    "WrapOrder",
    "add_to_losses",
    "as_indices",
    "attach_view",
    "check_above",
    "check_at_least",
    "check_between",
    "check_count",
    "during_fit",
    "find_input",
    "input_at",
    "is_log_step",
    "is_quiet",
    "is_repeated",
    "look_at_all",
    "manual",
    "mean_over_ranks",
    "no",
    "quiet",
    "read_losses",
    "replace_optimizer",
    "reweight_losses",
    "run_progress",
    "stand_in",
    "sum_over_ranks",
    "total_steps",
    "until_next_fit",
    "with_input",
    "wrap_method",
    "yes",
]
