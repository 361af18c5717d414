"""Callbacks that watch a run and change nothing."""

from lightning_grad.callbacks.diagnostics.gradient_monitor import GradientMonitor

__all__ = ["GradientMonitor"]
