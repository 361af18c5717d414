"""The checks, one module for each guarantee."""

from lightning_grad.testing.checks import (  # noqa: F401 each adds its checks to the list, in this order
    g1_no_code_change,
    g2_neutral,
    g3_no_trace,
    g4_checkpoints,
    g5_resume,
    g6_composition,
    g7_no_sync,
    g8_clear_words,
)
from lightning_grad.testing.checks.registry import CHECKS, Check

__all__ = ["CHECKS", "Check"]
