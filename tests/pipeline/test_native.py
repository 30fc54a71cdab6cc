"""A run whose embeddings are quantized: packed in the native format, and read from there by every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import commands, tiny_models
from helpers.packing import logits, relative_rms
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from aqlm_cli.models import load_network, resolve
from aqlm_cli.models.native_checkpoint import load_dense, native_matrices

FLAGS = ("--config", "run.yaml", "--out", "run", "--embeddings", "int4g32", "--layer", ".*down_proj=int8g64")


def told(*arguments: str) -> dict[str, object]:
    result = commands.run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout)
    return found


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    commands.save_run_file(tmp_path)
    tiny_models.save("llama", tmp_path / "tiny", tie_word_embeddings=True)
    monkeypatch.chdir(tmp_path)
    told("quantize", *FLAGS)
    return Path("run/packed")


@pytest.mark.slow
def test_every_command_reads_it(packed: Path) -> None:
    described = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "aqlm_native"
    assert described["layers"]["model.embed_tokens"] == {"scheme": "int4g32", "kind": "uniform", "duty": "table"}
    planned = told("plan", *FLAGS[:2], *FLAGS[4:])
    size = sum(tensor.nbytes for tensor in load_file(packed / "model.safetensors").values())
    assert planned["plan"]["bytes_after"] == size  # type: ignore[index]
    assert (packed / "model.safetensors").stat().st_size == planned["forecast"]["safetensors_bytes"]  # type: ignore[index]
    matrices = native_matrices(resolve(str(packed)))
    assert {matrix.scheme for matrix in matrices.values()} == {"2x4g8", "int4g32", "int8g64"}
    stock = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    wanted = logits(load_dense(resolve(str(packed)), torch.float32))
    assert relative_rms(logits(stock), wanted) < 1e-5
    assert relative_rms(logits(load_network(resolve(str(packed)), torch.float32)), wanted) < 1e-5
    assert float(told("eval-ppl", "run")["perplexity"]) == pytest.approx(  # type: ignore[arg-type]
        float(told("eval-ppl", str(packed), "--data", "notes.txt", "--sequence-length", "32")["perplexity"]),  # type: ignore[arg-type]
        rel=1e-4,
    )
    assert told("verify", "run")
    assert told("generate", "run", "--prompt", "1 is", "--tokens", "4")
    assert told("bench", "run")
