"""One pool of threads for torch's products and Numba's loops.

Both use GNU OpenMP, but torch brings a copy of its own. With two copies there are two pools, and the idle one spins for
some milliseconds after each of its loops on the very cores the other one needs: two threads were seen to take 50 times
as long as one. If the system's library is in the process before torch is, torch and Numba both take that one.

Sharing has a price to be avoided: Numba, when it starts, allows parallel loops inside parallel loops, and torch's
attention would then start new threads from each of its threads, which made it four times slower.
"""

from __future__ import annotations

import contextlib
import ctypes

LIBRARY = "libgomp.so.1"


def share_pool() -> None:
    """To be called before torch is imported. Where there is no GNU OpenMP there is nothing to share."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(LIBRARY)


def forbid_nested_loops() -> None:
    """To be called in the thread that computes, after Numba has started its threads."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(LIBRARY).omp_set_max_active_levels(1)
