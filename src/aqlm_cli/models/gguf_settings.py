"""What a GGUF says beside its weights and transformers does not ask it: biases, the size of a head, named templates."""

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
"""Switches of a config, and the tensors that are there where they are on."""


BLOCKS_OF_27B: Mapping[str, int] = {"gemma2": 46, "gemma3_text": 62}
"""Their one size whose attention is scaled by the width: no file says so, and llama.cpp goes by this, too."""


def set_shapes(settings: Mapping[str, Any], tensors: Sequence[GgufTensor], config: PreTrainedConfig) -> None:
    """Biases are told by their tensors; a head may have another size than the width by the count of heads.

    So may what attention is scaled by, which transformers leaves at the value of one model.
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
    """Biases that no layer of the file has: of the output, where a family has them of q, k and v alone."""
    if any(re.fullmatch(r"blk\.\d+\.attn_output\.bias", tensor.name) for tensor in stored):
        return set()
    return {name for name in missing if name.endswith(".o_proj.bias")}


def chat_templates(fields: Mapping[str, Any], default: Any) -> Any:
    """The named templates of a file with the default one, as a tokenizer has them; that alone where there are none."""
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    if not named:
        return default
    return {**({"default": default} if isinstance(default, str) else {}), **named}
