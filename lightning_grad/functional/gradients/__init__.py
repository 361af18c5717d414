"""The loss and the gradient of single samples, from training steps that return one number for a batch.

``trace.py`` watches a step, ``_rows.py`` follows which row belongs to which sample, and ``_calls.py`` reads the losses of
``torch.nn.functional``; what they find stands in ``_record.py``. ``_walk.py`` goes through the autograd graph of the loss
and proves that it is a sum over samples, with the kinds of nodes in ``_nodes.py``. ``_values.py`` computes the terms, and
``terms.py`` has what users see of them. ``proofs.py`` tests what no graph can show. All that is private to torch is in
``_autograd.py``.
"""

from lightning_grad.functional.gradients.errors import InseparableLossError
from lightning_grad.functional.gradients.proofs import (
    Proof,
    is_noisy,
    prove_terms,
    sample_loss,
    solo_losses,
    trace_step,
    unordered_terms,
)
from lightning_grad.functional.gradients.terms import Term, Terms, WeightHandle
from lightning_grad.functional.gradients.trace import LossTrace

__all__ = [
    "InseparableLossError",
    "LossTrace",
    "Proof",
    "Term",
    "Terms",
    "WeightHandle",
    "is_noisy",
    "prove_terms",
    "sample_loss",
    "solo_losses",
    "trace_step",
    "unordered_terms",
]
