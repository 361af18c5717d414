"""Random permutations and seeds that do not coincide with the ones in user code."""

import hashlib

import torch
from torch import Tensor


def shuffled(total: int, seed: int, purpose: int | str) -> Tensor:
    """Return a random permutation of ``range(total)`` on the CPU, determined by seed and purpose.

    The seed is hashed, which makes neighboring seeds independent and the permutation different from
    ``torch.randperm`` with the same seed. Otherwise a user who flips random labels with seed 0 and keeps random
    samples with seed 0 would keep exactly the flipped ones.
    """
    return torch.randperm(total, generator=torch.Generator().manual_seed(hashed_seed(seed, purpose)))


def hashed_seed(seed: int, purpose: int | str) -> int:
    """Return a generator seed that differs for each purpose."""
    mixed = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "little") >> 1
