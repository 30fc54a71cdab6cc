"""What stands in a packed checkpoint for each tensor of the original model.

Every tensor keeps its name and becomes 16 bits wide; only the weights of quantized layers are replaced. An exporter
says by what: by the codes, codebooks and scales that the `aqlm` inference package reads, or by an ordinary weight, as
must be for a kind of matrix that package has no form for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from aqlm_cli.artifacts import Artifact
from aqlm_cli.checkpoint import Entry
from aqlm_cli.errors import ModelError, QuantizationError
from aqlm_cli.methods import CompressedMatrix
from aqlm_cli.quantized import OUTSIDE, block_files, matrix_kinds, read_matrix
from aqlm_cli.scheme import AdditiveScheme, Scheme
from aqlm_cli.sources import StoredTensor, tensor_index
from aqlm_cli.storage import TensorLayout, read_tensor, tensor_names
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


SEEN_LOSS = 1e-5
"""Of the energy of a matrix: more than rounding to 16 bits takes where float16 has all its bits, 3e-8 to 1e-7, and less
than the error of any scheme."""


@dataclass(frozen=True)
class QuantizedLayer:
    """One matrix of a quantized model and how it will be exported."""

    path: str
    quantized: Artifact
    file: str
    kind: str
    export: Exporter

    def matrix(self) -> CompressedMatrix:
        return read_matrix(self.quantized, self.file, self.path, self.kind)

    def exported(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {f"{self.path}.{name}": tensor for name, tensor in self.export(self.matrix(), dtype).items()}


def quantized_layers(quantized: Artifact, format: str) -> list[QuantizedLayer]:
    """Every quantized matrix, in the order of the blocks."""
    return [
        QuantizedLayer(path, quantized, name, kind, EXPORTERS[format][kind])
        for name in block_files(quantized)
        for path, kind in matrix_kinds(quantized, name).items()
    ]


def checkpoint_layouts(
    original: Mapping[str, TensorLayout], schemes: Mapping[str, Scheme], format: str, tuned: Collection[str]
) -> dict[str, TensorLayout]:
    """The tensors of the checkpoint by name, from those of the model's files and what happens to the layers by path.

    `tuned` names the norms and biases that are fitted. Nothing is read: this is also how a plan knows the size.
    """
    layouts: dict[str, TensorLayout] = {}
    for name, stored in original.items():
        path, _, last = name.rpartition(".")
        scheme = schemes.get(path)
        coded = isinstance(scheme, AdditiveScheme) and EXPORTERS[format]["additive"] is as_codes
        if isinstance(scheme, AdditiveScheme) and coded and last == "weight":
            layouts.update({f"{path}.{key}": layout for key, layout in _coded(stored.shape, scheme).items()})
        else:
            # `quantize` rounds what it fits to float16, and the format wants the bias beside codes in float16.
            wide = stored.dtype in (torch.float32, torch.float64)  # 16 bits for these; bfloat16 and integers stay
            dtype = torch.float16 if wide or coded or name in tuned else stored.dtype
            layouts[name] = TensorLayout(dtype, stored.shape)
    return layouts


def _coded(shape: tuple[int, ...], scheme: AdditiveScheme) -> dict[str, TensorLayout]:
    rows, columns = shape
    codes = torch.int8 if scheme.codebook_bits <= 8 else torch.int16
    entries = (scheme.num_codebooks, scheme.codebook_size, 1, scheme.group_size)
    return {
        "codes": TensorLayout(codes, (rows, columns // scheme.group_size, scheme.num_codebooks)),
        "codebooks": TensorLayout(torch.float16, entries),
        "scales": TensorLayout(torch.float16, (rows, 1, 1, 1)),
    }


def checkpoint_entries(
    directory: Path, quantized: Artifact, layers: Sequence[QuantizedLayer], schemes: Mapping[str, Scheme], format: str
) -> dict[str, Entry]:
    """The whole checkpoint by name: from the model in `directory`, and from what was quantized."""
    original, by_path = tensor_index(directory), {layer.path: layer for layer in layers}
    tuned = _tuned_parameters(original, quantized, by_path)
    entries = {}
    stored = {name: tensor.layout for name, tensor in original.items()}
    for name, layout in checkpoint_layouts(stored, schemes, format, tuned).items():
        path, _, last = name.rpartition(".")
        if path in by_path and last != "bias":
            read = partial(_exported, by_path[path], layout.dtype, name)
        else:
            read = partial(_narrowed, tuned.get(name, partial(original[name].read, name)), layout.dtype, name)
        entries[name] = Entry(layout, read)
    return entries


def _tuned_parameters(
    original: Mapping[str, StoredTensor], quantized: Artifact, by_path: Mapping[str, QuantizedLayer]
) -> dict[str, Callable[[], Tensor]]:
    """Norms and biases, and what else learnt with the quantized matrices: they take the place of the original's.

    Also makes sure that everything in the quantized model finds its place: a model whose files name a tensor otherwise
    than its modules do would lose it.
    """
    tuned: dict[str, Callable[[], Tensor]] = {}
    outside = [OUTSIDE] if OUTSIDE in quantized.manifest.files else []
    for file in map(quantized.path, [*block_files(quantized), *outside]):
        for name in tensor_names(file):
            path = name.rpartition(".")[0]
            if name in original:
                tuned[name] = partial(read_tensor, file, name)
            elif f"{path}.weight" not in original or path not in by_path:
                raise ModelError(f"the model's files have no tensor for {name}; save the model with save_pretrained")
    return tuned


def narrowing_losses(layers: Sequence[QuantizedLayer], entries: Mapping[str, Entry]) -> dict[str, float]:
    """By path, of the matrices written as float16 weights, what that adds to their relative error, where it shows.

    float16 has all of its bits from 6e-5 on, and the error of a smaller weight grows as the weight falls.
    """
    losses: dict[str, float] = {}
    for layer in layers:
        entry = entries.get(f"{layer.path}.weight")
        if entry is None or entry.layout.dtype != torch.float16:
            continue
        weight = layer.matrix().dequantize()
        unit = float(weight.abs().max()) or 1.0
        loss = float((weight - weight.half()).div_(unit).norm() / weight.div_(unit).norm()) ** 2
        if SEEN_LOSS < loss < math.inf:  # and what overflows is refused when it is read
            losses[layer.path] = loss
    return losses


def _exported(layer: QuantizedLayer, dtype: torch.dtype, name: str) -> Tensor:
    tensor = layer.exported(dtype)[name]
    if tensor.is_floating_point() and not tensor.isfinite().all():
        largest = float(layer.matrix().dequantize().abs().max())
        raise QuantizationError(f"{name} reaches {largest:.4g}, too much for {dtype}; use a bfloat16 copy of the model")
    return tensor


def _narrowed(read: Callable[[], Tensor], dtype: torch.dtype, name: str) -> Tensor:
    tensor = read()
    narrow = tensor.to(dtype)
    if tensor.isfinite().all() and not narrow.isfinite().all():
        largest = float(tensor.abs().max())
        raise QuantizationError(f"{name} reaches {largest:.4g}, too much for {dtype}; use a bfloat16 copy of the model")
    return narrow
