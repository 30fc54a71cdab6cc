"""Resident memory of this process, its peak, and the memory that is available.

Linux counts the peak for each process image in /proc and lets it be reset. getrusage, which other systems leave as the
only source, keeps one peak for the whole life of the process, and starts it from that of the parent process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def reset_peak_memory() -> None:
    """Reset the peak where the system allows it, so that a stage does not report the peak of the stage before it.

    What that stage no longer uses is given back first: networks and their hooks are in cycles, which wait for Python's
    collector, and freed memory stays with the process. The next stage would report it as its own.
    """
    gc.collect()
    give_back_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """The peak of resident memory since the last reset."""
    if _STATUS.exists():
        return _kilobytes(_STATUS, "VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_memory() -> None:
    """Return freed memory to the system: glibc keeps some for every thread that ever allocated any."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)


def available_memory_bytes() -> int:
    """Bytes that this process can still allocate before the system swaps."""
    info = Path("/proc/meminfo")
    if info.exists():
        return _kilobytes(info, "MemAvailable")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _kilobytes(path: Path, name: str) -> int:
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
