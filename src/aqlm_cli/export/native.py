"""The native format: every matrix at the bits of its scheme, embeddings and head included.

aqlm_kernels/native.py describes the files, and loads them into stock transformers. Any mix of schemes fits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_cli.errors import PlanError
from aqlm_cli.export.layout import Layout, Slot, plan_slots
from aqlm_cli.export.model import QuantizedModel
from aqlm_cli.export.model_card import NATIVE_LOADING, CardFacts, model_card
from aqlm_cli.export.tensors import entries
from aqlm_cli.export.transformers import base_config, refuse_disagreement, refuse_unloadable
from aqlm_cli.export.writer import Entry
from aqlm_cli.formatting import some
from aqlm_cli.models import ModelSource, Network
from aqlm_cli.models.experts import expert_place
from aqlm_cli.runs.files import TensorLayout
from aqlm_cli.spec.plan import Plan
from aqlm_cli.spec.schemes import Scheme
from aqlm_kernels import Matrix, expert_shapes
from aqlm_kernels.native import NativeLayer, native_config, tied_heads


class NativeExporter:
    name = "native"

    def holds(self, plan: Plan) -> bool:
        return True

    def layouts(
        self,
        network: Network,
        stored: Mapping[str, TensorLayout],
        schemes: Mapping[str, Scheme | None],
        changed: Collection[str],
    ) -> Layout:
        named = {path: scheme for path, scheme in schemes.items() if scheme is not None}
        if len(named) < len(schemes):
            raise PlanError(
                f"the format {self.name} cannot hold {some(sorted(schemes.keys() - named.keys()))}: no scheme"
            )
        slots = _packed_slots(network, stored, named, changed)
        layout = Layout(slots, native_config(_described(network, named)))
        refuse_unloadable(network, layout, named, self.name)
        return layout

    def tensors(self, model: QuantizedModel, layout: Layout) -> dict[str, Entry]:
        return entries(model, layout, _tensor)

    def config(self, model: QuantizedModel, layout: Layout) -> dict[str, Any]:
        assert layout.quantization is not None
        return {**base_config(model), "quantization_config": dict(layout.quantization)}

    def card(self, facts: CardFacts, layout: Layout) -> str:
        return model_card(facts, NATIVE_LOADING, tags=["aqlm", "aqlm-native"])

    def verify(self, base: ModelSource, layout: Layout, directory: Path) -> None:
        refuse_disagreement(base, layout, directory, self.name)


def _packed_slots(
    network: Network, stored: Mapping[str, TensorLayout], schemes: Mapping[str, Scheme], changed: Collection[str]
) -> dict[str, Slot]:
    """The tensors of a dense checkpoint, with those of the matrices in place of their weights.

    A tied head has none of its own. Of fused experts with a quantized matrix every matrix and bias is one tensor.
    """
    apart, biases = _taken_apart(network, schemes)
    tied = {f"{head}.weight" for path in schemes for head in tied_heads(network.all_tied_weights_keys, path)}
    slots: dict[str, Slot] = {}

    def add(path: str, last: str, layout: TensorLayout, origin: Slot) -> None:
        slots[f"{path}.{last}"] = Slot(layout, f"{path}.{last}", origin.placement)

    for name, slot in plan_slots(network, stored, {*schemes, *apart}, {*changed, *biases}).items():
        path, _, last = (slot.parameter or "").rpartition(".")
        for expert in slot.experts:
            place = expert_place(network, expert)
            assert place is not None
            _, rows, columns = network.get_parameter(place.parameter).shape
            weight = TensorLayout(slot.layout.dtype, (columns, rows) if place.transposed else (rows, columns))
            parts = packed_layouts(schemes[expert], weight.shape) if expert in schemes else {"weight": weight}
            for part, layout in parts.items():
                add(expert, part, layout, slot)
        if slot.experts or slot.parameter in tied:
            continue
        if slot.parameter in biases:
            count, *shape = slot.layout.shape
            for number in range(count):
                layer = f"{path}.{number}.{last.removesuffix('_bias')}"
                add(layer, "bias", TensorLayout(slot.layout.dtype, tuple(shape)), slot)
        elif path in schemes and last == "weight":
            for part, layout in packed_layouts(schemes[path], slot.layout.shape).items():
                add(path, part, layout, slot)
        elif path in schemes and last == "bias":
            add(path, last, TensorLayout(torch.float16, slot.layout.shape), slot)
        else:
            slots[name] = slot
    return slots


def _taken_apart(network: Network, schemes: Mapping[str, Scheme]) -> tuple[set[str], set[str]]:
    """Paths of all matrices that are fused with a quantized one, and the parameters of their biases."""
    matrices, biases = set[str](), set[str]()
    for owner in {path.rsplit(".", 2)[0] for path in schemes if expert_place(network, path) is not None}:
        fused: Any = network.get_submodule(owner)
        for name in expert_shapes(fused):
            matrices |= {f"{owner}.{number}.{name}" for number in range(fused.num_experts)}
            biases |= {f"{owner}.{name}_bias"} if fused.has_bias else set()
    return matrices, biases


def _described(network: Network, schemes: Mapping[str, Scheme]) -> dict[str, NativeLayer]:
    modules, head = dict(network.named_modules()), network.get_output_embeddings()

    def duty(path: str) -> str:
        module = modules.get(path)
        if isinstance(module, nn.Embedding):
            return "table" if tied_heads(network.all_tied_weights_keys, path) else "embedding"
        if module is None:
            return "expert"
        return "head" if module is head else "linear"

    return {path: NativeLayer(str(scheme), scheme.kind, duty(path)) for path, scheme in schemes.items()}


def packed_layouts(scheme: Scheme, shape: tuple[int, ...]) -> dict[str, TensorLayout]:
    """The tensors in place of a weight of this shape `[out, in]`."""
    rows, columns = shape
    return {
        name: TensorLayout(getattr(torch, tensor.dtype), tensor.shape)
        for name, tensor in scheme.native_layouts(rows, columns).items()
    }


def _tensor(matrix: Matrix, last: str, dtype: torch.dtype) -> Tensor:
    return matrix.packed_tensors()[last]
