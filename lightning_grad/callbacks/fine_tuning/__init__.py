"""Fine-tuning: train few parameters of a pretrained model, and forget samples. ``docs/fine_tuning.md`` helps to choose."""

from lightning_grad.callbacks.fine_tuning.lora import LoRA
from lightning_grad.callbacks.fine_tuning.saliency_unlearning import SaliencyUnlearning

__all__ = [
    "LoRA",
    "SaliencyUnlearning",
]
