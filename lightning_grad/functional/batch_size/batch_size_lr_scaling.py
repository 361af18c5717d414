"""Learning rates for another batch size.

The callback is :class:`lightning_grad.callbacks.BatchSizeLRScaling`.
"""

import math
import re
from typing import Literal

ScalingRule = Literal["linear", "sqrt"]

# By the lower-case name of the class, because libraries share names, and derived classes count too.
_LINEAR = ("sgd", "asgd", "sgdp", "sgdw", "accsgd", "qhm")
_SQRT = (
    *("adam", "adamw", "nadam", "nadamw", "radam", "adamax", "adabelief", "adamp", "diffgrad", "adan", "lamb"),
    *("rmsprop", "adafactor", "came", "spam", "soap", "lion", "muon", "galoreadamw", "frugal", "dctadamw"),
)
_RULES: dict[str, ScalingRule] = {**dict.fromkeys(_LINEAR, "linear"), **dict.fromkeys(_SQRT, "sqrt")}
_VARIANT = re.compile("^(paged|fused|schedulefree)|(8bit|4bit|32bit|fp8|schedulefree)$")


def lr_scaling_factor(batch_size: int, base_batch_size: int, rule: ScalingRule) -> float:
    r"""Return the factor of a learning rate that was chosen for another batch size.

    .. math::
        \eta = \eta_0 \frac{B}{B_0} \quad \text{(linear)}, \qquad \eta = \eta_0 \sqrt{\frac{B}{B_0}} \quad \text{(sqrt)}

    Args:
        batch_size: B, the samples of one optimizer step.
        base_batch_size: The batch size for which the learning rate was chosen.
        rule: ``"linear"`` or ``"sqrt"``.

    Raises:
        ValueError: If a batch size is below 1.

    Example:
        >>> lr_scaling_factor(1024, 256, "linear"), lr_scaling_factor(1024, 256, "sqrt")
        (4.0, 2.0)

    References:
        Granziol, Zohren and Roberts, "Learning Rates as a Function of Batch Size", 2020, arXiv 2006.09092.
    """
    if batch_size < 1 or base_batch_size < 1:
        raise ValueError(f"Batch sizes must be at least 1; got {batch_size} and {base_batch_size}.")
    ratio = batch_size / base_batch_size
    return ratio if rule == "linear" else math.sqrt(ratio)


def lr_scaling_rule(kind: type) -> ScalingRule | None:
    """Return the rule for an optimizer class: by how the length of its update depends on the gradient.

    SGD moves by the gradient, so its rate grows with the batch size. Adam and its relatives, Lion and Muon move by a
    length that does not depend on the size of the gradient, so theirs grows with the root. A class that is derived
    from a known one follows the same rule. ``None`` if the class is not known.

    Example:
        >>> import torch
        >>> lr_scaling_rule(torch.optim.SGD), lr_scaling_rule(torch.optim.AdamW), lr_scaling_rule(torch.optim.LBFGS)
        ('linear', 'sqrt', None)
        >>> lr_scaling_rule(type("PagedAdamW8bit", (), {})), lr_scaling_rule(type("Own", (torch.optim.SGD,), {}))
        ('sqrt', 'linear')

    References:
        arXiv 2006.09092 (linear for SGD, the root for Adam). Malladi et al., "On the SDEs and Scaling Rules for
        Adaptive Gradient Algorithms", 2022, arXiv 2205.10287 (the root for Adam and RMSprop). The other classes are a
        choice of this library, by the argument above.
    """
    for name in (cls.__name__.lower() for cls in kind.__mro__):
        rule = _RULES.get(name, _RULES.get(_VARIANT.sub("", name)))
        if rule is not None:
            return rule
    return None
