"""How fast this machine reads memory: the bound that decoding is held against."""

from __future__ import annotations

import time

import numba
import numpy as np
from numpy.typing import NDArray

from aqlm_kernels.cpu.compile import compiled, prange

Words = NDArray[np.int64]

SIZE = 2**28  # bytes: more than any last-level cache holds


def read_bandwidth(repeats: int = 8) -> float:
    """Bytes per second, the best of `repeats`, with the present number of Numba's threads."""
    words = np.ones(SIZE // 8, np.int64)
    sums = np.zeros(numba.get_num_threads(), np.int64)
    _sum(words, sums)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        _sum(words, sums)
        seconds.append(time.perf_counter() - started)
    assert sums.sum() == len(words)
    return SIZE / min(seconds)


@compiled(parallel=True)
def _sum(words: Words, sums: Words) -> None:
    """Each thread adds up a part of its own."""
    parts = sums.shape[0]
    for part in prange(parts):
        own = words[part * words.shape[0] // parts : (part + 1) * words.shape[0] // parts]
        total = 0
        for word in own:
            total += word
        sums[part] = total
