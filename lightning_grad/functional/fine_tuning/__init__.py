"""Fine-tuning: low-rank factors, and the choice of what trains."""

from lightning_grad.functional.fine_tuning.saliency import random_labels, saliency_masks

__all__ = ["random_labels", "saliency_masks"]
