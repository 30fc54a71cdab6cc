"""Models with random weights, by name of their shape: to measure the speed of a scheme before any download."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import nn

from aqlm_cli.errors import UsageError
from aqlm_cli.models.blocks import find_blocks, linears, replace_module
from aqlm_cli.models.loading import without_weights
from aqlm_cli.spec.schemes import Scheme
from aqlm_kernels import AdditiveLinear, AdditiveMatrix

SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    # hidden, intermediate, blocks, heads, key heads, vocabulary, tied embeddings
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256, True),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256, False),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000, False),
    "mistral-7b": (4096, 14336, 32, 32, 8, 32768, False),
}


def empty_network(shape: str) -> transformers.PreTrainedModel:
    """A Llama of the shape without weights. Raises UsageError for an unknown shape."""
    return without_weights(_config(shape))


def random_network(shape: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A Llama of the shape with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(_config(shape), dtype=dtype)
    return _ready(network)


def random_packed_network(shape: str, scheme: Scheme) -> transformers.PreTrainedModel:
    """A Llama of the shape with random codes in the linear layers of its blocks; float32 elsewhere."""
    network = empty_network(shape)
    draw = torch.Generator().manual_seed(0)
    blocks = find_blocks(network)
    for prefix, block in zip(blocks.paths, blocks.modules, strict=True):
        for path, layer in linears(block, prefix).items():
            replace_module(network, path, _random_layer(layer, scheme, draw))
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                values = (0.02 * torch.randn(parameter.shape, generator=draw)).half().float()
                setattr(module, name, nn.Parameter(values if parameter.ndim > 1 else torch.ones(parameter.shape)))
    network.tie_weights()
    rotary: Any = network.model.rotary_emb
    network.model.rotary_emb = type(rotary)(network.config)  # its angles are buffers, which do not exist yet
    return _ready(network)


def _random_layer(layer: nn.Linear, scheme: Scheme, draw: torch.Generator) -> AdditiveLinear:
    assert scheme.codebook_shape is not None
    num_codebooks, size, group_size = scheme.codebook_shape
    shape = (layer.out_features, layer.in_features // group_size, num_codebooks)
    codes = torch.randint(0, size, shape, generator=draw, dtype=torch.uint8 if size <= 256 else torch.int32)
    codebooks = torch.randn(num_codebooks, size, group_size, generator=draw)
    scales = torch.full((layer.out_features,), 0.02 / math.sqrt(num_codebooks))
    layouts = scheme.stored_layouts(layer.out_features, layer.in_features)
    bits = {name: torch.tensor(one.values - 1) for name, one in layouts.items() if one.values and not one.shape}
    tensors = {"codes": codes, "codebooks": codebooks, "scales": scales, **bits}
    return AdditiveLinear(AdditiveMatrix.from_tensors(tensors))


def _ready(network: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    network.eval()
    network.requires_grad_(False)
    return network


def _config(shape: str) -> Any:
    if shape not in SHAPES:
        raise UsageError(f"unknown shape {shape}; choose one of {', '.join(SHAPES)}")
    hidden, intermediate, blocks, heads, key_heads, vocabulary, tied = SHAPES[shape]
    return transformers.AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )
