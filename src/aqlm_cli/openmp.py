"""One thread pool for torch's matmuls and Numba's loops.

Both use GNU OpenMP, but torch brings a copy of its own. With two copies there are two pools, and the idle one spins for
some milliseconds after each of its loops on the very cores the other one needs: two threads were seen to take 50 times
as long as one. If the system's library is in the process before torch is, torch and Numba both take that one.

Sharing has one cost, which `forbid_nested_loops` avoids: Numba, when it starts, allows parallel loops inside parallel
loops, and torch's attention would then start new threads from each of its threads, which made it four times slower.
"""

from __future__ import annotations

import contextlib
import ctypes

LIBRARY = "libgomp.so.1"


def share_pool() -> None:
    """Load the system's GNU OpenMP, if it has one. Call this before torch is imported."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(LIBRARY)


def forbid_nested_loops() -> None:
    """Turn nested parallelism off. Call this in the thread that computes, after Numba has started its threads."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(LIBRARY).omp_set_max_active_levels(1)
