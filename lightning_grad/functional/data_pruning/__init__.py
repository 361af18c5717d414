"""Scores of samples, selection of samples by score, and weights of their losses."""

from lightning_grad.functional.data_pruning.clustering import prototype_distance
from lightning_grad.functional.data_pruning.curriculum_weighting import curriculum_weights, easiness
from lightning_grad.functional.data_pruning.dataset_quantization import dataset_quantization
from lightning_grad.functional.data_pruning.domain_reweighting import gradient_alignments, update_domain_weights
from lightning_grad.functional.data_pruning.gradient_norm_sampling import (
    draw_samples,
    output_gradient_norms,
    sampling_probabilities,
    sampling_weights,
)
from lightning_grad.functional.data_pruning.histories import (
    aum,
    aum_state,
    forgetting,
    forgetting_state,
    normalize_by_class,
    update_aum_,
    update_forgetting_,
    update_vog_,
    vog,
    vog_state,
)
from lightning_grad.functional.data_pruning.info_batch import infobatch_subset
from lightning_grad.functional.data_pruning.less import AdamMoments, GradientCosines
from lightning_grad.functional.data_pruning.loss_reweighting import annealed_temperature, loss_weights
from lightning_grad.functional.data_pruning.repeated_random_subset import repeated_random_subset
from lightning_grad.functional.data_pruning.scores import el2n, last_layer_gradient_norm, margin, predictions
from lightning_grad.functional.data_pruning.selection import count_kept, select_samples
from lightning_grad.functional.data_pruning.uniform_learning import uniform_learning_repeats

__all__ = [
    "AdamMoments",
    "GradientCosines",
    "annealed_temperature",
    "aum",
    "aum_state",
    "count_kept",
    "curriculum_weights",
    "dataset_quantization",
    "draw_samples",
    "easiness",
    "el2n",
    "forgetting",
    "forgetting_state",
    "gradient_alignments",
    "infobatch_subset",
    "last_layer_gradient_norm",
    "loss_weights",
    "margin",
    "normalize_by_class",
    "output_gradient_norms",
    "predictions",
    "prototype_distance",
    "repeated_random_subset",
    "sampling_probabilities",
    "sampling_weights",
    "select_samples",
    "uniform_learning_repeats",
    "update_aum_",
    "update_domain_weights",
    "update_forgetting_",
    "update_vog_",
    "vog",
    "vog_state",
]
