"""`aqlm status`: where a run stands, told from its directory alone, while another process may be at work in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from aqlm_cli.errors import ArtifactError
from aqlm_cli.records import StageStatus, StatusReport
from aqlm_cli.runs.directory import RunDirectory, find_artifact, read_run
from aqlm_cli.runs.lock import Holder, holder
from aqlm_cli.runs.log import last_attempt

STAGES: Mapping[str, tuple[str, str]] = {
    "calibrate": ("calibration", "calibration"),
    "quantize": ("quantized", "quantized"),
    "sample": ("text", "text"),
    "finetune": ("finetuned", "quantized"),
    "pack": ("packed", "packed"),
}
"""The stages of a run in order, the directory of what each makes, and its kind."""


def status(run_directory: Path) -> StatusReport:
    run = read_run(run_directory)
    found = holder(run_directory)
    # A run is whole without these.
    optional = ["sample", "finetune", *(["calibrate"] if run.config.quantize.import_from is not None else [])]
    return StatusReport(
        directory=run_directory,
        model=run.config.model,
        scheme=run.config.quantize.scheme,
        process=None if found is None else found.words,
        stages=tuple(
            _stage(run, stage, name, kind, found)
            for stage, (name, kind) in STAGES.items()
            if stage not in optional or last_attempt(run.path, stage)
        ),
    )


def _stage(run: RunDirectory, stage: str, name: str, kind: str, at_work: Holder | None) -> StageStatus:
    log = last_attempt(run.path, stage)
    ended = next((line for line in log if line["event"] == "Ended"), None)
    if at_work is not None and log and ended is None and log[0].get("process") == at_work.process:
        return _progress(stage, log)
    if not (run.path / f"{name}.partial").exists():
        try:
            if run.own(name, kind) is None:
                return StageStatus(stage, "not begun")
            outlived = name == "finetuned" and find_artifact(run.path, kind) != run.path / name
            return StageStatus(stage, "made from an earlier quantized model" if outlived else "finished")
        except ArtifactError as error:
            return StageStatus(stage, f"damaged: {error}")
    reason = f": {ended['error']}" if ended is not None and ended.get("error") else ""
    progress = _progress(stage, log)
    return StageStatus(stage, f"interrupted{reason}", progress.done, progress.total, progress.unit)


def _progress(stage: str, log: Sequence[Mapping[str, Any]]) -> StageStatus:
    """By what the log says of a stage at work."""
    started = next((line for line in log if line["event"] == "StageStarted"), None)
    if started is None:
        return StageStatus(stage, "at work")
    steps = [line for line in log if line["event"] == "Advanced"]
    total, done = int(started["total"]), int(steps[-1]["done"]) if steps else int(started["done"])
    left = None
    if steps:
        now = datetime.now().astimezone()
        begun, last = (datetime.fromisoformat(line["time"]) for line in (started, steps[-1]))
        a_step = (last - begun).total_seconds() / (done - started["done"])
        left = max(0.0, a_step * (total - done) - (now - last).total_seconds())
    return StageStatus(stage, "at work", done, total, str(started["unit"]), left)
