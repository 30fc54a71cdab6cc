"""One command resolves its model once and surveys it once; a forecast decides nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import commands
from helpers.commands import run

from aqlm_cli.models import resolve as resolve_function
from aqlm_cli.models import source as source_module
from aqlm_cli.pipeline import job as job_module
from aqlm_cli.pipeline.stages import plan as plan_module
from aqlm_cli.spec.time_estimate import Rates

resolving = __import__(resolve_function.__module__, fromlist=["resolve"])


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls that resolve a directory, by its name, and preflights, while a command runs."""
    counts: Counter[str] = Counter()

    def counting(module: Any, name: str, key: Callable[..., str]) -> None:
        original = getattr(module, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            counts[key(*arguments)] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(module, name, counted)

    counting(resolving, "directory_source", lambda directory, *_: directory.name)
    counting(job_module, "preflight", lambda *_: "preflight")
    return counts


def test_quantize_resolves_and_surveys_its_model_once(run_file: Path, counts: Counter[str]) -> None:
    result = run("quantize", "--config", "run.yaml")  # without --out, which asks the model for its name
    assert result.exit_code == 0, result.output
    assert counts == {"tiny": 1, "preflight": 1}


def test_run_resolves_and_surveys_its_model_once(run_file: Path, counts: Counter[str]) -> None:
    run_file.write_text(commands.RUN_FILE.replace("builtin:8", "builtin:16") + commands.FINETUNE)
    result = run("run", "run.yaml", "--out", "run")
    assert result.exit_code == 0, result.output
    assert (counts["tiny"], counts["preflight"]) == (1, 1)


def test_finetune_from_a_checkpoint_resolves_and_surveys_its_model_once(run_file: Path, counts: Counter[str]) -> None:
    run_file.write_text(commands.RUN_FILE.replace("builtin:8", "builtin:16") + commands.FINETUNE)
    assert run("quantize", "--config", "run.yaml", "--out", "run").exit_code == 0
    counts.clear()
    result = run("finetune", "run", "--out", "new", "--steps", "2", "--data", "builtin:16")
    assert result.exit_code == 0, result.output
    assert (counts["tiny"], counts["preflight"]) == (1, 1)


@pytest.fixture
def absurd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cost model that is wrong in everything: years of work in exabytes of memory and disk."""
    rates = Rates(*[10.0] * 4, matrices={}, weight=10.0, coupling=10.0, character=10.0, byte=10.0)
    monkeypatch.setattr(plan_module, "measure_rates", lambda *_: rates)
    for name in ("calibration_memory", "quantization_memory", "packing_memory"):
        monkeypatch.setattr(plan_module, name, lambda *_: 10**18)
    disks = dict.fromkeys(("calibrate", "quantize", "pack"), 10**18)
    monkeypatch.setattr(plan_module, "disk_needed", lambda *_: disks)
    yield


def test_an_absurd_forecast_changes_no_byte(run_file: Path, request: pytest.FixtureRequest) -> None:
    assert run("quantize", "--config", "run.yaml", "--out", "run").exit_code == 0
    request.getfixturevalue("absurd")
    result = run("quantize", "--config", "run.yaml", "--out", "wrong")
    assert result.exit_code == 0 and "this machine may have too little memory" in result.output, result.output
    assert commands.made("wrong") == commands.made("run")


# --------------------------------------------------------------------------------------------------- the kept forecast


@pytest.fixture
def calibrated(run_file: Path, interrupted_at: Callable[..., Any]) -> Path:
    """The forecast of a run that was interrupted after calibration."""
    interrupted_at("work/block-000.json", 1, "quantize", "--config", "run.yaml", "--out", "run")
    return Path("run/reports/forecast.json")


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        (lambda kept: kept.unlink(), False),
        (lambda kept: kept.write_text(json.dumps({**json.loads(kept.read_text()), "version": 0})), False),
        (lambda kept: kept.write_text(json.dumps({"settings": {}, "costs": {}})), False),
        (lambda kept: kept.write_text("{"), True),
        (lambda kept: kept.write_text(json.dumps({**json.loads(kept.read_text()), "costs": {"pack": {}}})), True),
    ],
    ids=["missing", "other version", "without version", "no JSON", "costs without numbers"],
)
def test_a_kept_forecast_that_cannot_be_used_is_made_again_and_damage_is_told(
    calibrated: Path, change: Callable[[Path], Any], warned: bool
) -> None:
    change(calibrated)
    result = run("quantize", "--config", "run.yaml", "--out", "run")
    assert result.exit_code == 0, result.output
    assert ("warning: run/reports/forecast.json cannot be read" in result.output) == warned
    assert json.loads(calibrated.read_text())["version"] == 1


def test_one_command_asks_the_hub_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_file: Path) -> None:
    calls: list[tuple[str, ...]] = []
    snapshot = tmp_path / "snapshots" / "0123456789abcdef"

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        calls.append(tuple(allow_patterns))
        return str(snapshot)

    snapshot.parent.mkdir()
    Path("tiny").rename(snapshot)
    monkeypatch.setattr(source_module, "snapshot_download", download)
    run_file.write_text(commands.RUN_FILE.replace("model: tiny", "model: someone/tiny"))
    result = run("quantize", "--config", "run.yaml")
    assert result.exit_code == 0, result.output
    assert Path("runs/tiny-2x4g8/packed/config.json").exists()
    assert len(calls) == len(set(calls)), "the same files were asked for twice"
