"""Layer-wise learning rate decay: factors of the learning rates of layers."""

from collections.abc import Sequence


def layer_factors(called: Sequence[str], registered: Sequence[str], decay: float = 0.75) -> dict[str, float]:
    r"""Return the factor of each layer's learning rate, smaller for earlier layers.

    .. math::
        f_l = \xi^{L - l}, \qquad l = 1, \dots, L

    Args:
        called: The L layers in the order of their calls; the last one has factor 1.
        registered: All layers in the order of registration. One that is not called gets the factor of the layer that is
            registered before it.
        decay: :math:`\xi`, in (0, 1].

    Example:
        >>> layer_factors(["embed", "block", "head"], ["head", "embed", "spare", "block"], decay=0.5)
        {'embed': 0.25, 'block': 0.5, 'head': 1.0, 'spare': 0.25}

    References:
        Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018, arXiv 1801.06146,
        section 3.2.
    """
    factors = {layer: decay**depth for depth, layer in enumerate(reversed(called))}
    factors = {layer: factors[layer] for layer in called}
    before = factors[called[0]] if called else 1.0
    for layer in registered:
        before = factors.setdefault(layer, before)
    return factors
