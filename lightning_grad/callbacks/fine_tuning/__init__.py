"""Fine-tuning: train few parameters of a pretrained model, and forget samples. ``docs/fine_tuning.md`` helps to choose."""

__all__: list[str] = []
