"""Commands as a user types them, in this process, on a model small enough for a run to take a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from helpers import tiny_models
from typer.testing import CliRunner, Result

from aqlm_cli.cli.app import app
from aqlm_cli.spec.time_estimate import Rates

RUN_FILE = """
model: tiny
threads: 1
calibrate: {data: "builtin:8", sequence_length: 32, statistics_sequences: 2}
quantize:
  statistics_sequences: 8
  scheme: 2x4g8
  aqlm: {rounds: 1, ldlq_rounds: 1, kmeans_iterations: 1}
  fit: {epochs: 1, sequences: 4, held_out: 4}
eval_ppl: {data: [notes.txt], sequence_length: 32}
bench: {tokens: 2, prompt: 4, repeats: 1}
"""

FINETUNE = """
finetune: {steps: 6, batch: 2, micro_batch: 2, sequence_length: 16, held_out: 2, evaluate_every: 2, save_every: 2}
"""

RATES = Rates(
    forward=1e-9,
    quantized_forward=1e-9,
    step=3e-9,
    moment=1e-9,
    matrices={},
    weight=1e-5,
    coupling=1e-9,
    character=1e-7,
    byte=1e-9,
)
"""Seconds of a machine that nobody timed, for forecasts that no test looks at."""


def add_settings(run_directory: Path, text: str) -> None:
    """Give a finished run, and the run file beside it, a section more, as if it had been there from the start."""
    for path in run_directory / "run.yaml", run_directory.parent / "run.yaml":
        settings = yaml.safe_load(path.read_text())
        for section, changes in yaml.safe_load(text).items():
            settings[section] = {**settings.get(section, {}), **changes}
        path.write_text(yaml.safe_dump(settings, sort_keys=False))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refused(*arguments: str, status: int = 1) -> str:
    """The line on stderr with which this command ends."""
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def made(directory: Path | str) -> dict[str, Any]:
    """The files of a run: their bytes; of manifests all but what was measured; no logs and no forecast, of times."""
    found: dict[str, Any] = {}
    for path in sorted(Path(directory).rglob("*")):
        name = str(path.relative_to(directory))
        if path.name == "manifest.json":
            found[name] = {**json.loads(path.read_bytes()), "results": None}
        elif path.is_file() and not name.startswith("logs/") and path.name != "forecast.json":
            found[name] = path.read_bytes()
    return found


def save_run_file(directory: Path) -> Path:
    """`run.yaml`, with the model `tiny` and the text `notes.txt` that it names beside it."""
    tiny_models.save("llama", directory / "tiny")
    (directory / "notes.txt").write_text("".join(f"{number} is {number}. " for number in range(40)))
    path = directory / "run.yaml"
    path.write_text(RUN_FILE)
    return path
