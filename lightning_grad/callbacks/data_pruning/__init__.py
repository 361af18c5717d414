"""Choosing, repeating and weighing training samples.

One callback a file; ``_subset.py`` is the base of those that choose. What the scores look at is in ``_measures.py``, what a
scoring shows in ``_report.py``. Passes over the training set that leave no trace (``_scoring.py``, ``_quiet.py``) and losses
read out of a step (``_loss_tap.py``) lie one folder up, for all techniques.
"""

from lightning_grad.callbacks.data_pruning.data_pruning import DataPruning
from lightning_grad.callbacks.data_pruning.info_batch import InfoBatch
from lightning_grad.callbacks.data_pruning.loss_reweighting import LossReweighting
from lightning_grad.callbacks.data_pruning.repeated_random_subset import RepeatedRandomSubset
from lightning_grad.callbacks.data_pruning.uniform_learning import UniformLearning

__all__ = ["DataPruning", "InfoBatch", "LossReweighting", "RepeatedRandomSubset", "UniformLearning"]
