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
from typing import TypeAlias

import torch
from torch import Tensor

from aqlm_cli.errors import ModelError, QuantizationError
from aqlm_cli.export.layout import Layout, Slot, lay_out
from aqlm_cli.export.writer import Entry
from aqlm_cli.models import ModelSource, Placement, load_skeleton, tensor_index
from aqlm_cli.models.source import StoredTensor
from aqlm_cli.quantization.block_files import OUTSIDE, block_files, matrix_kinds, read_matrix
from aqlm_cli.runs.artifact import Artifact
from aqlm_cli.runs.files import read_tensor, tensor_names
from aqlm_cli.spec.schemes import Scheme
from aqlm_kernels import AdditiveMatrix, Matrix, to_checkpoint

# A matrix, and the 16-bit type of the weight it replaces -> tensors by the last part of their name.
Exporter: TypeAlias = Callable[[Matrix, torch.dtype], dict[str, Tensor]]


def as_codes(matrix: Matrix, dtype: torch.dtype) -> dict[str, Tensor]:
    """The form of the `aqlm` inference package: float16, whatever the model's type."""
    assert isinstance(matrix, AdditiveMatrix)
    return to_checkpoint(matrix)


def as_weight(matrix: Matrix, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": matrix.dequantize(dtype)}


EXPORTERS: Mapping[str, Mapping[str, Exporter]] = {
    "transformers": {"additive": as_codes},
    "dense": {},
}
"""Format -> kind of matrix -> its own form there; every other kind is written as an ordinary weight."""


SEEN_LOSS = 1e-5
"""Of the energy of a row: more than rounding to 16 bits takes where float16 has all its bits, 3e-8 to 1e-7, and less
than the error of any scheme."""


@dataclass(frozen=True)
class QuantizedLayer:
    """One matrix of a quantized model and how it will be exported."""

    path: str
    quantized: Artifact
    file: str
    kind: str
    export: Exporter

    def matrix(self) -> Matrix:
        return read_matrix(self.quantized, self.file, self.path, self.kind)


def quantized_layers(quantized: Artifact, format: str) -> list[QuantizedLayer]:
    """Every quantized matrix, in the order of the blocks."""
    return [
        QuantizedLayer(path, quantized, name, kind, EXPORTERS[format].get(kind, as_weight))
        for name in block_files(quantized)
        for path, kind in matrix_kinds(quantized, name).items()
    ]


def packed_checkpoint(
    source: ModelSource,
    quantized: Artifact,
    layers: Sequence[QuantizedLayer],
    schemes: Mapping[str, Scheme],
    format: str,
) -> tuple[Layout, dict[str, Entry]]:
    """The whole checkpoint by name: from the model at `source`, and from what was quantized."""
    stored, by_path = tensor_index(source.directory), {layer.path: layer for layer in layers}
    network = load_skeleton(source)
    tuned = _tuned_parameters(set(network.state_dict()), quantized, by_path)
    layouts = {name: tensor.layout for name, tensor in stored.items()}
    layout = lay_out(network, layouts, schemes, format, tuned)
    entries = {
        name: Entry(slot.layout, _reader(name, slot, stored, by_path, tuned)) for name, slot in layout.slots.items()
    }
    return layout, entries


def _reader(
    name: str,
    slot: Slot,
    stored: Mapping[str, StoredTensor],
    by_path: Mapping[str, QuantizedLayer],
    tuned: Mapping[str, Callable[[], Tensor]],
) -> Callable[[], Tensor]:
    parameter, placement = slot.parameter, slot.placement
    if parameter is None:
        return partial(_narrowed, partial(stored[name].read, name), slot.layout.dtype, name)
    path, _, last = parameter.rpartition(".")
    if path in by_path and last != "bias":
        return partial(_exported, by_path[path], last, slot.layout.dtype)
    if parameter in tuned:
        return partial(_narrowed, tuned[parameter], slot.layout.dtype, name)
    assert placement is not None  # what is neither quantized nor fitted is the original's
    return partial(_narrowed, partial(_original, parameter, placement, stored), slot.layout.dtype, name)


def _original(parameter: str, placement: Placement, stored: Mapping[str, StoredTensor]) -> Tensor:
    if placement.convert is None:
        (name,) = placement.stored
        return stored[name].read(name)
    return placement.convert(lambda name: stored[name].read(name))[parameter].contiguous()


def _tuned_parameters(
    parameters: Collection[str], quantized: Artifact, by_path: Mapping[str, QuantizedLayer]
) -> dict[str, Callable[[], Tensor]]:
    """Norms and biases, and what else learnt with the quantized matrices: they take the place of the original's.

    Also makes sure that everything in the quantized model is of a layer or one of the network's `parameters`.
    """
    tuned: dict[str, Callable[[], Tensor]] = {}
    outside = [OUTSIDE] if OUTSIDE in quantized.manifest.files else []
    for file in map(quantized.path, [*block_files(quantized), *outside]):
        for name in tensor_names(file):
            if name in parameters:
                tuned[name] = partial(read_tensor, file, name)
            elif name.rpartition(".")[0] not in by_path:
                raise ModelError(f"{file} holds {name}, for which the model's network has no place; quantize it anew")
    return tuned


def narrowing_losses(layers: Sequence[QuantizedLayer], layout: Layout) -> dict[str, float]:
    """By path, of the matrices written as float16 weights, the largest share of a row's energy that is lost in that,
    where it shows.

    float16 has all of its bits from 6e-5 on, and the error of a smaller weight grows as the weight falls.
    """
    dtypes = {slot.parameter: slot.layout.dtype for slot in layout.slots.values()}
    losses: dict[str, float] = {}
    for layer in layers:
        if dtypes.get(f"{layer.path}.weight") != torch.float16:
            continue
        weight = layer.matrix().dequantize()
        units = weight.abs().amax(1, keepdim=True)
        units = torch.where(units > 0, units, 1.0)
        lost = ((weight - weight.half()) / units).square().sum(1) / (weight / units).square().sum(1)  # [out]
        loss = float(lost.nan_to_num(0.0, posinf=math.inf).max())  # a row of zeros loses nothing
        if SEEN_LOSS < loss < math.inf:  # and what overflows is refused when it is read
            losses[layer.path] = loss
    return losses


def _exported(layer: QuantizedLayer, last: str, dtype: torch.dtype) -> Tensor:
    """What stands for it under `last`, the last part of a tensor's name."""
    tensor = layer.export(layer.matrix(), dtype)[last]
    if tensor.is_floating_point() and not tensor.isfinite().all():
        largest = float(layer.matrix().dequantize().abs().max())
        raise QuantizationError(
            f"{layer.path}.{last} reaches {largest:.4g}, too much for {dtype}; use a bfloat16 copy of the model"
        )
    return tensor


def _narrowed(read: Callable[[], Tensor], dtype: torch.dtype, name: str) -> Tensor:
    tensor = read()
    narrow = tensor.to(dtype)
    if tensor.isfinite().all() and not narrow.isfinite().all():
        largest = float(tensor.abs().max())
        raise QuantizationError(f"{name} reaches {largest:.4g}, too much for {dtype}; use a bfloat16 copy of the model")
    return narrow
