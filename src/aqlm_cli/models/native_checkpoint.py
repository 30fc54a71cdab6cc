"""The matrices of a native checkpoint, read without transformers, and the network of its dequantized weights."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from aqlm_cli.errors import ModelError
from aqlm_cli.models.blocks import replace_module
from aqlm_cli.models.loading import load_config, load_without, without_weights
from aqlm_cli.models.source import ModelSource, model_config, tensor_index
from aqlm_kernels import KernelError, Matrix
from aqlm_kernels.native import NativeLayer, embedding_scale, native_layers, read_matrix, tied_heads


def described_layers(source: ModelSource) -> dict[str, NativeLayer]:
    """The quantized layers by path, as config.json describes them; ModelError where it is malformed."""
    try:
        return native_layers(model_config(source)["quantization_config"])
    except KernelError as error:
        raise ModelError(f"{source.name} cannot be loaded: {error}") from error


def native_matrices(source: ModelSource) -> dict[str, Matrix]:
    """The matrix of every quantized layer, by path; ModelError where the tensors of one do not give it."""
    layers, stored = described_layers(source), tensor_index(source.directory)
    names: dict[str, dict[str, str]] = {path: {} for path in layers}
    for name in stored:
        path, _, last = name.rpartition(".")
        if path in names and last != "bias":
            names[path][last] = name
    try:
        return {
            path: read_matrix(path, layer, {last: stored[name].read(name) for last, name in names[path].items()})
            for path, layer in layers.items()
        }
    except KernelError as error:
        raise ModelError(f"{source.name} cannot be loaded: {error}") from error


def load_dense(source: ModelSource, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model with ordinary layers of dequantized weights in place of its quantized ones, to compare with."""
    matrices, stored = native_matrices(source), tensor_index(source.directory)
    skeleton = without_weights(load_config(source), source.trust_remote_code)
    heads = {path: tied_heads(skeleton.all_tied_weights_keys, path) for path in matrices}
    network = load_without(source, [*matrices, *(head for paths in heads.values() for head in paths)], dtype)
    for path, matrix in matrices.items():
        weight, module = matrix.dequantize(dtype), skeleton.get_submodule(path)
        if isinstance(module, nn.Embedding):
            rows = weight * (embedding_scale(module) or 1)
            replace_module(network, path, nn.Embedding.from_pretrained(rows, padding_idx=module.padding_idx))
        for linear in heads[path] if isinstance(module, nn.Embedding) else [path]:
            name = f"{linear}.bias"
            bias = stored[name].read(name).to(dtype) if name in stored else None
            replace_module(network, linear, _linear(weight, bias))
    return network


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer.eval()
