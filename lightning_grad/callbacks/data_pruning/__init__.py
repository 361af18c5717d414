"""Choosing, repeating and weighing training samples.

One callback a file. ``DataPruning`` has its settings, sources of scores and passes in files of their own; what the two
that weight losses share is in ``_weighting.py``. The base of those that choose (``core/subset.py``), passes over the training
set that leave no trace (``core/losses/scoring.py``, ``core/quiet.py``) and losses read out of a step
(``core/losses/loss_tap.py``) serve all families.
"""

from lightning_grad.callbacks.data_pruning.data_pruning import DataPruning
from lightning_grad.callbacks.data_pruning.info_batch import InfoBatch
from lightning_grad.callbacks.data_pruning.loss_reweighting import LossReweighting
from lightning_grad.callbacks.data_pruning.repeated_random_subset import RepeatedRandomSubset
from lightning_grad.callbacks.data_pruning.uniform_learning import UniformLearning

__all__ = ["DataPruning", "InfoBatch", "LossReweighting", "RepeatedRandomSubset", "UniformLearning"]
