"""Tiny random Llamas whose layers have different schemes, in memory and as checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from helpers import tiny_models
from safetensors.torch import save_file
from torch import Tensor

from aqlm_cli.models import load_network, resolve
from aqlm_cli.models.blocks import replace_module
from aqlm_cli.quantization.methods import rtn
from aqlm_cli.spec.schemes import RefinedScheme, UniformScheme, parse_scheme
from aqlm_kernels import AdditiveMatrix, CompressedEmbedding, RefinedMatrix

MIXES: dict[str, dict[str, str]] = {
    "every layer another": {
        "q_proj": "1x8g8",
        "k_proj": "2x8g8",
        "v_proj": "3x8g8",
        "o_proj": "4x8g8",
        "gate_proj": "3x8g16",
        "up_proj": "2x6g4",
        "down_proj": "5x8g8",
    },
    "one of a stack another": {"layers.1.self_attn.k_proj": "1x8g8", "layers.0.mlp.gate_proj": "3x8g8", "": "2x8g8"},
    "dense layers": {"layers.0": "2x8g8", "layers.1.self_attn.v_proj": "2x8g8", "layers.1.mlp.down_proj": "1x8g8"},
    "uniform layers": {
        "q_proj": "int4g64",
        "k_proj": "int4g64",
        "v_proj": "2x8g8",
        "o_proj": "int8g32",
        "mlp": "int3g16",
    },
    "uniform alone": {"embed_tokens": "int6g32", "lm_head": "int4g32", "": "int8g64"},
    "a uniform table": {"embed_tokens": "int4g32", "": "2x8g8"},
    "a quantized head": {"lm_head": "4x8g8", "": "2x8g8"},
    "quantized embeddings": {"embed_tokens": "4x8g8", "": "2x8g8"},
    "embeddings of long codes": {"embed_tokens": "1x10g8", "": "2x8g8"},
    "both, of two schemes": {"embed_tokens": "3x8g16", "lm_head": "2x8g8", "": "2x8g8"},
    "the head alone": {"lm_head": "4x8g8"},
    "a refined table": {"embed_tokens": "3x8g8+int4g32r40", "": "2x8g8"},
    "a refined uniform head": {"lm_head": "int3g32+int4g64r7", "": "3x8g8"},
}
"""Schemes by a part of the paths of their layers: the first that fits, and no other layer is quantized.

The empty one fits every layer of the blocks.
"""


def network(mix: dict[str, str], directory: Path, **changes: Any) -> Any:
    """A Llama with the schemes of the mix, saved without them in `directory`; `changes` go into its config."""
    directory = tiny_models.save("llama", directory / "model", **changes)
    network = load_network(resolve(str(directory)), torch.float32)
    for path, module in list(network.named_modules()):
        if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) or scheme_of(path, mix) is None:
            continue
        layer = quantized(module.weight, scheme_of(path, mix), getattr(module, "bias", None))
        table = isinstance(module, torch.nn.Embedding)
        replace_module(network, path, CompressedEmbedding(layer) if table else layer)
        if table and network.config.tie_word_embeddings:
            network.lm_head = layer
    return network.half().float().requires_grad_(False)


def scheme_of(path: str, mix: dict[str, str]) -> str | None:
    table = path.endswith(("embed_tokens", "lm_head"))
    return next((word for key, word in mix.items() if key in path and (key or not table)), None)


def quantized(weight: Tensor, word: str, bias: Tensor | None) -> Any:
    """Random codes, in the size of the weights."""
    scheme, draw = parse_scheme(word), torch.Generator().manual_seed(len(weight))
    bias = None if bias is None else bias.detach()
    if isinstance(scheme, RefinedScheme):
        index = torch.randperm(len(weight), generator=draw)[: scheme.rows].sort().values.int()
        base = quantized(weight, str(scheme.base), bias)
        patch = quantized(0.2 * weight[index], str(scheme.patch), None)
        return RefinedMatrix(base.matrix(), index, patch.matrix()).module(bias)
    if isinstance(scheme, UniformScheme):
        return rtn.quantize(weight.detach(), None, scheme, draw, None).module(bias)
    assert scheme.codebook_shape is not None
    num_codebooks, entries, group_size = scheme.codebook_shape
    shape = (len(weight), weight.shape[1] // group_size, num_codebooks)
    codes = torch.randint(0, entries, shape, generator=draw)
    codebooks = 0.1 * torch.randn(scheme.codebook_shape, generator=draw).half().float()
    scales = (0.5 + torch.rand(len(weight), generator=draw)).half().float()
    return AdditiveMatrix(codes, codebooks, scales).module(bias)


def save(mixed: Any, tmp_path: Path) -> Path:
    """An AQLM checkpoint of the network, with each layer's own codebooks."""
    directory, tied = tmp_path / "packed", mixed.config.tie_word_embeddings
    shutil.copytree(tmp_path / "model", directory, ignore=shutil.ignore_patterns("*.safetensors"))
    state = {name.replace(".table.", "."): tensor for name, tensor in mixed.state_dict().items()}
    kept = {name: tensor for name, tensor in state.items() if not (tied and name.startswith("lm_head."))}
    stored = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in kept.items()}
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
