"""Fine-tuning: low-rank factors, and the choice of what trains."""

from lightning_grad.functional.fine_tuning.layer_choice import LayerMemory, choose_layers, needed_bytes
from lightning_grad.functional.fine_tuning.lora import lora_ga_factors, lora_norm, lora_rank, lora_scale, merge_lora
from lightning_grad.functional.fine_tuning.low_rank import global_ranks, low_rank_factors, uniform_ranks
from lightning_grad.functional.fine_tuning.saliency import random_labels, saliency_masks
from lightning_grad.functional.fine_tuning.saved_activations import SavedActivations

__all__ = [
    "LayerMemory",
    "SavedActivations",
    "choose_layers",
    "global_ranks",
    "lora_ga_factors",
    "lora_norm",
    "lora_rank",
    "lora_scale",
    "low_rank_factors",
    "merge_lora",
    "needed_bytes",
    "random_labels",
    "saliency_masks",
    "uniform_ranks",
]
