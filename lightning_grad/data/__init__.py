"""Score files, their comparison, and samplers for pruned data, usable with and without a Trainer."""

from lightning_grad.data.comparison import compare_scores
from lightning_grad.data.fingerprints import fingerprint
from lightning_grad.data.prunable_sampler import PrunableBatchSampler
from lightning_grad.data.score_files import SampleScores, average_scores, load_scores, save_scores

__all__ = [
    "PrunableBatchSampler",
    "SampleScores",
    "average_scores",
    "compare_scores",
    "fingerprint",
    "load_scores",
    "save_scores",
]
