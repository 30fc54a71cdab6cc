"""Tiny random models with experts of every form that one parameter may have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from helpers import tiny_models
from helpers.tiny_models import SHAPE
from torch import nn

from aqlm_cli.models import load_network, resolve

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
