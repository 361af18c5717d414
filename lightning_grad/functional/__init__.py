"""The mathematics of every technique as functions: tensors in, tensors out.

Each family has a package; ``gradients`` captures losses and computes per-sample gradients. Everything that your own
training loop would call can be imported from here. This package imports only torch, reads no files and keeps no global
state.
"""

from lightning_grad.functional import (
    adversarial,
    batch_size,
    clipping,
    communication,
    data_pruning,
    diagnostics,
    fine_tuning,
    optimizers,
    quantization,
    schedules,
    sharpness,
    sparsity,
)
from lightning_grad.functional.adversarial import *
from lightning_grad.functional.batch_size import *
from lightning_grad.functional.clipping import *
from lightning_grad.functional.communication import *
from lightning_grad.functional.data_pruning import *
from lightning_grad.functional.diagnostics import *
from lightning_grad.functional.fine_tuning import *
from lightning_grad.functional.gradients.added_terms import AddedTerms, SoftmaxCall
from lightning_grad.functional.gradients.errors import InseparableLossError
from lightning_grad.functional.gradients.gradient_rows import (
    PerSampleGradients,
    RademacherProjection,
    project_gradients,
)
from lightning_grad.functional.gradients.loss_capture import LossCapture
from lightning_grad.functional.gradients.loss_functions import LossCall
from lightning_grad.functional.gradients.per_sample_gradients import PerSampleGradientNorms, per_sample_gradient_norms
from lightning_grad.functional.gradients.terms import Terms
from lightning_grad.functional.gradients.trace import LossTrace
from lightning_grad.functional.optimizers import *
from lightning_grad.functional.quantization import *
from lightning_grad.functional.schedules import *
from lightning_grad.functional.sharpness import *
from lightning_grad.functional.sparsity import *

__all__ = [
    "AddedTerms",
    "InseparableLossError",
    "LossCall",
    "LossCapture",
    "LossTrace",
    "PerSampleGradientNorms",
    "PerSampleGradients",
    "RademacherProjection",
    "SoftmaxCall",
    "Terms",
    "per_sample_gradient_norms",
    "project_gradients",
]
__all__ += adversarial.__all__
__all__ += batch_size.__all__
__all__ += clipping.__all__
__all__ += communication.__all__
__all__ += data_pruning.__all__
__all__ += diagnostics.__all__
__all__ += fine_tuning.__all__
__all__ += optimizers.__all__
__all__ += quantization.__all__
__all__ += schedules.__all__
__all__ += sharpness.__all__
__all__ += sparsity.__all__
