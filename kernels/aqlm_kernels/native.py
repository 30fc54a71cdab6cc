"""Native checkpoints: matrices of every kind, each at the bits of its scheme, read into a network and written from it.

config.json describes the quantized layers by the paths of their modules,

    "quantization_config": {
      "quant_method": "aqlm_native", "version": 1,
      "layers": {"model.layers.0.mlp.up_proj": {"scheme": "2x8g8", "kind": "additive", "duty": "linear"}, ...}
    }

and the files hold the tensors of `Matrix.packed_tensors` under `model.layers.0.mlp.up_proj.` where a weight would be.
The duty `table` is a tied matrix, at the path of the embedding: the head has no tensor of its own, and its module is
the embedding's table. The duty `expert` is one matrix of a parameter of fused experts, at `EXPERTS.INDEX.NAME`; then
every matrix and bias of these experts is stored by itself, under the names that `SingleExperts` gives them.

Nothing here knows transformers. hf_quantizer.py calls these functions while transformers loads and saves a model:
`make_room` before the tensors are read, `fill` after, `packed_state` for a file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_kernels.embedding import CompressedEmbedding, embedding_scale
from aqlm_kernels.errors import KernelError
from aqlm_kernels.experts import SingleExperts, is_fused
from aqlm_kernels.matrices.balance import to_float16
from aqlm_kernels.matrices.kinds import MATRIX_KINDS, quantized_layers
from aqlm_kernels.matrices.matrix import Matrix

NATIVE = "aqlm_native"
"""`quant_method` of such a checkpoint."""

VERSION = 1

LINEARS = ("linear", "head")
EMBEDDINGS = ("embedding", "table")
EXPERT = "expert"
DUTIES = (*LINEARS, *EMBEDDINGS, EXPERT)
"""Uses of a matrix in the network; a table is looked up in and multiplied by."""


@dataclass(frozen=True)
class NativeLayer:
    """Description of one matrix: the word of its scheme, its kind, one of MATRIX_KINDS, and its duty, one of DUTIES."""

    scheme: str
    kind: str
    duty: str


def native_config(layers: Mapping[str, NativeLayer]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint with these layers."""
    return {
        "quant_method": NATIVE,
        "version": VERSION,
        "layers": {path: asdict(layer) for path, layer in layers.items()},
    }


def native_layers(config: Mapping[str, Any]) -> dict[str, NativeLayer]:
    """The layers that a `quantization_config` describes; KernelError where it is malformed or of another version."""
    version, entries = config.get("version"), config.get("layers")
    if version != VERSION:
        raise KernelError(
            f"the checkpoint has version {version!r} of the format {NATIVE}, this is {VERSION}; update aqlm-cli"
        )
    if not isinstance(entries, Mapping) or not entries:
        raise KernelError("its quantization_config lists no layers")
    layers: dict[str, NativeLayer] = {}
    for path, entry in entries.items():
        keys = ("scheme", "kind", "duty")
        if not isinstance(entry, Mapping) or not all(isinstance(entry.get(key), str) for key in keys):
            raise KernelError(f"its quantization_config has no scheme, kind and duty for {path}")
        layer = NativeLayer(*(entry[key] for key in keys))
        if layer.kind not in MATRIX_KINDS or layer.duty not in DUTIES:
            raise KernelError(f"{path} is of the kind {layer.kind!r} with the duty {layer.duty!r}; update aqlm-cli")
        layers[path] = layer
    return layers


def read_matrix(path: str, layer: NativeLayer, tensors: Mapping[str, Tensor]) -> Matrix:
    """The matrix of the layer at `path` from its tensors in the files; KernelError where they do not give one."""
    try:
        return MATRIX_KINDS[layer.kind].from_packed(tensors, layer.scheme)
    except KeyError as error:
        raise KernelError(f"{path} lacks the tensor {error.args[0]}") from error
    except KernelError as error:
        raise KernelError(f"{path}: {error}") from error


# ----------------------------------------------------------------------------------------------------------- reading


class Room(nn.Module):
    """Stand-in for the layer at `path` while its tensors are read: buffers for them, and the bias of the layer."""

    bias: nn.Parameter | None

    def __init__(
        self,
        path: str,
        layer: NativeLayer,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        bias: nn.Parameter | None = None,
    ) -> None:
        """`shape` is that of the weight, `tensors` are empty ones by the last parts of their names in the files."""
        super().__init__()
        self.path, self.layer, self.shape = path, layer, shape
        self._names = sorted(tensors.keys() - {"bias"})
        for name in self._names:
            self.register_buffer(name, tensors[name])
        self.bias = bias

    def matrix(self) -> Matrix:
        """The matrix that has been read; KernelError where it is none, or of another shape than the weight."""
        matrix = read_matrix(self.path, self.layer, {name: getattr(self, name) for name in self._names})
        found = (matrix.out_features, matrix.in_features)
        if found != self.shape:
            raise KernelError(f"{self.path} has a matrix {found} in the files, the model has {self.shape}")
        return matrix


class EmbeddingRoom(Room):
    """Room for an embedding. `heads` are the paths of linear layers that multiply by the same matrix."""

    def __init__(
        self,
        path: str,
        layer: NativeLayer,
        embedding: nn.Embedding,
        tensors: Mapping[str, Tensor],
        heads: Collection[str],
    ) -> None:
        super().__init__(path, layer, (embedding.num_embeddings, embedding.embedding_dim), tensors)
        scale = embedding_scale(embedding)
        if scale is None:
            raise KernelError(f"{path} is a {type(embedding).__name__}, which does more than look rows up")
        self.padding_idx, self.scale, self.heads = embedding.padding_idx, scale, tuple(heads)


class HeadRoom(nn.Module):
    """Stand-in for a tied head, which has no tensor of its own but perhaps a bias."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias


def make_room(
    network: nn.Module,
    layers: Mapping[str, NativeLayer],
    tensors: Mapping[str, Mapping[str, Tensor]],
    tied: Mapping[str, str],
) -> None:
    """Replace, in place, every layer of a network by a Room for its tensors; the network then lists their names.

    `tensors` are empty, by path and last part of the name; `tied` has pairs of names of weights that are one tensor.
    Raises KernelError where the network has no such layer.
    """
    for path, layer in layers.items():
        room: nn.Module
        if layer.duty in EMBEDDINGS:
            embedding = _submodule(network, path, nn.Embedding)
            heads = tied_heads(tied, path) if layer.duty == "table" else []
            room = EmbeddingRoom(path, layer, embedding, tensors.get(path, {}), heads)
            for head in heads:
                network.set_submodule(head, HeadRoom(_submodule(network, head, nn.Linear).bias))
        else:
            if layer.duty == EXPERT:
                _take_experts_apart(network, path)
            linear = _submodule(network, path, nn.Linear)
            room = Room(path, layer, (linear.out_features, linear.in_features), tensors.get(path, {}), linear.bias)
        network.set_submodule(path, room)


def fill(network: nn.Module, dtype: torch.dtype) -> None:
    """Replace, in place, every Room by the quantized layer of what has been read; embeddings have the type `dtype`.

    The layers are frozen, in evaluation mode. Raises KernelError for tensors that give no matrix of the right shape.
    """
    for path, room in list(network.named_modules()):
        if isinstance(room, EmbeddingRoom):
            biases: list[Any] = [network.get_submodule(head).bias for head in room.heads]
            table = _frozen(room.matrix(), next((bias for bias in biases if bias is not None), None))
            embedding = CompressedEmbedding(table, room.padding_idx, room.scale, dtype)
            network.set_submodule(path, embedding.eval())
            for head in room.heads:
                network.set_submodule(head, table)
        elif isinstance(room, Room):
            network.set_submodule(path, _frozen(room.matrix(), room.bias))


def tied_heads(tied: Mapping[str, str], path: str) -> list[str]:
    """Paths of the layers that share the weight of the embedding at `path`."""
    weight = f"{path}.weight"
    partners = {name if other == weight else other for name, other in tied.items() if weight in (name, other)}
    return sorted(name.removesuffix(".weight") for name in partners)


def _take_experts_apart(network: nn.Module, path: str) -> None:
    """Give the matrix of one expert at `path` a layer of its own, and so all that are fused with it."""
    owner = path.rpartition(".")[0].rpartition(".")[0]
    experts = _submodule(network, owner, nn.Module)
    if is_fused(experts):
        network.set_submodule(owner, SingleExperts(experts))


def _submodule(network: nn.Module, path: str, kind: type[nn.Module]) -> Any:
    try:
        module = network.get_submodule(path)
    except AttributeError:
        raise KernelError(f"the checkpoint has a matrix for {path}, and the model no such module") from None
    if not isinstance(module, kind):
        raise KernelError(f"the checkpoint has a matrix for {path}, where the model has a {type(module).__name__}")
    return module


def _frozen(matrix: Matrix, bias: Tensor | None) -> nn.Module:
    return matrix.module(None if bias is None else bias.detach()).eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------- writing


def packed_state(network: nn.Module) -> dict[str, Tensor]:
    """Tensors of a native checkpoint of a network, by name: quantized layers packed, each once, all else as it is.

    Raises KernelError for values that float16 cannot hold.
    """
    layers = quantized_layers(network)
    inside = {id(module) for layer in layers.values() for module in layer.modules()}  # type: ignore[attr-defined]
    state: dict[str, Tensor] = {}
    for prefix, module in network.named_modules():
        if id(module) in inside:
            continue
        buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None:
                state[f"{prefix}.{name}" if prefix else name] = tensor.detach()
    everywhere = list(network.named_modules(remove_duplicate=False))
    for path, layer in layers.items():
        state |= {f"{path}.{name}": part for name, part in layer.matrix().balanced().packed_tensors().items()}
        linear: Any = layer.table if isinstance(layer, CompressedEmbedding) else layer
        if getattr(linear, "bias", None) is not None:  # of a table, that of the tied head
            own = [other for other, module in everywhere if module is linear and not other.startswith(f"{path}.")]
            state |= {f"{other}.bias": to_float16(linear.bias, "bias") for other in own}
    return state
