"""Every example runs, on a tiny model. Those that set a variable for Numba need a Python of their own."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import pages
from helpers.commands import run

pytestmark = pytest.mark.slow


def _run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(pages.ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_packed_model_gives_the_same_logits_in_stock_transformers(finished_run: Path) -> None:
    output = _run("load_in_transformers.py", str(finished_run / "packed"))
    difference = re.search(r"relative difference of the logits: (\S+)", output)
    assert difference is not None and float(difference[1]) < 1e-5


def test_lora_learns_on_a_packed_model(finished_run: Path) -> None:
    before = (finished_run / "packed" / "model.safetensors").read_bytes()
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", _run("lora.py", str(finished_run / "packed"), "5"))]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert Path("lora-adapter/adapter_model.safetensors").exists()
    assert (finished_run / "packed" / "model.safetensors").read_bytes() == before


def test_native_model_is_saved_again_and_takes_adapters(finished_run: Path) -> None:
    run("pack", str(finished_run), "--format", "native", "--overwrite")
    output = _run("native.py", str(finished_run / "packed"), "5")
    assert "largest difference after saving: 0.0" in output
    losses = [float(loss) for loss in re.findall(r"step \d: loss (\S+)", output)]
    assert len(losses) == 5 and losses[-1] < losses[0]
    loaded = re.search(r"adapter that was saved: (\S+)", output)
    assert loaded is not None and float(loaded[1]) < losses[-1]


def test_python_api_quantizes_evaluates_and_generates(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("small.yaml").write_text(Path("run.yaml").read_text().replace("2x4g8", "2x8g8"))
    runpy.run_path(str(pages.ROOT / "examples" / "python_api.py"))["main"]("tiny", "small.yaml")
    output = capsys.readouterr().out
    assert re.search(r"perplexity [\d.]+ ± [\d.]+, [\d.]+ times", output) and "The capital of France is" in output
    assert Path("runs/from-python/packed/model.safetensors").exists()
