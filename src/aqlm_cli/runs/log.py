"""Event logs of a run: each event of a stage as one line of JSON in `logs/<stage>.jsonl`.

A log is only appended to: a run that was interrupted and resumed has all of it in one file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from aqlm_cli.errors import StorageError
from aqlm_cli.events import Emit, Event
from aqlm_cli.formatting import plain
from aqlm_cli.runs.files import storage_errors
from aqlm_cli.runs.lock import LOGS

BEGAN, ENDED = "Began", "Ended"


@contextlib.contextmanager
def logged(run_directory: Path, stage: str, emit: Emit) -> Iterator[Emit]:
    """An `emit` that also writes the log of the stage, until the stage ends, however it does."""
    path = run_directory / LOGS / f"{stage}.jsonl"
    with storage_errors(path):
        path.parent.mkdir(exist_ok=True)  # without parents: a run that is gone is not made again by its log
        # Unbuffered: what a full disk refuses must not come up again when the file is closed.
        file = open(path, "a+b", buffering=0)  # noqa: SIM115  # open as long as the stage runs
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            if file.read(1) != b"\n":  # the last line of a process that was killed
                file.write(b"\n")

    def write(event: str, fields: Mapping[str, Any]) -> None:
        line = {"time": datetime.now().astimezone().isoformat(timespec="milliseconds"), "event": event, **fields}
        with storage_errors(path):
            file.write(json.dumps(line).encode() + b"\n")

    def both(event: Event) -> None:
        write(type(event).__name__, plain(dataclasses.asdict(event)))
        emit(event)

    with file:
        write(BEGAN, {"process": os.getpid(), "command": sys.argv})
        try:
            yield both
        except BaseException as error:
            with contextlib.suppress(StorageError):  # the first error counts
                reason = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
                write(ENDED, {"error": reason})
            raise
        write(ENDED, {"error": None})


def last_attempt(run_directory: Path, stage: str) -> list[dict[str, Any]]:
    """The lines of the log from the last beginning on; none where there is no log. Broken lines are passed over."""
    path = run_directory / LOGS / f"{stage}.jsonl"
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:  # the last one of a process that was killed
            continue
        if isinstance(line, dict):
            lines = [line] if line.get("event") == BEGAN else [*lines, line]
    return lines
