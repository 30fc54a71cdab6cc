"""The tensors of a packed checkpoint by name, type and shape, before any of them is there.

The names are those of the original's files, which transformers leads to the modules of its network. Where it cuts or
joins tensors on the way, those of a quantized layer stand under the names of the network, to which it does nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from aqlm_cli.errors import PlanError
from aqlm_cli.models import Network, Placement, names_of_codes, placements
from aqlm_cli.models.blocks import find_blocks
from aqlm_cli.runs.files import TensorLayout
from aqlm_cli.spec.schemes import AdditiveScheme, Scheme

WITH_CODES = "transformers"
"""The format of the `aqlm` inference package, in which additive layers keep their codes."""


@dataclass(frozen=True)
class Slot:
    """One tensor of a checkpoint.

    `parameter` names what it becomes in the network; None where it stays what it is in the original's files. There it
    is a part of `placement`; None where they have nothing of the kind.
    """

    layout: TensorLayout
    parameter: str | None
    placement: Placement | None


@dataclass(frozen=True)
class Layout:
    slots: Mapping[str, Slot]  # by name
    quantization: Mapping[str, Any] | None  # what config.json says of the codes; None without any

    @property
    def tensors(self) -> dict[str, TensorLayout]:
        return {name: slot.layout for name, slot in self.slots.items()}


def lay_out(
    network: Network,
    stored: Mapping[str, TensorLayout],
    schemes: Mapping[str, Scheme],
    format: str,
    fitted: Collection[str],
) -> Layout:
    """The checkpoint of a network without numbers, whose files hold `stored`.

    `schemes` says what becomes of its layers by path, and `fitted` names the other parameters that change. Nothing is
    read: this is also how a plan knows the size. Raises PlanError where the format cannot hold the model, or where
    transformers could not load it.
    """
    from aqlm_cli.models.trial import refusal  # takes seconds to import, as a network does

    additive = {path: scheme for path, scheme in schemes.items() if isinstance(scheme, AdditiveScheme)}
    coded = additive if format == WITH_CODES else {}
    slots = dict(_slots(network, stored, schemes, coded, fitted))
    layout = Layout(slots, _quantization_config(network, slots, coded) if coded else None)
    reason = refusal(network, layout.tensors, layout.quantization, coded)
    if reason is not None:
        way_out = "use --format dense" if coded else "leave the layer out with --skip, or save the model anew"
        raise PlanError(f"the format {format} cannot hold this model: {reason}; {way_out}")
    return layout


def _slots(
    network: Network,
    stored: Mapping[str, TensorLayout],
    schemes: Mapping[str, Scheme],
    coded: Mapping[str, AdditiveScheme],
    fitted: Collection[str],
) -> Iterator[tuple[str, Slot]]:
    changed = {*fitted, *(f"{path}.weight" for path in schemes)}
    written: dict[str, tuple[str, TensorLayout, Placement | None]] = {}  # by parameter: its name in the checkpoint, ...
    for placement in placements(network, stored):
        parts = placement.parameters
        if not parts or (placement.convert is not None and not changed & parts.keys()):
            for name in placement.stored:
                yield name, Slot(TensorLayout(_narrow(stored[name].dtype), stored[name].shape), None, placement)
        else:
            for parameter, layout in parts.items():
                name = placement.stored[0] if placement.convert is None else parameter
                written[parameter] = (name, layout, placement)
    original = {parameter: (layout, origin) for parameter, (_, layout, origin) in written.items()}
    # The files have a tensor of several blocks once. Where it differs from block to block now, each has its own.
    tensors = network.state_dict()
    for parameter in changed - written.keys():
        written[parameter] = (parameter, TensorLayout(torch.float16, tuple(tensors[parameter].shape)), None)
    for parameter, sharing in _shared(network).items():
        if parameter not in written and sharing & changed:
            for name in sharing & original.keys():
                written[parameter] = (parameter, *original[name])
    bases = names_of_codes(network, {path: written[f"{path}.weight"][0] for path in coded})
    for parameter, (name, layout, origin) in written.items():
        path, _, last = parameter.rpartition(".")
        if path in coded and last == "weight":
            for key, part in _codes(layout.shape, coded[path]).items():
                yield f"{bases[path]}.{key}", Slot(part, f"{path}.{key}", origin)
        else:
            # `quantize` rounds what it fits to float16, and the format wants the bias beside codes in float16.
            dtype = torch.float16 if parameter in fitted or path in coded else _narrow(layout.dtype)
            yield name, Slot(TensorLayout(dtype, layout.shape), parameter, origin)


def _shared(network: Network) -> dict[str, set[str]]:
    """For each parameter of a block that is also another block's all of its names."""
    inside = f"{find_blocks(network).path}."
    groups: dict[str, set[str]] = {}
    for name, first in network.all_tied_weights_keys.items():
        if name.startswith(inside) and first.startswith(inside):
            groups.setdefault(first, {first}).add(name)
    return {name: group for group in groups.values() for name in group}


def _narrow(dtype: torch.dtype) -> torch.dtype:
    """16 bits for what is wider; bfloat16 and integers stay."""
    return torch.float16 if dtype in (torch.float32, torch.float64) else dtype


def _codes(shape: tuple[int, ...], scheme: AdditiveScheme) -> dict[str, TensorLayout]:
    rows, columns = shape
    codes = torch.int8 if scheme.codebook_bits <= 8 else torch.int16
    entries = (scheme.num_codebooks, scheme.codebook_size, 1, scheme.group_size)
    return {
        "codes": TensorLayout(codes, (rows, columns // scheme.group_size, scheme.num_codebooks)),
        "codebooks": TensorLayout(torch.float16, entries),
        "scales": TensorLayout(torch.float16, (rows, 1, 1, 1)),
    }


def _quantization_config(
    network: nn.Module, slots: Mapping[str, Slot], coded: Mapping[str, AdditiveScheme]
) -> dict[str, Any]:
    schemes = set(coded.values())
    if len(schemes) > 1:
        names = ", ".join(sorted(map(str, schemes)))
        raise PlanError(
            f"the layers have the schemes {names}, and the format `{WITH_CODES}` can name one additive scheme for all; "
            "use --format dense"
        )
    (scheme,) = schemes
    # transformers 4 looks for the names of weights in this list, transformers 5 for those of modules, which in some
    # families are not those in the files. A tied head has no tensor there at all, and would be taken for a quantized
    # layer if its module were not named.
    linears = {path for path, module in network.named_modules() if isinstance(module, nn.Linear)}
    kept = (linears - coded.keys()) | {
        name.removesuffix(".weight")
        for name, slot in slots.items()
        if name.endswith(".weight") and len(slot.layout.shape) == 2
    }
    return {
        "quant_method": "aqlm",
        "num_codebooks": scheme.num_codebooks,
        "nbits_per_codebook": scheme.codebook_bits,
        "in_group_size": scheme.group_size,
        "out_group_size": 1,
        "linear_weights_not_to_quantize": sorted({*kept, *(f"{path}.weight" for path in kept)}),
    }
