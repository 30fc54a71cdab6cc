"""Logs, and what `aqlm status` makes of them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers import commands

from aqlm_cli.errors import StorageError
from aqlm_cli.events import Advanced, Event, Noted, StageStarted
from aqlm_cli.pipeline.stages import status as stage_module
from aqlm_cli.pipeline.stages.status import status
from aqlm_cli.runs.lock import Holder, exclusive
from aqlm_cli.runs.log import last_attempt, logged


def lines(run: str, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "logs" / f"{stage}.jsonl").read_text().splitlines()]


def test_a_log_holds_every_event_and_how_the_stage_ended(tmp_path: Path) -> None:
    shown: list[Event] = []
    with logged(tmp_path, "quantize", shown.append) as emit:
        emit(StageStarted("quantize", 2, "block"))
        emit(Advanced("quantize", 1))
    events: list[Event] = [StageStarted("quantize", 2, "block"), Advanced("quantize", 1)]
    assert shown == events
    began, started, advanced, ended = lines(str(tmp_path), "quantize")
    assert (began["event"], began["process"]) == ("Began", os.getpid())
    assert {key: started[key] for key in ("event", "total", "unit", "done")} == {
        "event": "StageStarted", "total": 2, "unit": "block", "done": 0,
    }  # fmt: skip
    assert (advanced["event"], advanced["done"]) == ("Advanced", 1)
    assert (ended["event"], ended["error"]) == ("Ended", None)
    with pytest.raises(ValueError, match="broken"), logged(tmp_path, "quantize", shown.append):
        raise ValueError("broken")
    assert lines(str(tmp_path), "quantize")[-1]["error"] == "broken"
    assert [line["event"] for line in last_attempt(tmp_path, "quantize")] == ["Began", "Ended"]


def test_a_torn_line_does_not_hide_the_next_beginning(tmp_path: Path) -> None:
    with logged(tmp_path, "pack", lambda event: None):
        pass
    with open(tmp_path / "logs" / "pack.jsonl", "a") as file:
        file.write('{"event": "Adva')
    with logged(tmp_path, "pack", lambda event: None) as emit:
        emit(Noted("again"))
    assert [line["event"] for line in last_attempt(tmp_path, "pack")] == ["Began", "Noted", "Ended"]


def test_a_full_disk_is_one_line_and_the_first_error_counts(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "pack.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="no space left"), logged(tmp_path, "pack", lambda event: None):
        pass


@pytest.mark.parametrize("rest", ['{"event": "Adva', "7", ""])
def test_a_broken_last_line_is_passed_over(rest: str, tmp_path: Path) -> None:
    with logged(tmp_path, "pack", lambda event: None) as emit:
        emit(Noted("half"))
    with open(tmp_path / "logs" / "pack.jsonl", "a") as file:
        file.write(rest)
    assert [line["event"] for line in last_attempt(tmp_path, "pack")] == ["Began", "Noted", "Ended"]
    assert last_attempt(tmp_path, "quantize") == []


def test_every_stage_of_a_command_has_a_log_with_what_the_screen_shows(run_file: Path) -> None:
    shown = commands.run("quantize", "--config", str(run_file), "--out", "out").output
    layers = [line for line in lines("out", "quantize") if line["event"] == "LayerQuantized"]
    assert len(layers) == 14 and all(f"{line['path']}: relative error" in shown for line in layers)
    assert {path.name for path in Path("out/logs").iterdir()} == {"calibrate.jsonl", "quantize.jsonl", "pack.jsonl"}
    commands.run("eval-ppl", "out")
    commands.run("bench", "out")
    assert lines("out", "eval-ppl")[-1]["error"] is None and lines("out", "bench")[-1]["error"] is None


def test_a_run_goes_from_not_started_over_interrupted_to_finished(
    run_file: Path, interrupted_at: Callable[..., Any]
) -> None:
    commands.run("calibrate", "--config", str(run_file), "--out", "out")
    shown = commands.run("status", "out")
    assert (
        re.search(r"running\W+no\W", shown.output)
        and "not started" in shown.output
        and "next: aqlm quantize --config" in shown.output
    )
    # The check of the block calls went through both blocks before; it does not count.
    assert interrupted_at("model.layers.0", 1, "quantize", "--config", str(run_file), "--out", "out").exit_code == 130
    assert "interrupted: Ctrl-C, 0 of 2 blocks" in commands.run("status", "out").output
    assert interrupted_at("model.layers.1", 1, "quantize", "--config", str(run_file), "--out", "out").exit_code == 130
    assert "interrupted: Ctrl-C, 1 of 2 blocks" in commands.run("status", "out").output
    commands.run("quantize", "--config", str(run_file), "--out", "out")
    report = json.loads(commands.run("status", "out", "--json").stdout)
    assert [stage["state"] for stage in report["stages"]] == ["finished"] * 3
    assert report["process"] is None
    assert "next: aqlm eval-ppl out" in commands.run("status", "out").output


def test_the_time_left_is_that_of_the_steps_so_far(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks of ten were there before; two more took 60 seconds, 10 seconds ago: four of 30 seconds are left."""
    shutil.rmtree(finished_run / "quantized")
    shutil.rmtree(finished_run / "packed")
    now = datetime.now().astimezone()
    log = [
        {"event": "Began", "time": (now - timedelta(seconds=80)).isoformat(), "process": 7},
        {
            "event": "StageStarted",
            "time": (now - timedelta(seconds=70)).isoformat(),
            "total": 10,
            "unit": "block",
            "done": 4,
        },
        {"event": "Advanced", "time": (now - timedelta(seconds=10)).isoformat(), "done": 6},
    ]
    (finished_run / "logs/quantize.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    monkeypatch.setattr(
        stage_module, "holder", lambda run: Holder(7, "process 7")
    )  # for this one holds no lock against itself
    with exclusive(finished_run):
        found = status(finished_run).stages[1]
    assert (found.state, found.done, found.total) == ("running", 6, 10)
    assert found.seconds_left == pytest.approx(4 * 30 - 10, abs=2)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    result = commands.run("status", str(tmp_path))
    assert result.exit_code == 1 and "is not a run directory" in result.output


def test_a_damaged_artifact_shows(finished_run: Path) -> None:
    os.truncate(finished_run / "calibration/windows.safetensors", 10)
    assert "damaged: run/calibration/windows.safetensors has 10 bytes" in commands.run("status", "run").output
