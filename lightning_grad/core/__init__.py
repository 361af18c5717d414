"""What the author of a technique builds on; it knows no technique.

Every technique derives from one of the bases. ``callback.py`` is the file to read first: it holds what all of them share;
attributes that live for one fit are in ``fit.py``.

- :class:`GradientConditioner`: a rule on the gradients of one optimizer step.
- :class:`WeightCallback`: shows the module other weights than those that train.
- :class:`OptimizerCallback`: works on optimizers, their steps, rates, moments and closures.
- :class:`SubsetCallback`: chooses the samples of an epoch.
- :class:`MonitoredCallback`: acts on the values of a metric.
- :class:`ProbeCallback`: looks at the module every so often, and only logs.

With the bases come the tools that reach into other people's objects and let go of them again: methods wrapped
(``dispatch.py``, ``undo.py``), a step looked at without a trace (``quiet.py``, ``scoring.py``, ``look.py``), its losses read
or weighted (``loss_tap.py``), weights seen through a view (``weight_view.py``, ``portable.py``), the training set and
its length (``training_set.py``, ``epoch_length.py``), learning rates (``held_rates.py`` for a step, ``chosen_rates.py`` for
the rest of the run), frozen moments, a step evaluated twice (``step_window.py``), and progress. :class:`Chosen`
(``chosen.py``) is what a technique says that it acts on, :class:`RunRecord` (``record.py``) the rows that it leaves.
"""

from lightning_grad.core.callback import GradCallback
from lightning_grad.core.chosen import Chosen
from lightning_grad.core.chosen_rates import ChosenRates, as_indices
from lightning_grad.core.conditioner import GradientConditioner, GradientStep, Phase
from lightning_grad.core.dispatch import WrapOrder, wrap_method
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.found_weight import FoundWeight
from lightning_grad.core.frozen_moments import FrozenMoments
from lightning_grad.core.held_rates import HeldRates
from lightning_grad.core.look import Look
from lightning_grad.core.loss_tap import read_losses, reweight_losses
from lightning_grad.core.monitored import Interval, Mode, MonitoredCallback
from lightning_grad.core.optimizers import OptimizerCallback
from lightning_grad.core.portable import wrap_loading, wrap_saving
from lightning_grad.core.probe import ProbeCallback
from lightning_grad.core.probe_reading import Picture, Reading
from lightning_grad.core.probe_samples import ProbeLook
from lightning_grad.core.progress import run_progress, total_steps
from lightning_grad.core.quiet import is_quiet, quiet
from lightning_grad.core.record import RunRecord
from lightning_grad.core.scoring import look_at_all
from lightning_grad.core.step_window import StepClosure, is_repeated
from lightning_grad.core.subset import SubsetCallback
from lightning_grad.core.training_set import TrainingSet
from lightning_grad.core.undo import UndoList
from lightning_grad.core.viewed_weight import ViewedWeight
from lightning_grad.core.weight_chain import Stage
from lightning_grad.core.weight_choice import WeightChoice
from lightning_grad.core.weight_view import WeightView, attach_view
from lightning_grad.core.weights import WeightCallback
from lightning_grad.utilities.batches import find_input, input_at, with_input
from lightning_grad.utilities.checks import check_above, check_at_least, check_between, check_count
from lightning_grad.utilities.reporting import is_log_step

__all__ = [
    "Chosen",
    "ChosenRates",
    "FoundWeight",
    "FrozenMoments",
    "GradCallback",
    "GradientConditioner",
    "GradientStep",
    "HeldRates",
    "Interval",
    "Look",
    "Mode",
    "MonitoredCallback",
    "OptimizerCallback",
    "Phase",
    "Picture",
    "ProbeCallback",
    "ProbeLook",
    "Reading",
    "RunRecord",
    "Stage",
    "StepClosure",
    "SubsetCallback",
    "TrainingSet",
    "UndoList",
    "ViewedWeight",
    "WeightCallback",
    "WeightChoice",
    "WeightView",
    "WrapOrder",
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
    "quiet",
    "read_losses",
    "reweight_losses",
    "run_progress",
    "total_steps",
    "until_next_fit",
    "with_input",
    "wrap_loading",
    "wrap_method",
    "wrap_saving",
]
