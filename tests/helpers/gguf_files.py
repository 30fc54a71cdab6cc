"""Tiny GGUF files, written with the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from helpers import tiny_models
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from aqlm_cli.models import ModelSource, load_network

F32 = gguf.GGMLQuantizationType.F32
Q2_0 = 42
"""A type that gguf 0.19 does not know."""

WITHOUT_ROPE_KEYS: Mapping[str, Any] = {"rope.freq_base": 10000.0}


def write_gguf(
    original: Path,
    path: Path,
    kind: gguf.GGMLQuantizationType,
    architecture: str = "llama",
    settings: Mapping[str, Any] = WITHOUT_ROPE_KEYS,
    written: Callable[[str], bool] = lambda name: True,
    raw: Mapping[str, tuple[np.ndarray[Any, Any], int]] = {},
    **extra: Tensor,
) -> None:
    """The model of a directory: matrices of one kind, rows of q and k of a Llama in llama.cpp's rotary order.

    `settings` go below the architecture, but for those with a leading dot; `written` chooses among the names of tensors
    in the file; `raw` are bytes in the blocks of a type, `extra` further tensors, or others, under transformers' names.
    """
    config = json.loads((original / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, architecture)
    _add_settings(writer, config, architecture, settings)
    names = gguf.get_tensor_name_map(_architecture(architecture), config["num_hidden_layers"])
    for name, tensor in {**load_file(original / "model.safetensors"), **extra}.items():
        weight = tensor.float().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            groups = heads if "q_proj" in name else kv_heads
            weight = weight.reshape(groups, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        if architecture in ("gemma2", "gemma3") and "norm" in name:
            weight = weight + 1
        stem, _, last = name.rpartition(".")
        known = f"{names.get_name(stem)}.{last}" if names.get_name(stem) else name
        if not written(known) or known in raw:
            continue
        if weight.ndim == 2:
            writer.add_tensor(known, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(known, weight)
    for name, (data, code) in raw.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType(code))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_split(original: Path, directory: Path, count: int, name: str = "tiny", **settings: Any) -> list[Path]:
    """The same in `count` files; the first has no tensors, as `llama-gguf-split --no-tensor-first-split` leaves it."""
    paths = [directory / f"{name}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        split = {".split.no": number, ".split.count": count, ".split.tensors.count": 21, **settings}

        def here(tensor: str, number: int = number) -> bool:
            return number > 0 and sum(tensor.encode()) % (count - 1) == number - 1

        write_gguf(original, path, F32, settings={**WITHOUT_ROPE_KEYS, **split}, written=here)
    return paths


def _architecture(name: str) -> gguf.MODEL_ARCH:
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


def _add_settings(
    writer: gguf.GGUFWriter, config: Mapping[str, Any], architecture: str, settings: Mapping[str, Any]
) -> None:
    tokenizer = tiny_models.byte_tokenizer()
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_layer_norm_eps(config.get("norm_epsilon", 1e-5))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_license("mit")
    for key, value in settings.items():
        name = key[1:] if key.startswith(".") else f"{architecture}.{key}"
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if key in (".split.no", ".split.count"):
            writer.add_uint16(name, value)
        else:
            kinds[type(value)](name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "ĀĀ"])
    writer.add_token_types([1] * 256 + [3] * 2 + [1])
    writer.add_token_merges(["Ā Ā"])  # two bytes of zero: there must be a merge, and this one no text needs
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template(tokenizer.chat_template)


def llama3_factors(pairs: int, base: float, scaling: Mapping[str, float]) -> Tensor:
    """rope_freqs.weight [pairs] of a scaling: what a frequency is divided by, in float32 as the converter has it."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factor, length = scaling["factor"], scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi * base ** (torch.arange(pairs, dtype=torch.float32) / pairs)
    share = ((length / wavelengths - low) / (high - low)).clamp(0, 1)  # 1 keeps a frequency, 0 divides it by the factor
    return 1 / ((1 - share) / factor + share)


def save_halved(directory: Path, family: str = "llama", **settings: Any) -> Path:
    """A tiny model whose weights are numbers of float16, so that nothing is rounded on the way."""
    tiny_models.save(family, directory, vocab_size=259, **settings)
    halved = {name: tensor.half().float() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(halved, directory / "model.safetensors", {"format": "pt"})
    return directory


def logits(network: Any, length: int = 200) -> Tensor:
    """Of positions in which every pair has turned, and the scaled ones too little or too far if they are not scaled."""
    found: Tensor = network(tiny_models.token_ids(1, length)).logits
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def errors_of(original: Path, source: ModelSource, length: int = 200) -> float:
    """Of the converted model beside transformers' own forward of the original, in float32."""
    expected = logits(AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval(), length)
    return relative_error(logits(load_network(source, torch.float32), length), expected)
