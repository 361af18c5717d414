"""Fine-tuning: low-rank factors, and the choice of what trains."""

from lightning_grad.functional.fine_tuning.lora import lora_ga_factors, lora_norm, lora_rank, lora_scale, merge_lora

__all__ = ["lora_ga_factors", "lora_norm", "lora_rank", "lora_scale", "merge_lora"]
