"""What the author of a technique builds on; it knows no technique.

Every technique derives from one of the bases. ``callback.py`` is the file to read first: it holds what all of them share.
:class:`GradientConditioner` is for a rule on the gradients of one optimizer step, :class:`SubsetCallback` for one that chooses
the samples of an epoch.

Beside the bases are the tools that reach into other people's objects and let go of them again: methods wrapped
(``dispatch.py``, ``undo.py``), a step looked at without a trace (``quiet.py``, ``scoring.py``, ``look.py``), its losses read
or weighted (``loss_tap.py``), weights seen through a view (``weight_view.py``, ``portable.py``), the training set and
its length (``training_set.py``, ``epoch_length.py``), learning rates and progress. :class:`Chosen` (``chosen.py``) is what a
technique says that it acts on.
"""

from lightning_grad.core.callback import GradCallback
from lightning_grad.core.chosen import Chosen
from lightning_grad.core.conditioner import GradientConditioner, GradientStep, Phase
from lightning_grad.core.dispatch import WrapOrder, wrap_method
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.look import Look
from lightning_grad.core.loss_tap import read_losses, reweight_losses
from lightning_grad.core.portable import wrap_loading, wrap_saving
from lightning_grad.core.progress import run_progress, total_steps
from lightning_grad.core.quiet import is_quiet, quiet
from lightning_grad.core.scoring import look_at_all
from lightning_grad.core.subset import SubsetCallback
from lightning_grad.core.training_set import TrainingSet
from lightning_grad.core.undo import UndoList
from lightning_grad.core.weight_view import WeightView, attach_view

__all__ = [
    "Chosen",
    "GradCallback",
    "GradientConditioner",
    "GradientStep",
    "Look",
    "Phase",
    "SubsetCallback",
    "TrainingSet",
    "UndoList",
    "WeightView",
    "WrapOrder",
    "attach_view",
    "during_fit",
    "is_quiet",
    "look_at_all",
    "quiet",
    "read_losses",
    "reweight_losses",
    "run_progress",
    "total_steps",
    "until_next_fit",
    "wrap_loading",
    "wrap_method",
    "wrap_saving",
]
