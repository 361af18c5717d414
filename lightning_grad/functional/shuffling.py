"""Random orders and seeds that nobody else draws by chance."""

import hashlib

import torch
from torch import Tensor


def shuffled(total: int, seed: int, purpose: int | str) -> Tensor:
    """Return a random order of so many things, on the CPU; the same for the same seed and purpose.

    Seeds are hashed, so that neighbouring ones have nothing in common, and so that the order is not the one that a user gets
    from ``torch.randperm`` with the same seed: whoever flips labels at random with seed 0, say, and keeps samples at random
    with seed 0, would otherwise keep just the flipped ones.
    """
    return torch.randperm(total, generator=torch.Generator().manual_seed(hashed_seed(seed, purpose)))


def hashed_seed(seed: int, purpose: int | str) -> int:
    """Return the seed of a generator, another one for each purpose."""
    mixed = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "little") >> 1
