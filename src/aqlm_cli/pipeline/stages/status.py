"""`aqlm status`: the state of a run, read from its directory alone, while another process may be running in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from aqlm_cli.errors import ArtifactError
from aqlm_cli.events import CHECK
from aqlm_cli.formatting import clock, counted, facts
from aqlm_cli.records import Record
from aqlm_cli.runs import stages
from aqlm_cli.runs.directory import RunDirectory, find_artifact, read_run
from aqlm_cli.runs.lock import Holder, holder
from aqlm_cli.runs.log import last_attempt
from aqlm_cli.runs.stages import StageSpec


@dataclass(frozen=True)
class StageStatus:
    """`state` in words; for a stage that has started, `done` of `total` steps and the seconds left, if known."""

    stage: str
    state: str
    done: int | None = None
    total: int | None = None
    unit: str | None = None
    seconds_left: float | None = None


@dataclass(frozen=True)
class StatusReport(Record):
    """The state of a run; `process` is the one that runs it, None if there is none."""

    directory: Path
    model: str
    scheme: str
    process: str | None
    stages: tuple[StageStatus, ...]

    def table(self) -> Table:
        rows = [("model", f"{self.model}, {self.scheme}"), ("running", self.process or "no")]
        for stage in self.stages:
            steps = "" if stage.total is None else f", {stage.done} of {counted(stage.total, stage.unit or 'step')}"
            left = "" if stage.seconds_left is None else f", {clock(stage.seconds_left)} left"
            rows.append((stage.stage, f"{stage.state}{steps}{left}"))
        return facts(str(self.directory), rows)


def status(run_directory: Path) -> StatusReport:
    run = read_run(run_directory)
    found, target = holder(run_directory), run.config.quantize.target
    no_text = not run.config.quantize.reads_text
    optional = [stage for stage in stages.STAGES if stage.optional or (no_text and stage == stages.CALIBRATE)]
    return StatusReport(
        directory=run_directory,
        model=run.config.model,
        scheme=run.config.quantize.scheme if target.question is None else str(target),
        process=None if found is None else found.words,
        stages=tuple(
            _stage(run, stage, found)
            for stage in stages.STAGES
            if stage not in optional or last_attempt(run.path, stage.name)
        ),
    )


def _stage(run: RunDirectory, stage: StageSpec, at_work: Holder | None) -> StageStatus:
    log = last_attempt(run.path, stage.name)
    ended = next((line for line in log if line["event"] == "Ended"), None)
    if at_work is not None and log and ended is None and log[0].get("process") == at_work.process:
        return _progress(stage.name, log)
    if not run.partial(stage).exists():
        try:
            if run.own(stage) is None:
                return StageStatus(stage.name, "not started")
            outdated = stage.replaces and find_artifact(run.path, stage.kind) != run.path / stage.directory
            return StageStatus(stage.name, "made from an earlier quantized model" if outdated else "finished")
        except ArtifactError as error:
            return StageStatus(stage.name, f"damaged: {error}")
    reason = f": {ended['error']}" if ended is not None and ended.get("error") else ""
    progress = _progress(stage.name, log)
    return StageStatus(stage.name, f"interrupted{reason}", progress.done, progress.total, progress.unit)


def _progress(stage: str, log: Sequence[Mapping[str, Any]]) -> StageStatus:
    """The progress of a running stage, from its log."""
    own = [line for line in log if line.get("stage") != CHECK]
    started = next((line for line in own if line["event"] == "StageStarted"), None)
    if started is None:
        return StageStatus(stage, "running")
    steps = [line for line in own if line["event"] == "Advanced"]
    total, done = int(started["total"]), int(steps[-1]["done"]) if steps else int(started["done"])
    left = None
    if steps:
        now = datetime.now().astimezone()
        begun, last = (datetime.fromisoformat(line["time"]) for line in (started, steps[-1]))
        a_step = (last - begun).total_seconds() / (done - started["done"])
        left = max(0.0, a_step * (total - done) - (now - last).total_seconds())
    return StageStatus(stage, "running", done, total, str(started["unit"]), left)
