"""One process at a time in a run directory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from io import FileIO
from pathlib import Path

from aqlm_cli.errors import ArtifactError
from aqlm_cli.runs.files import storage_errors

LOCK, LOGS = "lock", "logs"
"""Names that may lie in a directory before it is a run."""

PATIENCE = 10  # attempts


@dataclass(frozen=True)
class Holder:
    """The process that runs in a run directory; its number where it is known."""

    process: int | None
    words: str


@contextlib.contextmanager
def exclusive(run_directory: Path) -> Iterator[None]:
    """Keep every other process out of the same directory, which is created if it is missing.

    The system holds the lock, not the file: it ends with its process, however that ends, and a file that is left means
    nothing. Raises ArtifactError that names the other process.
    """
    path = run_directory / LOCK
    with storage_errors(run_directory):
        run_directory.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what a full disk refuses must not come up again when the file is closed.
        file = open(path, "a+b", buffering=0)  # noqa: SIM115  # open as long as the lock is held
    with file:
        with storage_errors(path):
            held = _lock(file)
        file.seek(0)
        found = _read(file.read())
        if not held:
            raise ArtifactError(f"{run_directory} is in use by {found.words}; wait for it or stop it")
        if path.stat().st_size and found.process is None:
            raise ArtifactError(f"{path} is not an aqlm lock file; delete it or choose another directory")
        started = datetime.now().isoformat(" ", "seconds")
        try:
            with storage_errors(path):
                file.truncate(0)
                file.write(json.dumps({"process": os.getpid(), "command": sys.argv, "started": started}).encode())
            yield
        finally:
            with contextlib.suppress(OSError):  # the first error counts, and a file that is left means nothing
                file.truncate(0)


def holder(run_directory: Path) -> Holder | None:
    """The process that runs in a run directory; None if there is none, as far as this user may see."""
    try:
        with open(run_directory / LOCK, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _read(file.read())
    except OSError:
        pass
    return None


def _lock(file: FileIO) -> bool:
    """True if the lock was taken; `holder` of another process takes it for an instant, so this tries more than once."""
    for _ in range(PATIENCE):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
    return False


def _read(text: bytes) -> Holder:
    try:
        said = json.loads(text)
        words = f"process {said['process']} (`{' '.join(said['command'])}`, since {said['started']})"
        return Holder(int(said["process"]), words)
    except (ValueError, LookupError, TypeError):  # it has only just started, or is about to end
        return Holder(None, "another process")
