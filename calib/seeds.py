"""Random numbers: a generator for each purpose, so that what one draws never shifts another's numbers."""

import hashlib

import torch


def derive_seed(*parts: str | int) -> int:
    """Return a seed of 63 bits that the parts decide together; far from the small seeds that users give."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_for(seed: int, *purpose: str) -> torch.Generator:
    """Return a generator that `seed` and `purpose` decide."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
