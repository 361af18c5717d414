"""The operators of torch that make the host wait for the device."""

SYNCING = ("_local_scalar_dense", "nonzero", "masked_select")
"""Names in ``torch.ops.aten``. ``item()``, ``bool()`` and ``float()`` end in the first; a mask as an index in the second."""
