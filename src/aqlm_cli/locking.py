"""One process at a time in a run directory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from aqlm_cli.errors import ArtifactError
from aqlm_cli.storage import storage_errors

LOCK, LOGS = "lock", "logs"
"""What may lie in a directory before it is a run."""


@contextlib.contextmanager
def exclusive(run_directory: Path) -> Iterator[None]:
    """No other process is in this block with the same directory, which is made if it is not there.

    The system holds the lock, not the file: it goes with its process, however that ends, and a file that is left means
    nothing. Raises ArtifactError that names the process which is there.
    """
    path = run_directory / LOCK
    with storage_errors(run_directory):
        run_directory.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115  # open as long as the lock is held
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ArtifactError(
                f"{run_directory} is in use by {_holder(file.read())}; wait for it, or stop it"
            ) from None
        file.truncate(0)
        started = datetime.now().isoformat(" ", "seconds")
        print(json.dumps({"process": os.getpid(), "command": sys.argv, "started": started}), file=file, flush=True)
        try:
            yield
        finally:
            file.truncate(0)


def holder(run_directory: Path) -> str | None:
    """The process that is at work in a run, in words; None if there is none."""
    path = run_directory / LOCK
    if not path.is_file():
        return None
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(file.read())
    return None


def _holder(text: str) -> str:
    try:
        said = json.loads(text)
        return f"process {said['process']} (`{' '.join(said['command'])}`, since {said['started']})"
    except (ValueError, LookupError, TypeError):  # it has only just come, or is about to go
        return "another process"
