"""A run whose codebooks are stored in 8 bits, in the blocks and in the table, through every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import commands, tiny_models
from helpers.commands import run
from helpers.packing import logits, relative_rms
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from aqlm_cli.models import load_network, resolve
from aqlm_cli.models.native_checkpoint import native_matrices
from aqlm_cli.runs.files import load_tensors
from aqlm_kernels import AdditiveMatrix

FLAGS = "--config", "run.yaml", "--scheme", "2x4g8c8", "--embeddings", "3x4g8c8"


def told(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def in_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied tiny model and its run file in the working directory."""
    run_file = commands.save_run_file(tmp_path)
    run_file.write_text(commands.RUN_FILE + commands.FINETUNE)
    tiny_models.save("llama", tmp_path / "tiny", tie_word_embeddings=True)
    monkeypatch.chdir(tmp_path)


def matrices(directory: str) -> dict[str, AdditiveMatrix]:
    """The matrices of `quantized/` or `finetuned/`, by path."""
    stored: dict[str, Tensor] = {}
    for file in sorted(Path("run", directory).glob("*.safetensors")):
        stored |= load_tensors(file)
    paths = [name.removesuffix(".codes") for name in stored if name.endswith(".codes")]
    names = "codes", "codebooks", "scales", "entry_bits"
    return {path: AdditiveMatrix.from_tensors({name: stored[f"{path}.{name}"] for name in names}) for path in paths}


@pytest.mark.slow
def test_it_goes_through_every_command_at_the_bytes_of_its_plan(in_8_bits: None) -> None:
    planned = told("plan", *FLAGS)
    told("quantize", *FLAGS, "--out", "run")
    stored = matrices("quantized")
    assert {path: one.scheme for path, one in stored.items()} == planned["plan"]["schemes"]
    for path, one in stored.items():
        assert torch.equal(one.stored().codebooks, one.codebooks), f"{path} is stored in 8 bits"
    size = sum(tensor.nbytes for tensor in load_file("run/packed/model.safetensors").values())
    assert planned["plan"]["bytes_after"] == size
    assert told("verify", "run")

    told("finetune", "run")
    tuned = matrices("finetuned")
    assert any(not torch.equal(one.codebooks, stored[path].codebooks) for path, one in tuned.items())
    packed = native_matrices(resolve("run/packed"))
    for path, one in tuned.items():
        assert torch.equal(one.stored().codebooks, one.codebooks), f"{path} is stored in 8 bits"
        assert packed[path].scheme == one.scheme and torch.equal(packed[path].dequantize(), one.dequantize())
    ours = logits(load_network(resolve("run/packed"), torch.float32))
    assert relative_rms(logits(AutoModelForCausalLM.from_pretrained("run/packed", dtype=torch.float32)), ours) < 1e-5
    assert told("eval-ppl", "run")["perplexity"] > 1
    assert told("generate", "run", "--prompt", "1 is", "--tokens", "4")


@pytest.mark.slow
def test_the_format_of_the_package_aqlm_has_the_same_weights_with_codebooks_in_16_bits(in_8_bits: None) -> None:
    told("quantize", *FLAGS[:4], "--out", "run")
    described = json.loads(Path("run/packed/config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "aqlm_native", "which alone keeps 8 bits"
    ours = logits(load_network(resolve("run/packed"), torch.float32))
    told("pack", "run", "--format", "transformers", "--overwrite")
    packed = load_file("run/packed/model.safetensors")
    for path, one in matrices("quantized").items():
        assert torch.equal(packed[f"{path}.codebooks"].squeeze(2).float(), one.codebooks)
    assert relative_rms(logits(load_network(resolve("run/packed"), torch.float32)), ours) < 1e-6


def test_an_allocation_may_choose_them(in_8_bits: None) -> None:
    target = "--target-size", "57500", "--among", "1x4g8,2x4g8,2x4g8c8"
    planned = told("plan", *FLAGS[:2], *target)
    assert "2x4g8c8" in planned["plan"]["scheme"]
