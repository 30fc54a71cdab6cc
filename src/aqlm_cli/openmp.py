"""One pool of threads for torch's products and Numba's loops.

Both use GNU OpenMP, but torch brings a copy of its own. With two copies there are two pools, and the idle one spins for
some milliseconds after each of its loops on the very cores the other one needs: two threads were seen to take 50 times
as long as one. If the system's library is in the process before torch is, torch and Numba both take that one.
"""

from __future__ import annotations

import contextlib
import ctypes


def share_pool() -> None:
    """To be called before torch is imported. Where there is no GNU OpenMP there is nothing to share."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libgomp.so.1")
