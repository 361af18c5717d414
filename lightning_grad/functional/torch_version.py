"""The version of torch, for code that differs between supported versions."""

import torch

# Major and minor suffice: no patch release has changed any behavior that is checked with this.
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
