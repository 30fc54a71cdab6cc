"""Tensors of an exported checkpoint by name, type and shape, before any of them exists.

Names are those in the files of the base model, which transformers maps to the modules of its network. Where it splits
or joins tensors while it loads, the tensors of a quantized layer get the names of the network instead, which it leaves
as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from aqlm_cli.models import Network, Placement, names_of_codes, placements
from aqlm_cli.models.blocks import find_blocks
from aqlm_cli.models.experts import experts_in, weight_parameter
from aqlm_cli.runs.files import TensorLayout


@dataclass(frozen=True)
class Slot:
    """One tensor of a checkpoint.

    `parameter` is its name in the network; None where it is copied from the files of the base model as it is.
    `placement` is where those files hold it; None where they have no such tensor. `experts` are the paths of the
    experts' layers whose weights it holds, by number; empty for every other tensor. `split` makes a tensor of one
    expert of its part `[1, ...]` of the parameter, by name; None where the tensor is the parameter.
    """

    layout: TensorLayout
    parameter: str | None
    placement: Placement | None
    experts: tuple[str, ...] = ()
    split: Callable[[str, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Layout:
    slots: Mapping[str, Slot]  # by name
    quantization: Mapping[str, Any] | None  # the part of config.json that describes codes; None without any

    @property
    def tensors(self) -> dict[str, TensorLayout]:
        return {name: slot.layout for name, slot in self.slots.items()}

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layout.bytes for layout in self.tensors.values())

    def bytes_of(self, paths: Collection[str]) -> int:
        """Bytes of everything that stands for the weights of the layers at `paths`."""
        total, chosen = 0, set(paths)
        for slot in self.slots.values():
            path, _, last = (slot.parameter or "").rpartition(".")
            if slot.experts:
                total += slot.layout.bytes * len(chosen.intersection(slot.experts)) // len(slot.experts)
            elif path in chosen and last != "bias":
                total += slot.layout.bytes
        return total


CodeLayouts: TypeAlias = Callable[[str, tuple[int, ...]], Mapping[str, TensorLayout]]
"""Path of a layer and shape of its weight -> the tensors that replace the weight, by the last part of their names."""


def plan_slots(
    network: Network,
    stored: Mapping[str, TensorLayout],
    quantized: Collection[str],
    changed: Collection[str],
    with_codes: Collection[str] = (),
    code_layouts: CodeLayouts | None = None,
) -> dict[str, Slot]:
    """The checkpoint of a network without values, whose files hold `stored`.

    The weights of the layers at the paths `quantized` differ from the base model's, and so do the parameters named in
    `changed`. Of these layers, those in `with_codes` get `code_layouts` in place of a weight.
    """
    slots: dict[str, Slot] = {}
    written: dict[str, tuple[str, TensorLayout, Placement | None]] = {}  # by parameter: its name in the checkpoint, ...
    experts = experts_in(network, quantized)
    replaced = {*changed, *(weight_parameter(network, path) for path in quantized)}
    for placement in placements(network, stored):
        parts = placement.parameters
        if not parts or (placement.convert is not None and not replaced & parts.keys()):
            for name in placement.stored:
                slots[name] = Slot(TensorLayout(_narrow(stored[name].dtype), stored[name].shape), None, placement)
        else:
            for parameter, layout in parts.items():
                name = placement.stored[0] if placement.convert is None else parameter
                written[parameter] = (name, layout, placement)
    _split_shared(network, written, replaced)
    bases = names_of_codes(network, {path: written[f"{path}.weight"][0] for path in with_codes})
    for parameter, (name, layout, origin) in written.items():
        path, _, last = parameter.rpartition(".")
        if path in with_codes and last == "weight" and code_layouts is not None:
            for key, part in code_layouts(path, layout.shape).items():
                slots[f"{bases[path]}.{key}"] = Slot(part, f"{path}.{key}", origin)
        else:
            # `quantize` rounds what it fits to float16, and the format wants the bias beside codes in float16.
            dtype = torch.float16 if parameter in changed or path in with_codes else _narrow(layout.dtype)
            slots[name] = Slot(TensorLayout(dtype, layout.shape), parameter, origin, experts.get(parameter, ()))
    return slots


def named_as_stored(slots: Mapping[str, Slot], stored: Mapping[str, TensorLayout]) -> dict[str, Slot]:
    """The slots with a parameter of all experts as the tensors of each that the base model's files have, where they do.

    Programs that read the files of the base model read these, too.
    """
    named: dict[str, Slot] = {}
    for name, slot in slots.items():
        files = slot.placement.expert_files() if slot.experts and slot.placement is not None else None
        if files is None:
            named[name] = slot
            continue
        for file_name, number in files.numbers.items():
            layout = TensorLayout(_narrow(stored[file_name].dtype), stored[file_name].shape)
            part = replace(slot, layout=layout, experts=(slot.experts[number],), split=files.split)
            named[file_name] = part
    return named


def _split_shared(
    network: Network, written: dict[str, tuple[str, TensorLayout, Placement | None]], replaced: Collection[str]
) -> None:
    """Add a tensor of its own for each parameter that several blocks share in the files and no longer can."""
    original = {parameter: (layout, origin) for parameter, (_, layout, origin) in written.items()}
    tensors = network.state_dict()
    for parameter in set(replaced) - written.keys():
        written[parameter] = (parameter, TensorLayout(torch.float16, tuple(tensors[parameter].shape)), None)
    for parameter, sharing in _shared(network).items():
        if parameter not in written and sharing & set(replaced):
            for name in sharing & original.keys():
                written[parameter] = (parameter, *original[name])


def _shared(network: Network) -> dict[str, set[str]]:
    """All names of each parameter of a block that is also a parameter of another block."""
    inside = f"{find_blocks(network).path}."
    groups: dict[str, set[str]] = {}
    for name, first in network.all_tied_weights_keys.items():
        if name.startswith(inside) and first.startswith(inside):
            groups.setdefault(first, {first}).add(name)
    return {name: group for group in groups.values() for name in group}


def _narrow(dtype: torch.dtype) -> torch.dtype:
    """16 bits for wider types; bfloat16 and integers stay."""
    return torch.float16 if dtype in (torch.float32, torch.float64) else dtype
