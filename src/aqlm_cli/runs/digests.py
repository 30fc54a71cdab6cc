"""Digests of large files, remembered between commands."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from aqlm_cli.errors import StorageError
from aqlm_cli.runs.files import digest_file, publish_file, write_file

REMEMBERED = 1000
"""Files whose digests the cache keeps: models and their tokenizers have some ten each."""


def cached_digest(path: Path, cache: Path) -> str:
    """sha256 of a file, remembered by (path, size, time of change) in `cache`, for the last REMEMBERED files."""
    memory = cache / "digests.json"
    known = _remembered(memory)
    key, found = str(path.resolve()), path.stat()
    stamp = [found.st_size, found.st_mtime_ns]
    if key in known and known[key][:2] == stamp:
        return str(known[key][2])
    digest = digest_file(path)
    known.pop(key, None)
    latest = dict([*known.items(), (key, [*stamp, digest])][-REMEMBERED:])
    # What cannot be remembered costs time at the next call and nothing else.
    with suppress(StorageError, OSError):
        cache.mkdir(parents=True, exist_ok=True)
        # Under a name of its own at first, for another command may write at the same time.
        with tempfile.TemporaryDirectory(prefix="digests.", dir=cache) as own:
            beside = Path(own) / memory.name
            write_file(beside, json.dumps(latest).encode())
            publish_file(beside, memory)
    return digest


def _remembered(memory: Path) -> dict[str, list[Any]]:
    """The digests of earlier calls; none where the file cannot be read."""
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {key: entry for key, entry in entries if isinstance(entry, list) and len(entry) == 3}
