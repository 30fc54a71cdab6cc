"""Console output of events, results and errors: a progress bar on a terminal, plain lines elsewhere.

With `--json` exactly one JSON object goes to stdout and everything else to stderr; likewise other forms for machines.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text
from typer.core import TyperGroup

from aqlm_cli.errors import AqlmError, UsageError
from aqlm_cli.events import Advanced, BlockQuantized, Event, LayerQuantized, Noted, StageStarted, Warned
from aqlm_cli.formatting import clock, counted
from aqlm_cli.records import Record

PLAIN_STEPS = 10
"""Lines of progress that a stage prints where there is no terminal."""

FILE_WIDTH = 160
"""Columns of a table there: rich would break paths at 80."""


@dataclass(frozen=True)
class _Stage:
    event: StageStarted
    bar: TaskID
    start: float


class Screen:
    """The console of one command; open while it runs."""

    def __init__(
        self, as_json: bool, quiet: bool = False, verbose: bool = False, *, md: bool = False, csv: bool = False
    ) -> None:
        if quiet and verbose:
            raise UsageError("--quiet and --verbose exclude each other; give one of them")
        if as_json + md + csv > 1:
            raise UsageError("--json, --md and --csv exclude each other; give one of them")
        self._as_json, self._quiet, self._verbose = as_json, quiet, verbose
        self._console = Console(stderr=as_json or md or csv, highlight=False)
        if not self._console.is_terminal:
            self._console.width = FILE_WIDTH
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[ahead]}", markup=False),
        )
        self._progress = Progress(
            *columns, console=self._console, transient=True, disable=quiet or not self._console.is_terminal
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
            bar = self._progress.add_task(event.stage, total=event.total, completed=event.done, ahead="")
            self._stages[event.stage] = _Stage(event, bar, time.monotonic())
        elif isinstance(event, Advanced):
            self._advance(self._stages[event.stage], event)
        elif not self._quiet or isinstance(event, Warned):
            self._line(_sentence(event))

    def show(self, record: Record) -> None:
        """Print an intermediate table; never part of the JSON."""
        if not self._quiet:
            self._table(record)

    def _table(self, record: Record) -> None:
        self._progress.console.print(record.table())

    def finish(self, results: Mapping[str, Record], following: str) -> None:
        """The results, as the one JSON object if that is wanted, and the command to type next.

        A single result is that object; several are its values.
        """
        for record in results.values():
            self._table(record)
        if not self._quiet:
            self._line(f"next: {following}")
        if self._as_json:
            parts = {name: record.as_json() for name, record in results.items()}
            whole: Mapping[str, Any] = next(iter(parts.values())) if len(parts) == 1 else parts
            print(json.dumps(whole))

    def _advance(self, stage: _Stage, event: Advanced) -> None:
        total, spent = stage.event.total, time.monotonic() - stage.start
        # By all steps so far. rich's own estimate looks at the last seconds only, and one step may take longer.
        left = spent / (event.done - stage.event.done) * (total - event.done)
        ahead = f"{clock(left)} left" if event.done < total else f"done in {clock(spent)}"
        ahead += f", {event.detail}" if event.detail else ""
        self._progress.update(stage.bar, completed=event.done, ahead=ahead, visible=event.done < total)
        new_part = event.done * PLAIN_STEPS // total > (event.done - 1) * PLAIN_STEPS // total
        if self._verbose or (new_part and not self._console.is_terminal and not self._quiet):
            self._line(f"{event.stage}: {event.done} of {counted(total, stage.event.unit)}, {ahead}")

    def _line(self, text: str) -> None:
        moment = f"{datetime.now():%H:%M:%S} " if self._verbose else ""
        # Not wrapped: a line in a log, or a path in it, stays whole.
        self._progress.console.print(Text(moment + text), soft_wrap=True)


class OneLineErrors(TyperGroup):
    """A command that fails ends with one line on stderr, if the user can fix it; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _fixable() as error:
            _end(str(error), getattr(error, "exit_status", 1), error)
        except KeyboardInterrupt as interrupt:
            _end("interrupted; finished work is kept. Run the same command to resume.", 130, interrupt)


def _fixable() -> tuple[type[Exception], ...]:
    """Error types of one line. A KernelError can only come from a package that is loaded when it is raised."""
    kernels = sys.modules.get("aqlm_kernels.errors")
    return (AqlmError,) if kernels is None else (AqlmError, kernels.KernelError)


def _end(reason: str, status: int, cause: BaseException) -> NoReturn:
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
    raise typer.Exit(status) from cause


def _sentence(event: LayerQuantized | BlockQuantized | Noted | Warned) -> str:
    if isinstance(event, LayerQuantized):
        return (
            f"  {event.path}: relative error {event.relative_error:.3g}, {event.bits_per_weight:.3f} bits, "
            f"{event.seconds:.1f} s"
        )
    if isinstance(event, BlockQuantized):
        fitted = f"fitting removed {event.gain:.1%}, " if event.gain else ""
        error = f"relative error of its output {event.relative_error:.3g}"
        return f"block {event.index}: {error}, {fitted}{event.seconds:.1f} s"
    return f"warning: {event.message}" if isinstance(event, Warned) else event.message
