"""A tiny random model of every family that transformers takes for a causal language model.

The configuration of a family is its own default one with small numbers in the fields that have such names, sub-configs
included; `SPECIAL` holds what that rule cannot know.  Widths are multiples of 8, so that groups of 8 divide them.  A
list of kinds of layers is cut to a few blocks in which each kind occurs.  Every parameter is made random, for a bias or
a gate that is zero hides the mistake of dropping it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers.tiny_models import WINDOW, byte_tokenizer
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

UNBUILT: Mapping[str, str] = {
    "gemma3n": "its tower of images needs the package timm; its text alone is gemma3n_text",
    "gemma4_assistant": "drafts for a larger model, which hands it its keys and values",
    "gemma4_unified_assistant": "drafts for a larger model, which hands it its keys and values",
    "musicgen": "writes codes of sound, and AutoModelForCausalLM builds no network from its configuration",
    "musicgen_melody": "writes codes of sound, and AutoModelForCausalLM builds no network from its configuration",
}
"""Family -> why there is no tiny model of it."""

ALL = tuple(family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family not in UNBUILT)

BOS, EOS, VOCABULARY = 256, 257, 258

HIDDEN, INNER, HEADS, GROUPED, HEAD = 64, 128, 4, 2, 16

SMALL: Mapping[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim", "word_embed_proj_dim"], HIDDEN),
    **dict.fromkeys(["embedding_size", "input_embedding_size", "output_embedding_size", "lru_width"], HIDDEN),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "ffn_hidden_size", "dim_ff", "dff", "feed_forward_size"], INNER),
    **dict.fromkeys(["dense_intermediate_size", "intermediate_size_mlp", "d_inner", "decoder_ffn_dim"], INNER),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 32),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"], 32),
    **dict.fromkeys(["shared_intermediate_size"], 32),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], HEADS),
    **dict.fromkeys(["decoder_attention_heads", "swa_num_attention_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"], GROUPED),
    **dict.fromkeys(["head_dim", "d_head", "dim_head", "kv_channels", "attention_head_dim", "swa_head_dim"], HEAD),
    **dict.fromkeys(["attention_head_size", "v_head_dim", "qk_nope_head_dim", "global_head_dim"], HEAD),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim"], 8),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank", "gated_norm_rank", "hc_lowrank"], 16),
    **dict.fromkeys(["adapter_rank", "laurel_rank"], 8),
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"], 2),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "zero_expert_num"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"], 256),
    **dict.fromkeys(["sliding_window", "window_size", "attention_window_size", "sliding_window_size"], WINDOW),
    **dict.fromkeys(["attention_chunk_size", "keep_window_size", "local_attention", "rel_extent"], WINDOW),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size", "block_size"], WINDOW),
    **dict.fromkeys(["state_size", "ssm_state_size", "mamba_d_state"], 16),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "n_mamba_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "mamba_headdim"], 16),
    **dict.fromkeys(["mamba_dt_rank", "time_step_rank"], 8),
    **dict.fromkeys(["mamba_d_ssm"], INNER),
    **dict.fromkeys(["linear_num_heads", "linear_num_key_heads"], GROUPED),
    **dict.fromkeys(["linear_num_value_heads", "index_n_heads"], HEADS),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_head_dim"], HEAD),
    **dict.fromkeys(["index_topk"], 8),
    **dict.fromkeys(["hidden_size_per_layer_input", "router_hidden_size"], 16),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["initializer_range", "init_std"], 0.1),
    "query_pre_attn_scalar": HEAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": BOS,  # never in the texts; where a family has none by default it gets none
    "is_decoder": True,
    "is_encoder_decoder": False,
}
"""Field of any configuration -> its small value."""

ALWAYS = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "is_decoder", "bos_token_id", "eos_token_id")
"""Fields that are set even where the default is None, which means a size that follows from others."""

DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth", "num_layers_per_stack"),
    *("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"),
)

OTHER_SENSES: Mapping[str, Any] = {"intermediate_size": 32, "mlp_dim": 32, "image_size": 16, "patch_size": 4}
"""What differs in a sub-config of images or sound: towers of one block, smaller than the blocks of text."""

GLOBAL = {"global_head_dim": HEAD}
SHARED = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"]}
ROBERTA = {"pad_token_id": 1, "max_position_embeddings": 258}

LATENT_SLIDING = {
    **{"swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS, "swa_q_lora_rank": 16},
    **{"swa_kv_lora_rank": 16, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": HEAD},
}
PER_LAYER = {
    "layer_types": ["linear_attention", "indexed_attention", "linear_attention", "indexed_attention"],
    "ple_layer_ids": [1, 3],
    "ngram_vocab_size_base": 50,
    "heads_per_ngram": 2,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "hc_count": 2,
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD},
    **{"indexer_budget": 8, "indexer_compress_ratio": 4},
}

SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "patcher_config": {"num_hidden_layers": 1},
        "encoder_config": {"hidden_size_global": HIDDEN, "num_hidden_layers": 1},
        "decoder_config": {"hidden_size_global": HIDDEN, "num_hidden_layers": 1},
    },
    "camembert": ROBERTA,
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "data2vec-text": ROBERTA,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": GROUPED, "clip_qkv": 8.0}},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": LATENT_SLIDING,
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN, "per_layer_config": {}},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN, "downsample_hidden_size": 8},
    },
    "dots3_note_text": LATENT_SLIDING,
    "emu3": {
        "vq_config": {
            "base_channels": 32,
            "channel_multiplier": [1],
            "codebook_size": 8,
            "embed_dim": 8,
            "hidden_size": 32,
            "num_res_blocks": 1,
            "latent_channels": 8,
            "z_channels": 8,
        },
        "vocabulary_map": {"<image>": BOS, "<|extra_200|>": BOS, "<|visual token 000000|>": 0},
    },
    "gemma3n_text": {**SHARED, "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0]},
    "gemma4": {"text_config": {**GLOBAL, **SHARED}},
    "gemma4_text": {**GLOBAL, **SHARED},
    "gemma4_unified": {"text_config": GLOBAL},
    "gemma4_unified_text": GLOBAL,
    "got_ocr2": {"vision_config": {"output_channels": 16}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling2_text": {"n_layers_per_attn_res_block": 2, "unpadded_vocab_size": VOCABULARY},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {
        "vision_config": {"projector_input_dim": HIDDEN, "projector_output_dim": HIDDEN, "vision_output_dim": HIDDEN}
    },
    "mamba2": {"num_heads": 8},
    "mllama": {
        "text_config": {"cross_attention_layers": [1], "num_hidden_layers": 3},
        "vision_config": {"num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 2 * HIDDEN},
    },
    "phi4_multimodal": {"audio_config": {"hidden_size": 32, "ext_pw_out_channel": 32, "nemo_conv_channels": 32}},
    "prophetnet": {"pad_token_id": 0, "num_decoder_attention_heads": HEADS, "num_encoder_attention_heads": HEADS},
    "qwen2": SLIDING,
    "qwen3": SLIDING,
    "qwen4_exp_text": PER_LAYER,
    "qwen4_exp": {"text_config": PER_LAYER},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 0,
    },
    "roberta": ROBERTA,
    "roc_bert": {
        **{"pronunciation_vocab_size": VOCABULARY, "pronunciation_embed_dim": HEAD},
        **{"shape_vocab_size": VOCABULARY, "shape_embed_dim": HEAD},
    },
    "roberta-prelayernorm": ROBERTA,
    "xlm": {"causal": True},
    "xlm-roberta": ROBERTA,
    "xlm-roberta-xl": ROBERTA,
    "xlnet": {"attn_type": "uni"},
    "xmod": {**ROBERTA, "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""Family -> fields that differ from the rule; those of a sub-config lie in a mapping under its name."""


def config_of(family: str) -> PreTrainedConfig:
    """The tiny configuration of a family."""
    return _shrunk(CONFIG_MAPPING[family], SPECIAL.get(family, {}))


def _shrunk(kind: type[PreTrainedConfig], special: Mapping[str, Any], tower: bool = False) -> PreTrainedConfig:
    default = kind()
    fields: dict[str, Any] = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    small = {**SMALL, **OTHER_SENSES} if tower else SMALL
    settings = {
        name: small[name] for name in fields.keys() & small.keys() if fields[name] is not None or name in ALWAYS
    }
    if fields.get("kv_lora_rank"):  # one latent for all heads, and part of each key is rotated
        settings |= {"num_key_value_heads": HEADS, "head_dim": small["qk_rope_head_dim"]}
    parts = {name: value for name, value in fields.items() if isinstance(value, PreTrainedConfig)}
    settings |= {
        name: _shrunk(type(value), special.get(name, {}), any(sense in name for sense in ("vision", "audio", "vq")))
        for name, value in parts.items()
    }
    lists = {name: special.get(name, value) for name, value in fields.items() if _is_pattern(name, value)}
    depth = 1 if tower else 4 if any(len(set(value)) > 1 for value in lists.values()) else 2
    depth = next((len(special[name]) for name in lists if name in special), depth)
    settings |= {name: depth for name in DEPTHS if name in fields}
    settings |= {name: _pattern(value, depth) for name, value in lists.items()}
    settings |= {name: value for name, value in special.items() if name not in parts}
    return kind(**settings)


def _is_pattern(name: str, value: Any) -> bool:
    kinds = name.endswith(("layer_types", "block_type", "block_types", "layers", "indexer_types"))
    return kinds and isinstance(value, (list, tuple)) and bool(value)


def _pattern(kinds: Sequence[Any], depth: int) -> list[Any]:
    """A list of so many blocks in which each kind occurs, in the order in which they first do."""
    unique = list(dict.fromkeys(kinds))
    return list(kinds) if len(kinds) == depth else [unique[index % len(unique)] for index in range(depth)]


def network_of(config: PreTrainedConfig) -> nn.Module:
    """A network of random numbers, the same at every call; of a model of several senses all of it."""
    whole = "text_config" in vars(config) and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = (AutoModelForImageTextToText if whole else AutoModelForCausalLM).from_config(config)
        for tensor in network.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                _randomise(tensor.data)
    return network.float().eval().requires_grad_(False)


def _randomise(tensor: Tensor) -> None:
    """Move vectors, and what begins at zero or one; what no initialisation has touched holds any numbers at all."""
    noise = 0.1 * torch.randn(tensor.shape)
    if not bool(tensor.isfinite().all()) or float(tensor.abs().max()) > 1e4:
        tensor.copy_(noise)
    elif tensor.ndim < 2 or float(tensor.float().std()) < 0.05:
        tensor += noise


def save(family: str, directory: Path) -> nn.Module:
    """Write the tiny model with its tokenizer to `directory`; the network that was written."""
    network = network_of(config_of(family))
    network.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return network
