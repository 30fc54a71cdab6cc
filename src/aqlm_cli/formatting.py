"""Formatting of numbers, tables and JSON, shared by all records."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path, PurePath
from typing import Any

from rich.table import Table
from rich.text import Text

PROMPT = "The capital of France is"
"""Default prompt of suggested commands."""


def command_line(name: str, *arguments: object) -> str:
    """The command as a user would type it, quoted for a shell."""
    return shlex.join(["aqlm", name, *map(str, arguments)])


def readable_bytes(count: int) -> str:
    """Decimal units, as disks and downloads are measured: 85123456 -> "85.1 MB"."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def both_bits(code_bits: float, stored_bits: float) -> str:
    return f"{code_bits:.3f} of codes, {stored_bits:.3f} stored (with codebooks and scales)"


def shrinkage(before: int, after: int) -> str:
    times = f" ({before / after:.2f}x smaller)" if after else ""
    return f"{readable_bytes(before)} -> {readable_bytes(after)}, embeddings and head included{times}"


def some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def text_name(source: str) -> str:
    """The name of a text source without its folder, which means something on this machine only."""
    return PurePath(source.strip()).name


def file_word(text: str) -> str:
    """The text as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", text)


def facts(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns without a heading. Values become `Text`, so that brackets in them are not read as rich's markup."""
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for name, fact in rows:
        table.add_row(Text(name), Text(fact))
    return table


def plain(value: Any) -> Any:
    """`value` in JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
