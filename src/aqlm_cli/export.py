"""What stands in a packed checkpoint for each tensor of the original model.

Every tensor keeps its name and becomes 16 bits wide; only the weights of quantized layers are replaced. An exporter
says by what: by the codes, codebooks and scales that the `aqlm` inference package reads, or by an ordinary weight, as
must be for a kind of matrix that package has no form for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from aqlm_cli.artifacts import Artifact
from aqlm_cli.checkpoint import Entry
from aqlm_cli.errors import ModelError, QuantizationError
from aqlm_cli.methods import MATRIX_KINDS, CompressedMatrix
from aqlm_cli.sources import StoredTensor
from aqlm_cli.storage import DTYPES, TensorLayout, load_tensors, read_metadata, read_tensor, tensor_names
from aqlm_kernels import AdditiveMatrix, to_checkpoint

# A matrix, and the 16-bit type of the weight it replaces -> tensors by the last part of their name.
Exporter: TypeAlias = Callable[[CompressedMatrix, torch.dtype], dict[str, Tensor]]


def as_codes(matrix: CompressedMatrix, dtype: torch.dtype) -> dict[str, Tensor]:
    """The form of the `aqlm` inference package: float16, whatever the model's type."""
    assert isinstance(matrix, AdditiveMatrix)
    return to_checkpoint(matrix)


def as_weight(matrix: CompressedMatrix, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": matrix.dequantize(dtype)}


EXPORTERS: Mapping[str, Mapping[str, Exporter]] = {
    "transformers": {"additive": as_codes, "uniform": as_weight},
    "dense": {"additive": as_weight, "uniform": as_weight},
}
"""Format -> kind of matrix -> how it is written."""


@dataclass(frozen=True)
class QuantizedLayer:
    """One matrix of a quantized model and how it will be exported."""

    path: str
    quantized: Artifact
    file: str
    kind: str
    export: Exporter

    def matrix(self) -> CompressedMatrix:
        with self.quantized.reading(self.file) as file:
            return MATRIX_KINDS[self.kind].from_tensors(load_tensors(file, prefix=f"{self.path}."))

    def exported(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {f"{self.path}.{name}": tensor for name, tensor in self.export(self.matrix(), dtype).items()}


def quantized_layers(quantized: Artifact, format: str) -> list[QuantizedLayer]:
    """Every quantized matrix, in the order of the blocks."""
    layers = []
    for name in block_files(quantized):
        with quantized.reading(name) as file:
            kinds = json.loads(read_metadata(file)["kinds"])
            layers += [
                QuantizedLayer(path, quantized, name, kind, EXPORTERS[format][kind]) for path, kind in kinds.items()
            ]
    return layers


def block_files(quantized: Artifact) -> list[str]:
    return [name for name in sorted(quantized.manifest.files) if name.startswith("block-")]


def plan_entries(
    original: Mapping[str, StoredTensor], quantized: Artifact, layers: Sequence[QuantizedLayer]
) -> dict[str, Entry]:
    """The whole checkpoint by name. Matrices are exported once to learn their shapes, one at a time in memory."""
    by_path = {layer.path: layer for layer in layers}
    tuned = _tuned_parameters(original, quantized, by_path)
    entries = {}
    for name, stored in original.items():
        path, _, last = name.rpartition(".")
        layer = by_path.get(path)
        if layer is not None and last == "weight":
            entries.update(_layer_entries(layer, _narrow_type(name, stored)))
        else:
            # `quantize` rounds what it fits to float16, and the format wants the bias beside codes in float16.
            in_half = name in tuned or (layer is not None and layer.export is as_codes)
            dtype = torch.float16 if in_half else _narrow_type(name, stored)
            read = tuned.get(name, partial(stored.read, name))
            entries[name] = Entry(TensorLayout(dtype, stored.shape), partial(_narrowed, read, dtype, name))
    return entries


def _tuned_parameters(
    original: Mapping[str, StoredTensor], quantized: Artifact, by_path: Mapping[str, QuantizedLayer]
) -> dict[str, Callable[[], Tensor]]:
    """Norms and biases that were fitted to the quantized matrices, and so take the place of the original's.

    Also makes sure that everything in the quantized model finds its place: a model whose files name a tensor otherwise
    than its modules do would lose it.
    """
    tuned: dict[str, Callable[[], Tensor]] = {}
    for file in map(quantized.path, block_files(quantized)):
        for name in tensor_names(file):
            path = name.rpartition(".")[0]
            if name in original:
                tuned[name] = partial(read_tensor, file, name)
            elif f"{path}.weight" not in original or path not in by_path:
                raise ModelError(f"the model's files have no tensor for {name}; save the model with save_pretrained")
    return tuned


def _layer_entries(layer: QuantizedLayer, dtype: torch.dtype) -> dict[str, Entry]:
    return {
        name: Entry(TensorLayout(tensor.dtype, tuple(tensor.shape)), partial(_exported, layer, dtype, name))
        for name, tensor in layer.exported(dtype).items()
    }


def _exported(layer: QuantizedLayer, dtype: torch.dtype, name: str) -> Tensor:
    return layer.exported(dtype)[name]


def _narrow_type(name: str, stored: StoredTensor) -> torch.dtype:
    """16 bits for every floating type, so bfloat16 stays; integers stay what they are."""
    dtype = DTYPES.get(stored.dtype)
    if dtype is None:
        raise ModelError(f"{name} is stored as {stored.dtype}; use a model in 16 or 32 bits")
    return torch.float16 if dtype in (torch.float32, torch.float64) else dtype


def _narrowed(read: Callable[[], Tensor], dtype: torch.dtype, name: str) -> Tensor:
    tensor = read()
    narrow = tensor.to(dtype)
    if tensor.isfinite().all() and not narrow.isfinite().all():
        largest = float(tensor.abs().max())
        raise QuantizationError(f"{name} reaches {largest:.4g}, too much for {dtype}; use a bfloat16 copy of the model")
    return narrow
