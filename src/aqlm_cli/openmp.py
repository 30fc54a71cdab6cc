"""One thread pool for torch's matmuls and Numba's loops.

Both use GNU OpenMP, but torch brings a copy of its own. With two copies there are two pools, and the idle one spins for
some milliseconds after each of its loops on the very cores the other one needs: two threads were seen to take 50 times
as long as one. If the system's library is in the process before torch is, torch and Numba both take that one.

Sharing has one cost, which `forbid_nested_loops` avoids: Numba, when it starts, allows parallel loops inside parallel
loops, and torch's attention would then start new threads from each of its threads, which made it four times slower.

Even one pool spins where other processes need the cores. The default is right for a machine that is free; beside a
process that keeps two cores of two busy, the compiled decoder made 3 tokens/s with it and 20 with a short spin.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

LIBRARY = "libgomp.so.1"
LOAD = Path("/proc/loadavg")
SHORT = "1000"
"""Turns that a thread spins for before it sleeps, some microseconds. GNU's default is 300,000."""


def share_pool() -> None:
    """Load the system's GNU OpenMP, if it has one. Call this before torch is imported."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys() and others_running():
        os.environ["GOMP_SPINCOUNT"] = SHORT
    with contextlib.suppress(OSError):
        ctypes.CDLL(LIBRARY)


def others_running() -> bool:
    """True if a thread beside this one runs or waits for a core at this instant; False where Linux does not tell."""
    try:
        running = LOAD.read_text().split()[3].partition("/")[0]
        return int(running) > 1
    except (OSError, ValueError, IndexError):
        return False


def forbid_nested_loops() -> None:
    """Turn nested parallelism off. Call this in the thread that computes, after Numba has started its threads."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(LIBRARY).omp_set_max_active_levels(1)
