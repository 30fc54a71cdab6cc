"""Amounts as people write them: 8GiB, 2h30m."""

from __future__ import annotations

import re

from aqlm_cli.errors import UsageError

_UNITS = {"": 1, "B": 1, **{f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)}}
_UNITS |= {f"{letter}IB": 1024**n for n, letter in enumerate("KMGT", 1)}


def parse_bytes(text: str) -> int:
    """8GiB, 8 GB, 8g or 500MB as a number of bytes; UsageError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]i?b?|b?)\s*", text, flags=re.IGNORECASE | re.ASCII)
    if found is None:
        raise UsageError(f"{text!r} is not understood as a size; write a number and a unit, such as 8GiB or 500MB")
    unit = found[2].upper()
    return int(float(found[1]) * _UNITS[unit if unit.endswith("B") or not unit else unit + "B"])


def parse_duration(text: str) -> float:
    """2h, 90m, 1h30m or 45s as seconds; UsageError for anything else, and for no time at all."""
    pattern = r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?"
    found = re.fullmatch(pattern, text.replace(" ", "").lower(), flags=re.ASCII)
    hours, minutes, seconds = (int(count or 0) for count in found.groups()) if found else (0, 0, 0)
    if not (hours or minutes or seconds):
        raise UsageError(f"{text!r} is not understood as a time; write it as 2h, 90m, 1h30m or 45s")
    return float(3600 * hours + 60 * minutes + seconds)
