"""Fine-tuning: train few parameters of a pretrained model, and forget samples. ``docs/fine_tuning.md`` helps to choose."""

from lightning_grad.callbacks.fine_tuning.lora import LoRA
from lightning_grad.callbacks.fine_tuning.low_rank_finetuning import LowRankFinetuning
from lightning_grad.callbacks.fine_tuning.saliency_unlearning import SaliencyUnlearning
from lightning_grad.callbacks.fine_tuning.sparse_update import SparseUpdate

__all__ = ["LoRA", "LowRankFinetuning", "SaliencyUnlearning", "SparseUpdate"]
