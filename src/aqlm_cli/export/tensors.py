"""Sources of the tensors of an export: the base model, the quantized matrices, and the other changed parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.export.layout import Layout, Slot
from aqlm_cli.export.model import ExportedLayer, QuantizedModel
from aqlm_cli.export.writer import Entry
from aqlm_cli.models import Placement, tensor_index
from aqlm_cli.models.experts import ExpertPlace, expert_place, weight_parameter
from aqlm_cli.models.source import StoredTensor
from aqlm_kernels import Matrix

MatrixTensor: TypeAlias = Callable[[Matrix, str, torch.dtype], Tensor]
"""A matrix, the last part of a tensor's name, and the type that its layout gives it -> the tensor."""

VISIBLE_LOSS = 1e-5
"""Share of a row's energy: more than rounding to 16 bits takes where float16 has all its bits, 3e-8 to 1e-7, and less
than the error of any scheme."""


def entries(model: QuantizedModel, layout: Layout, matrix_tensor: MatrixTensor) -> dict[str, Entry]:
    """Every tensor of the layout by name; `matrix_tensor` is how the format writes a matrix."""
    stored = tensor_index(model.base.directory)
    return {
        name: Entry(slot.layout, _reader(name, slot, stored, model, matrix_tensor))
        for name, slot in layout.slots.items()
    }


def _reader(
    name: str, slot: Slot, stored: Mapping[str, StoredTensor], model: QuantizedModel, matrix_tensor: MatrixTensor
) -> Callable[[], Tensor]:
    parameter, placement, dtype = slot.parameter, slot.placement, slot.layout.dtype
    if parameter is None:
        return partial(_narrowed, partial(stored[name].read, name), dtype, name)
    path, _, last = parameter.rpartition(".")
    if slot.experts:
        return partial(_experts, name, slot, parameter, stored, model, matrix_tensor)
    place = None if path in model.layers and last != "bias" else expert_place(model.network, parameter)
    if place is not None:  # of one expert, and not quantized
        whole = _reader(name, replace(slot, parameter=place.parameter), stored, model, matrix_tensor)
        return partial(_of_one_expert, whole, place)
    if path in model.layers and last != "bias":
        return partial(_exported, model.layers[path], path, last, dtype, matrix_tensor)
    if parameter in model.changed:
        return partial(_narrowed, model.changed[parameter], dtype, name)
    assert placement is not None  # what is neither quantized nor changed is the base model's
    return partial(_narrowed, partial(_of_base, parameter, placement, stored), dtype, name)


def _of_base(parameter: str, placement: Placement, stored: Mapping[str, StoredTensor]) -> Tensor:
    if placement.convert is None:
        (name,) = placement.stored
        return stored[name].read(name)
    return placement.convert(lambda name: stored[name].read(name))[parameter].contiguous()


def _exported(layer: ExportedLayer, path: str, last: str, dtype: torch.dtype, matrix_tensor: MatrixTensor) -> Tensor:
    matrix = layer.read()
    tensor = matrix_tensor(matrix, last, dtype)
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise _out_of_range(f"{path}.{last}", matrix.dequantize(), dtype)
    return tensor


def _of_one_expert(read_all: Callable[[], Tensor], place: ExpertPlace) -> Tensor:
    tensor = read_all()[place.number]
    return (tensor.T if place.transposed else tensor).contiguous()


def _experts(
    name: str,
    slot: Slot,
    parameter: str,
    stored: Mapping[str, StoredTensor],
    model: QuantizedModel,
    matrix_tensor: MatrixTensor,
) -> Tensor:
    """The parameter of all experts `[experts, ...]`, or a stored tensor of one of them.

    It is the base model's with the quantized matrices in their places.
    """
    dtype, quantized = slot.layout.dtype, [path for path in slot.experts if path in model.layers]

    def part(path: str) -> Tensor:
        place = expert_place(model.network, path)
        assert place is not None
        weight = _exported(model.layers[path], path, "weight", dtype, matrix_tensor)
        return weight.T if place.transposed else weight

    if slot.split is not None and quantized:
        return slot.split(name, part(quantized[0])[None])
    if slot.split is not None:
        return _narrowed(partial(stored[name].read, name), dtype, name)
    if len(quantized) == len(slot.experts):  # the base model's is not needed
        filled = torch.empty(slot.layout.shape, dtype=dtype)
    else:
        assert slot.placement is not None
        filled = _narrowed(partial(_of_base, parameter, slot.placement, stored), dtype, parameter).clone()
    for path in quantized:
        filled[slot.experts.index(path)] = part(path)
    return filled


def _narrowed(read: Callable[[], Tensor], dtype: torch.dtype, name: str) -> Tensor:
    tensor = read()
    narrow = tensor.to(dtype)
    if tensor.isfinite().all() and not narrow.isfinite().all():
        raise _out_of_range(name, tensor, dtype)
    return narrow


def _out_of_range(name: str, values: Tensor, dtype: torch.dtype) -> QuantizationError:
    largest = float(values.abs().max())
    return QuantizationError(f"{name} reaches {largest:.4g}, too much for {dtype}; use a bfloat16 copy of the model")


def narrowing_losses(model: QuantizedModel, layout: Layout) -> dict[str, float]:
    """The largest share of a row's energy that is lost in float16, by path, of the matrices where the loss is visible.

    Only matrices that are written as float16 weights. float16 has all of its bits from 6e-5 on, and the error of a
    smaller weight grows as the weight falls.
    """
    dtypes = {slot.parameter: slot.layout.dtype for slot in layout.slots.values()}
    losses: dict[str, float] = {}
    for path, layer in model.layers.items():
        if dtypes.get(weight_parameter(model.network, path)) != torch.float16:
            continue
        weight = layer.read().dequantize()
        units = weight.abs().amax(1, keepdim=True)
        units = torch.where(units > 0, units, 1.0)
        lost = ((weight - weight.half()) / units).square().sum(1) / (weight / units).square().sum(1)  # [out]
        loss = float(lost.nan_to_num(0.0, posinf=math.inf).max())  # a row of zeros loses nothing
        if VISIBLE_LOSS < loss < math.inf:  # an overflow is refused when the weight is read
            losses[path] = loss
    return losses
