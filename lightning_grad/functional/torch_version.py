"""The version of torch, for what differs between the versions that are supported."""

import torch

# Two numbers suffice: releases of patches have never changed what is asked here.
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
