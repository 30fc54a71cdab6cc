"""The matrices of a native checkpoint, read without transformers, and the network of its dequantized weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from aqlm_cli.errors import ModelError
from aqlm_cli.models.blocks import replace_module
from aqlm_cli.models.experts import expert_place
from aqlm_cli.models.loading import load_config, load_without, without_weights
from aqlm_cli.models.source import ModelSource, model_config, tensor_index
from aqlm_kernels import KernelError, Matrix, SingleExperts, embedding_scale
from aqlm_kernels.native import EMBEDDINGS, NativeLayer, native_layers, read_matrix, tied_heads


def described_layers(source: ModelSource) -> dict[str, NativeLayer]:
    """The quantized layers by path, as config.json describes them; ModelError where it is malformed."""
    try:
        return native_layers(model_config(source)["quantization_config"])
    except KernelError as error:
        raise ModelError(f"{source.name} cannot be loaded: {error}") from error


def native_matrices(source: ModelSource) -> dict[str, Matrix]:
    """The matrix of every quantized layer, by path; ModelError where the tensors of one do not give it."""
    stored = tensor_index(source.directory)
    return {path: matrix for path, matrix, _ in _read(source, stored, lambda name: stored[name].read(name))}


def take_native_layers(source: ModelSource, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The quantized linear layers by path, of their tensors among those of the files, which are then removed."""
    return {
        path: matrix.module(tensors.pop(bias, None)).requires_grad_(False)
        for path, matrix, bias in _read(source, tensors, tensors.pop)
    }


def _read(
    source: ModelSource, names: Collection[str], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Matrix, str]]:
    """Path, matrix and name of the bias of every quantized layer; `names` are those of the tensors in the files."""
    layers = described_layers(source)
    own: dict[str, dict[str, str]] = {path: {} for path in layers}
    for name in names:
        path, _, last = name.rpartition(".")
        if path in own and last != "bias":
            own[path][last] = name
    for path, layer in layers.items():
        try:
            matrix = read_matrix(path, layer, {last: read(name) for last, name in own[path].items()})
        except KernelError as error:
            raise ModelError(f"{source.name} cannot be loaded: {error}") from error
        yield path, matrix, f"{path}.bias"


def load_dense(source: ModelSource, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model with ordinary layers of dequantized weights in place of its quantized ones, to compare with."""
    from aqlm_cli.models.skip_layers import show

    layers, matrices = described_layers(source), native_matrices(source)
    stored = tensor_index(source.directory)
    skeleton = without_weights(load_config(source), source.trust_remote_code)
    tied = skeleton.all_tied_weights_keys
    heads = {path: tied_heads(tied, path) if layer.duty == "table" else [] for path, layer in layers.items()}
    fused = {path.rsplit(".", 2)[0] for path in matrices if expert_place(skeleton, path) is not None}
    left_out = {path for path in matrices if path.rsplit(".", 2)[0] not in fused}
    left_out |= fused | {head for path in heads for head in heads[path]}
    kept = [f"{path}.{name}" for path in fused for name, _ in skeleton.get_submodule(path).named_children()]
    network = load_without(source, sorted(left_out), dtype, kept=kept)
    for path in fused:
        experts = network.get_submodule(path)
        show(experts)
        replace_module(network, path, SingleExperts(experts).eval())

    def stored_values(name: str) -> Tensor | None:
        return stored[name].read(name).to(dtype) if name in stored else None

    for path, layer in layers.items():
        weight, linears = matrices[path].dequantize(dtype), [path]
        if layer.duty in EMBEDDINGS:
            embedding: Any = skeleton.get_submodule(path)
            rows, linears = weight * (embedding_scale(embedding) or 1), heads[path]
            replace_module(network, path, nn.Embedding.from_pretrained(rows, padding_idx=embedding.padding_idx))
        for linear in linears:
            replace_module(network, linear, _linear(weight, stored_values(f"{linear}.bias")))
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and module.weight.is_meta:  # of an expert in 16 bits
            kept_weight = stored_values(f"{path}.weight")
            assert kept_weight is not None
            replace_module(network, path, _linear(kept_weight, stored_values(f"{path}.bias")))
    return network


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer.eval()
