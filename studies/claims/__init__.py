"""The claims of all families. A new claim is one more entry of ``CLAIMS`` in the file of its family, or in a new file."""

from typing import Any

from studies.claim import Claim
from studies.claims import (
    adversarial,
    clipping,
    clipping_spikes,
    communication,
    data_pruning,
    label_errors,
    local_steps,
    optimizers,
    quantization,
    sharpness,
    sparsity,
    tract,
)
from studies.claims.known import FAMILIES as KNOWN

FAMILIES = (
    sparsity,
    clipping,
    clipping_spikes,
    data_pruning,
    label_errors,
    adversarial,
    communication,
    local_steps,
    optimizers,
    quantization,
    sharpness,
    tract,
    *KNOWN,
)
CLAIMS: dict[str, Claim[Any]] = {claim.name: claim for family in FAMILIES for claim in family.CLAIMS}
