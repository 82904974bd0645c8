"""Every random draw has an address: (seed, purpose, round, client). Nothing draws from a global generator."""

import hashlib

import numpy as np
import torch


def derive(seed: int, purpose: str, *address: int) -> int:
    """A 63-bit integer that depends on all of `seed`, `purpose` and `address` (round, client), and on nothing else."""
    text = "/".join([str(seed), purpose, *map(str, address)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def torch_generator(seed: int, purpose: str, *address: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A new torch generator on `device` at this address."""
    return torch.Generator(device).manual_seed(derive(seed, purpose, *address))


def numpy_generator(seed: int, purpose: str, *address: int) -> np.random.Generator:
    """A new numpy generator at this address."""
    return np.random.default_rng(derive(seed, purpose, *address))
