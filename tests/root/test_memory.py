"""Memory does not grow with the number of blocks, and its peak is that of one stage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_models

BLOCK: dict[str, int] = {"hidden_size": 384, "intermediate_size": 1152}  # 1.8 million weights, 7 MB in float32

ROUNDED = """
model: model
threads: 1
calibrate: {data: "builtin:12", sequence_length: 128, statistics_sequences: 4}
quantize: {method: gptq, scheme: int2g64, fit: {epochs: 0}}
"""

SEARCHED = """
model: model
threads: 1
calibrate: {data: "builtin:12", sequence_length: 128, statistics_sequences: 4}
quantize:
  scheme: 2x4g8
  aqlm: {rounds: 1, ldlq_rounds: 1, kmeans_iterations: 1, beam: 4, final_beam: 4}
  fit: {epochs: 1, sequences: 4, held_out: 4}
"""


def peaks(directory: Path, blocks: int, settings: str) -> dict[str, int]:
    """The most memory that calibration and quantization of a model of so many blocks took, and packing after it."""
    directory.mkdir()
    tiny_models.save("llama", directory / "model", num_hidden_layers=blocks, **BLOCK)
    (directory / "run.yaml").write_text(settings)
    code = """
import json
from pathlib import Path
from aqlm_cli.pipeline import order
from aqlm_cli.spec.run_file import build_config
from aqlm_cli.memory import peak_memory_bytes
config = build_config(None, Path("run.yaml"), {})
order.use_machine(config)
found = {}
for stage, step in {
    "calibrate": lambda: order.calibrate_run(order.make_job(config, Path("run"))),
    "quantize and pack": lambda: order.quantize_and_pack(order.make_job(config, Path("run"))),
}.items():
    step()
    found[stage] = peak_memory_bytes()
print(json.dumps(found))
"""
    told = subprocess.run([sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(told.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("settings", [ROUNDED, pytest.param(SEARCHED, marks=pytest.mark.soak)], ids=["gptq", "aqlm"])
def test_a_model_of_32_blocks_takes_the_memory_of_one_of_4(settings: str, tmp_path: Path) -> None:
    few, many = (peaks(tmp_path / str(blocks), blocks, settings) for blocks in (4, 32))
    for stage in few:
        assert many[stage] < 1.1 * few[stage], (stage, few, many)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets the peak be reset")
def test_a_stage_does_not_report_what_the_one_before_it_left() -> None:
    code = """
from aqlm_cli.memory import peak_memory_bytes, reset_peak_memory
class Network: pass
def earlier():
    network = Network()
    network.weights, network.itself = [bytearray(1000) for _ in range(100_000)], network  # a cycle, of small pieces
reset_peak_memory()
before = peak_memory_bytes()
earlier()
during = peak_memory_bytes()
reset_peak_memory()
print(before, during, peak_memory_bytes())
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, during, after = map(int, told.stdout.split())
    assert during - before > 100_000_000
    assert after - before < 30_000_000
