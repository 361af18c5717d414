"""Fine-tuning: low-rank factors, and the choice of what trains."""

from lightning_grad.functional.fine_tuning.lora import lora_ga_factors, lora_norm, lora_rank, lora_scale, merge_lora
from lightning_grad.functional.fine_tuning.saliency import random_labels, saliency_masks

__all__ = [
    "lora_ga_factors",
    "lora_norm",
    "lora_rank",
    "lora_scale",
    "merge_lora",
    "random_labels",
    "saliency_masks",
]
