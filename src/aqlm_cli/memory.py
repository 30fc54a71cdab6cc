"""How much memory this process has resident, the most it has had, and what the machine has left.

Linux counts the peak for each process image in /proc and lets it be reset. getrusage, which other systems leave as the
only source, knows one peak for the whole life of the process, and begins it with that of the one which started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def reset_peak_memory() -> None:
    """Let the peak begin anew where the system can, so that a stage is not told the peak of the one before it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """The most memory this process has had resident since the last reset."""
    if _STATUS.exists():
        return _kilobytes(_STATUS, "VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_memory() -> None:
    """Return to the system what was freed: glibc keeps some for every thread that ever asked for any."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)


def available_memory_bytes() -> int:
    """What this process could still take without anything being swapped out."""
    info = Path("/proc/meminfo")
    if info.exists():
        return _kilobytes(info, "MemAvailable")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _kilobytes(path: Path, name: str) -> int:
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
