"""Named random streams: every use of randomness has a seed and a name, and no two share one.

Two seeds exist. ``seed`` is the run seed (initialisation, order, dropout); ``task.seed`` fixes the
data sample, the corruption and the queries. Deriving each stream from (seed, name) means that a
new consumer of randomness never shifts the numbers of an old one.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def derive(seed: int, name: str) -> int:
    """A 63-bit seed for the stream ``name`` of ``seed`` (SHA-256, so streams are unrelated)."""
    if seed < 0:
        raise ValueError(f"a seed must be a non-negative integer, got {seed}")
    digest = hashlib.sha256(f"{name}\0{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the stream ``name`` of ``seed``."""
    return torch.Generator().manual_seed(derive(seed, name))


def random_signs(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Independent ±1, ``(rows, columns)`` float32, one random bit each."""
    count = rows * columns
    octets = torch.empty((count + 7) // 8, dtype=torch.uint8).random_(0, 256, generator=generator)
    bits = torch.from_numpy(np.unpackbits(octets.numpy(), count=count))
    return bits.view(rows, columns).float().mul_(2.0).sub_(1.0)
