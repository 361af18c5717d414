"""What papers claim, tried on the shared tasks of ``studies/tasks.py``: one file a family, each with its arms and its claims.

Margins: a claim to be better holds above 0; a claim to be no worse holds above minus one point.
"""

from studies.claims.known import (
    adversarial,
    clipping,
    communication,
    data,
    domains,
    fine_tuning,
    influence,
    label_errors,
    optimizers,
    quantization,
    sensitivity,
    sharpness,
    sparsity,
)

FAMILIES = (
    sparsity,
    data,
    domains,
    influence,
    label_errors,
    sharpness,
    optimizers,
    quantization,
    clipping,
    adversarial,
    communication,
    fine_tuning,
    sensitivity,
)
