"""The operators of torch that make the host wait for the device."""

SYNCING = {
    "_local_scalar_dense": "item(), float(), int() or bool() of a tensor",
    "nonzero": "nonzero()",  # also a mask as an index
    "masked_select": "masked_select()",
}
"""The calls that lead to an operator, by its name in ``torch.ops.aten``."""
