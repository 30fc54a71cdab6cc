"""How events and results look: a bar with the time left on a terminal, plain lines elsewhere.

With `--json` exactly one JSON object goes to stdout and everything else to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from aqlm_cli.report import (
    Advanced,
    BlockQuantized,
    Event,
    LayerQuantized,
    Noted,
    Record,
    StageStarted,
    Warned,
)

PLAIN_STEPS = 10
"""Lines of progress that a stage prints where there is no terminal."""


@dataclass(frozen=True)
class _Stage:
    event: StageStarted
    bar: TaskID
    start: float


class Screen:
    """Open for the time of one command."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._console = Console(stderr=as_json, highlight=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[ahead]}", markup=False),
        )
        self._progress = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )
        self._stages: dict[str, _Stage] = {}

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def emit(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            bar = self._progress.add_task(event.stage, total=event.total, ahead="")
            self._stages[event.stage] = _Stage(event, bar, time.monotonic())
        elif isinstance(event, Advanced):
            self._advance(self._stages[event.stage], event)
        else:
            self._line(_sentence(event))

    def show(self, record: Record) -> None:
        """A table for the user; never part of the JSON."""
        self._progress.console.print(record.table())

    def finish(self, results: Mapping[str, Record], following: str) -> None:
        """The results, as the one JSON object if that is wanted, and the command to type next.

        A single result is that object; several are its values.
        """
        for record in results.values():
            self.show(record)
        self._line(f"next: {following}")
        if self._as_json:
            parts = {name: record.as_json() for name, record in results.items()}
            whole: Mapping[str, Any] = next(iter(parts.values())) if len(parts) == 1 else parts
            print(json.dumps(whole))

    def _advance(self, stage: _Stage, event: Advanced) -> None:
        total = stage.event.total
        # By all steps so far. rich's own estimate looks at the last seconds only, and one step may take longer.
        left = (time.monotonic() - stage.start) / event.done * (total - event.done)
        ahead = f"{timedelta(seconds=round(left))} left{', ' * bool(event.detail)}{event.detail}"
        self._progress.update(stage.bar, completed=event.done, ahead=ahead, visible=event.done < total)
        new_part = event.done * PLAIN_STEPS // total > (event.done - 1) * PLAIN_STEPS // total
        if new_part and not self._console.is_terminal:
            self._line(f"{event.stage}: {stage.event.unit} {event.done} of {total}, {ahead}")

    def _line(self, text: str) -> None:
        # Not wrapped: a line in a log, or a path in it, stays whole.
        self._progress.console.print(Text(text), soft_wrap=True)


def show_error(error: Exception) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


def _sentence(event: LayerQuantized | BlockQuantized | Noted | Warned) -> str:
    if isinstance(event, LayerQuantized):
        return (
            f"  {event.path}: relative error {event.relative_error:.5f}, {event.bits_per_weight:.3f} bits, "
            f"{event.seconds:.1f} s"
        )
    if isinstance(event, BlockQuantized):
        return (
            f"block {event.index + 1} of {event.blocks}: relative error of its output {event.relative_error:.5f} "
            f"({event.relative_error_before_fit:.5f} before fitting), {event.seconds:.1f} s"
        )
    return f"warning: {event.message}" if isinstance(event, Warned) else event.message
