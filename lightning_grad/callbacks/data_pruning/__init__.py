"""Callbacks that select, repeat or weight training samples.

One callback per file. ``DataPruning`` keeps its settings, sources of scores and passes in separate files; the
callbacks that weight losses share ``_weighting.py``. All families can use the base of the callbacks that
select samples (``core/subset.py``), scoring passes without side effects
(``core/losses/scoring.py``, ``core/quiet.py``) and the reading of losses from a step
(``core/losses/loss_tap.py``).
"""

from lightning_grad.callbacks.data_pruning.curriculum_weighting import CurriculumWeighting
from lightning_grad.callbacks.data_pruning.data_pruning import DataPruning
from lightning_grad.callbacks.data_pruning.domain_reweighting import DomainReweighting
from lightning_grad.callbacks.data_pruning.gradient_norm_sampling import GradientNormSampling
from lightning_grad.callbacks.data_pruning.info_batch import InfoBatch
from lightning_grad.callbacks.data_pruning.loss_reweighting import LossReweighting
from lightning_grad.callbacks.data_pruning.repeated_random_subset import RepeatedRandomSubset
from lightning_grad.callbacks.data_pruning.uniform_learning import UniformLearning

__all__ = [
    "CurriculumWeighting",
    "DataPruning",
    "DomainReweighting",
    "GradientNormSampling",
    "InfoBatch",
    "LossReweighting",
    "RepeatedRandomSubset",
    "UniformLearning",
]
