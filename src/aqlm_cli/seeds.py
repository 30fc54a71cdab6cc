"""Randomness by name: what is drawn for a layer depends on the run's seed and the layer's name, on nothing else.

So neither the order in which layers are worked on, nor their number, nor an interruption changes a result.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
