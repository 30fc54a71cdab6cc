"""Families whose networks look into their modules while they are made or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helpers import tiny_models

STATES: Mapping[str, Any] = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16}
MULTIPLIED: Mapping[str, Any] = {
    **tiny_models.SHAPE,
    "head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "ssm_multipliers": [0.5, 1.0, 2.0, 0.25, 1.0],
}
SHARED: Mapping[str, Any] = {
    **tiny_models.SHAPE,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "layers_block_type": ["hybrid", "mamba", "hybrid", "hybrid"],
    "num_mem_blocks": 1,
    "adapter_rank": 8,
    "n_mamba_heads": 8,
    "mamba_d_state": 16,
    "mamba_ngroups": 1,
    "chunk_size": 16,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": tiny_models.SHAPE,
    "mamba2": {**tiny_models.SHAPE, **STATES},  # initializes a layer from the mixer that holds it
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},  # the same, with a tied head
    "nanochat": {**tiny_models.SHAPE, "head_dim": 16},
    "falcon_h1": MULTIPLIED,  # computes a buffer for each of its blocks
    "zamba2": SHARED,  # blocks that share their weights
}
