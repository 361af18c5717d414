"""What watches a run and changes nothing."""

from lightning_grad.callbacks.diagnostics.gradient_monitor import GradientMonitor

__all__ = ["GradientMonitor"]
