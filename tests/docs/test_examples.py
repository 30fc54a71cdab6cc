"""Every example runs, on a tiny packed model, as a reader runs it: by a Python of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import pages

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
