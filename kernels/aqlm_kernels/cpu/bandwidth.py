"""Read bandwidth of this machine's memory: the roofline of decoding."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from aqlm_kernels.cpu.compile import compiled, prange

Words = NDArray[np.int64]

SIZE, PIECE = 2**28, 2**16  # bytes: more than any last-level cache holds, and one row of it


def read_bandwidth(repeats: int = 8) -> float:
    """Bytes per second, the best of `repeats`, with Numba's current number of threads."""
    words = np.ones((SIZE // PIECE, PIECE // 8), np.int64)
    sums = np.zeros(len(words), np.int64)
    _sum(words, sums)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        _sum(words, sums)
        seconds.append(time.perf_counter() - started)
    assert sums.sum() == words.size
    return SIZE / min(seconds)


@compiled(parallel=True)
def _sum(words: Words, sums: Words) -> None:
    """Sum every row; a thread takes consecutive rows. The rows matter: a loop over single words is a third slower."""
    for row in prange(words.shape[0]):
        total = 0
        for i in range(words.shape[1]):
            total += words[row, i]
        sums[row] = total
