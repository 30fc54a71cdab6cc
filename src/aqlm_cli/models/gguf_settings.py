"""Settings of a GGUF that transformers does not read: biases, head size, named chat templates."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from aqlm_cli.models.gguf_header import GgufTensor

BIASES: Mapping[str, str] = {
    "attention_bias": r"blk\.\d+\.attn_(q|k|v|output)\.bias",
    "mlp_bias": r"blk\.\d+\.ffn_(gate|up|down)\.bias",
}
"""Switches of a config, and the tensors that a model has if they are on."""


BLOCKS_OF_27B: Mapping[str, int] = {"gemma2": 46, "gemma3_text": 62}
"""The one size whose attention is scaled by the width: no file says so; llama.cpp has the same rule."""


def set_shapes(settings: Mapping[str, Any], tensors: Sequence[GgufTensor], config: PreTrainedConfig) -> None:
    """Set biases by the tensors of the file, and head size and attention scale by its settings.

    transformers takes the width divided by the count of heads as head size, and one model's attention scale for all.
    """
    own = config.to_dict()
    for switch, name in BIASES.items():
        if own.get(switch) is False and any(re.fullmatch(name, tensor.name) for tensor in tensors):
            setattr(config, switch, True)
    length = settings.get("attention.key_length")
    if "head_dim" in own and "global_head_dim" not in own and isinstance(length, int):
        config.head_dim = length
    if config.model_type in BLOCKS_OF_27B:
        by_width = config.num_hidden_layers == BLOCKS_OF_27B[config.model_type]
        scalar = config.hidden_size // config.num_attention_heads if by_width else config.head_dim
        config.query_pre_attn_scalar = scalar


def zero_biases(missing: Collection[str], stored: Sequence[GgufTensor]) -> set[str]:
    """Biases that no layer of the file has, such as that of o_proj where only q, k and v have one."""
    if any(re.fullmatch(r"blk\.\d+\.attn_output\.bias", tensor.name) for tensor in stored):
        return set()
    return {name for name in missing if name.endswith(".o_proj.bias")}


def chat_templates(fields: Mapping[str, Any], default: Any) -> Any:
    """The named templates of a file and the default one, in a tokenizer's form; only the default if none is named."""
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    if not named:
        return default
    return {**({"default": default} if isinstance(default, str) else {}), **named}
