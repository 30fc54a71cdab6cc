"""Random generators by name: draws for a layer depend on the run's seed and the layer's name alone.

So the order of layers, their number, or an interruption does not change a result.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
