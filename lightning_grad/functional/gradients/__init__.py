"""The loss and the gradient of single samples, from training steps that return one number for a batch.

``trace.py`` watches a step, ``rows.py`` and ``follow.py`` follow which row belongs to which sample, and ``calls.py`` reads
the losses of ``torch.nn.functional``; what they find stands in ``record.py``. ``walk.py`` goes through the autograd graph of
the loss and proves that it is a sum over samples, with the kinds of nodes in ``nodes.py``. ``values.py`` computes the terms,
and ``terms.py`` has what users see of them. ``proofs.py`` tests what no graph can show. ``loss_capture.py`` is the cheaper
way for one call of a loss, and ``whole_loss.py`` tells whether that call is the whole loss. All that is private to torch is
in ``autograd.py``.
"""

from lightning_grad.functional.gradients.calls import read_call
from lightning_grad.functional.gradients.errors import InseparableLossError
from lightning_grad.functional.gradients.follow import edge_of
from lightning_grad.functional.gradients.loss_capture import LossCall, LossCapture
from lightning_grad.functional.gradients.loss_functions import LossFunction, SampleSums
from lightning_grad.functional.gradients.proofs import (
    Proof,
    is_noisy,
    prove_terms,
    sample_loss,
    solo_losses,
    trace_step,
    unordered_terms,
)
from lightning_grad.functional.gradients.record import Record
from lightning_grad.functional.gradients.terms import Term, Terms, WeightHandle, weight_cuts_
from lightning_grad.functional.gradients.trace import LossTrace
from lightning_grad.functional.gradients.walk import Walk
from lightning_grad.functional.gradients.whole_loss import WholeLossCapture

__all__ = [
    "InseparableLossError",
    "LossCall",
    "LossCapture",
    "LossFunction",
    "LossTrace",
    "Proof",
    "Record",
    "SampleSums",
    "Term",
    "Terms",
    "Walk",
    "WeightHandle",
    "WholeLossCapture",
    "edge_of",
    "is_noisy",
    "prove_terms",
    "read_call",
    "sample_loss",
    "solo_losses",
    "trace_step",
    "unordered_terms",
    "weight_cuts_",
]
