"""Tiny random models with experts of every form that one parameter may have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.commands import run
from helpers.tiny_models import SHAPE
from torch import nn

from aqlm_cli.models import load_network, resolve
from aqlm_cli.quantization import block_inputs
from aqlm_cli.runs.artifact import open_artifact
from aqlm_cli.spec.plan import Plan

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {**SHAPE, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "olmoe": {**SHAPE, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {**SHAPE, "intermediate_size": 32, "num_local_experts": 4},
    # transposed and interleaved, with biases
    "gpt_oss": {**SHAPE, "head_dim": 16, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""transformers' name of each family and what its configuration differs in from the default."""


def save(family: str, directory: Path, **settings: Any) -> Path:
    """Write a model of the family with its tokenizer to `directory`, in float32."""
    return tiny_models.save(family, directory, **{**FAMILIES[family], **settings})


def network_of(family: str, directory: Path, **settings: Any) -> nn.Module:
    return load_network(resolve(str(save(family, directory, **settings))), torch.float32)


# --------------------------------------------------------------------------------------------------------------- runs

RUN_FILE = """
model: tiny
threads: 1
calibrate: {data: "notes.txt:10", sequence_length: 32, statistics_sequences: 2}
quantize:
  statistics_sequences: 8
  scheme: 2x4g8
  aqlm: {rounds: 1, ldlq_rounds: 1, kmeans_iterations: 1}
  fit: {epochs: 1, sequences: 4, held_out: 2}
pack: {format: dense}
eval_ppl: {data: [notes.txt], sequence_length: 32}
finetune: {steps: 2, batch: 2, micro_batch: 2, sequence_length: 16, held_out: 2, evaluate_every: 2, save_every: 2}
"""


def work_in(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `directory` the working directory, with a run file and text; matmuls are in float32 on every machine."""
    monkeypatch.chdir(directory)
    Path("run.yaml").write_text(RUN_FILE)
    Path("notes.txt").write_text("".join(f"{number} times {number} is {number**2}. " for number in range(60)))
    monkeypatch.setattr(block_inputs, "compute_dtype", lambda device: torch.float32)


def model_of(family: str, **settings: Any) -> nn.Module:
    """The network of the base model, which lies in `tiny`."""
    return network_of(family, Path("tiny"), **settings)


def quantize(*arguments: str) -> dict[str, Any]:
    result = run("quantize", "--config", "run.yaml", "--out", "run", "--json", *arguments)
    assert result.exit_code == 0, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def planned() -> Plan:
    return Plan.from_json(open_artifact(Path("run/quantized"), "quantized").manifest.results["plan"])
