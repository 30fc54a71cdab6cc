"""The bytes of a run on the disk: run.yaml, a block file, manifests and a packed directory, as tests/golden holds them.

A difference here is a change of a format: files that users have would be read or compared otherwise. Where that is
wanted, `pytest --write-golden tests/pipeline/test_golden.py` writes the files anew, and git shows what has changed.

No number comes from a search or a sum, which would differ by machine: the model's weights are small integers over
eight, its codes count up, and its codebooks and scales are powers of two.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aqlm_cli.models import resolve, tensor_index
from aqlm_cli.models.weight_files import WEIGHTS
from aqlm_cli.pipeline.job import make_job
from aqlm_cli.pipeline.stages.pack import pack
from aqlm_cli.pipeline.stages.quantize import quantize
from aqlm_cli.quantization.methods import METHODS
from aqlm_cli.runs.directory import open_run
from aqlm_cli.runs.files import save_tensors
from aqlm_cli.runs.stages import CALIBRATE, StageKey
from aqlm_cli.spec.run_file import build_config
from aqlm_kernels import AdditiveMatrix

GOLDEN = Path(__file__).parents[1] / "golden"
"""`model` is the input: a configuration and a tokenizer. `run` is what comes of it."""

HIDDEN, WIDE, VOCABULARY = 16, 32, 258
BLOCK = {
    "input_layernorm": (HIDDEN,),
    "mlp.down_proj": (HIDDEN, WIDE),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "post_attention_layernorm": (HIDDEN,),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
}

MEASURED = "measured"
"""Stands in a golden manifest for what a clock, this machine's memory or its arithmetic decides."""


def save_model(directory: Path) -> None:
    """Llama of two blocks, its head tied to the embeddings."""
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    shapes |= {f"model.layers.{index}.{name}": shape for index in range(2) for name, shape in BLOCK.items()}
    tensors = {f"{name}.weight": eighths(*shape, first=number) for number, (name, shape) in enumerate(shapes.items())}
    shutil.copytree(GOLDEN / "model", directory)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})


def eighths(*shape: int, first: int) -> Tensor:
    count = torch.Size(shape).numel()
    return ((torch.arange(first, first + count) * 5 % 13 - 6) / 8).view(shape)


def fixed(weight: Tensor, *_: Any) -> AdditiveMatrix:
    """Of the weight it takes the shape alone."""
    rows, columns = weight.shape
    codes = torch.arange(rows * columns // 8 * 2).view(rows, columns // 8, 2) % 4
    codebooks = 2.0 ** (torch.arange(2 * 4 * 8).view(2, 4, 8) % 5 - 4)
    return AdditiveMatrix(codes, codebooks, 2.0 ** -(torch.arange(rows) % 3))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of that model, quantized and packed; its windows of text are given, as the statistics of text are sums."""
    monkeypatch.chdir(tmp_path)
    save_model(Path("model"))
    section = {"scheme": "2x2g8", "statistics_sequences": 2, "batch": 2, "fit": {"epochs": 0}}
    calibration = {"data": "builtin:4", "sequence_length": 8}
    given = {"model": "model", "threads": 1, "calibrate": calibration, "quantize": section}
    config = build_config(None, None, given)
    directory = open_run(Path("run"), config)
    with directory.stage(StageKey(CALIBRATE, {}, {"model": resolve("model").identity})) as stage:
        save_tensors(stage.directory / "windows.safetensors", {"ids": torch.arange(32, dtype=torch.int32).view(4, 8)})
        stage.publish({})
    monkeypatch.setitem(METHODS, "aqlm", fixed)  # type: ignore[arg-type]
    job = make_job(config, Path("run"))
    quantize(job)
    pack(job)
    return Path("run")


def contents(directory: Path) -> dict[str, bytes]:
    """The files whose format is fixed, by name; of quantized/manifest.json all but what was measured."""
    kept = [directory / "run.yaml", directory / "quantized/block-000.safetensors", *directory.glob("packed/*")]
    files = {str(path.relative_to(directory)): path.read_bytes() for path in kept}
    return files | {"quantized/manifest.json": without_measurements(directory / "quantized/manifest.json")}


def without_measurements(path: Path) -> bytes:
    manifest = json.loads(path.read_bytes())
    report, layers = manifest["results"]["report"], manifest["results"]["layers"]
    for values in (report, *layers.values()):
        for key in ("seconds", "memory_bytes", "disk_bytes", "mean_relative_error", "relative_error"):
            if key in values:
                values[key] = MEASURED
    manifest["results"]["machine"] = MEASURED
    return json.dumps(manifest, indent=1, sort_keys=True).encode()


def test_a_run_lies_on_the_disk_as_it_always_did(run: Path, request: pytest.FixtureRequest) -> None:
    found = contents(run)
    if request.config.getoption("--write-golden"):
        shutil.rmtree(GOLDEN / "run", ignore_errors=True)
        for name, content in found.items():
            (GOLDEN / "run" / name).parent.mkdir(parents=True, exist_ok=True)
            (GOLDEN / "run" / name).write_bytes(content)
    golden = {str(path.relative_to(GOLDEN / "run")): path for path in (GOLDEN / "run").rglob("*") if path.is_file()}
    assert found.keys() == golden.keys()
    for name, content in found.items():
        assert content == golden[name].read_bytes(), f"{name} differs; is that wanted? then: pytest --write-golden"


def test_the_golden_manifests_vouch_for_the_golden_files() -> None:
    """Digests and sizes are those of the files beside them, and every name is read back."""
    for kind in "quantized", "packed":
        manifest = json.loads((GOLDEN / "run" / kind / "manifest.json").read_bytes())
        for name, record in manifest["files"].items():
            path = GOLDEN / "run" / kind / name
            if path.exists():  # one block of two is kept
                assert record["bytes"] == path.stat().st_size, path
    assert tensor_index(GOLDEN / "run" / "packed")["model.embed_tokens.weight"].shape == (VOCABULARY, HIDDEN)
