"""Tiny random models of many families, saved as ordinary Hugging Face directories with a tokenizer that works.

Each has two or three blocks of 64 features and a vocabulary of single bytes, so that it is made and run in well under
a second.  Biases and norms are made random too: a bias that is zero hides the mistake of dropping it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from aqlm_cli.models.blocks import find_blocks, linears

WINDOW = 16
"""Tokens that sliding attention sees: shorter than the texts of the tests, or nothing would slide."""

SHAPE: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": SHAPE,
    "qwen2": SHAPE,
    "qwen3": {**SHAPE, "head_dim": 16},
    "mistral": {**SHAPE, "sliding_window": WINDOW},
    "gemma2": {**SHAPE, "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        **SHAPE,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": SHAPE,
    "gpt_neox": SHAPE,
    "opt": {**SHAPE, "ffn_dim": 128, "word_embed_proj_dim": 64},
}
"""transformers' name of each family and what its configuration differs in from the default."""

WITH_EXPERTS: Mapping[str, Mapping[str, Any]] = {"mixtral": {**SHAPE, "num_local_experts": 4}}
"""Families whose experts are one tensor in the network, and one each in the files."""


def save(family: str, directory: Path, **settings: Any) -> Path:
    """Write a model of the family with its tokenizer to `directory`, in float32; `settings` go into its config."""
    tokenizer = byte_tokenizer()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = AutoConfig.for_model(
        family, **{**{**FAMILIES, **WITH_EXPERTS}.get(family, {}), "vocab_size": len(tokenizer), **special, **settings}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config)
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and no merges: any text has tokens, and decoding gives it back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "<bos>", "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    return fast


def token_ids(windows: int = 2, length: int = 40) -> torch.Tensor:
    """Random ids `[windows, length]` of single bytes, the same at every call."""
    return torch.randint(0, 256, (windows, length), generator=torch.Generator().manual_seed(0))


def save_additive(original: Path, directory: Path, **quantization: Any) -> dict[str, torch.Tensor]:
    """A 2x8g8 AQLM checkpoint with the skeleton of `original` and random codes; returns the weights it stands for.

    Written by hand from the format's description, so that it can judge readers.  `quantization` adds to, or takes the
    place of, keys of the config's `quantization_config`.
    """
    network = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float16)
    tied = {"lm_head.weight"} if network.config.tie_word_embeddings else set()
    state = {name: tensor for name, tensor in network.state_dict().items() if name not in tied}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    blocks = find_blocks(network)
    for prefix, block in zip(blocks.paths, blocks.modules, strict=True):
        for path, linear in linears(block, prefix).items():
            rows, columns = linear.weight.shape
            codes = torch.randint(-128, 128, (rows, columns // 8, 2), generator=generator).to(torch.int8)
            codebooks = (0.1 * torch.randn(2, 256, 1, 8, generator=generator)).half()
            scales = (0.5 + torch.rand(rows, 1, 1, 1, generator=generator)).half()
            entries = [codebooks[m, codes[..., m].long() % 256, 0].float() for m in range(2)]  # [rows, groups, 8] each
            weights[path] = sum(entries).flatten(1) * scales.float().flatten()[:, None]
            del state[f"{path}.weight"]
            state |= {f"{path}.codes": codes, f"{path}.codebooks": codebooks, f"{path}.scales": scales}
    shutil.copytree(original, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["dtype"] = "float16"
    config["quantization_config"] = {
        "quant_method": "aqlm",
        "num_codebooks": 2,
        "nbits_per_codebook": 8,
        "in_group_size": 8,
        "out_group_size": 1,
        "linear_weights_not_to_quantize": ["lm_head.weight", "lm_head"],
        **quantization,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return weights
