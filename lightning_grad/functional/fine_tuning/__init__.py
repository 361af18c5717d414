"""Fine-tuning: low-rank factors, and the choice of what trains."""

__all__: list[str] = []
