"""The format of the `aqlm` inference package, which stock transformers loads: codes, codebooks and scales.

Additive layers of one scheme keep their codes. Every other kind of matrix has no form in that package and becomes an
ordinary 16-bit weight. All that transformers 4 and 5 expect differently stands here, for the other formats that they
load, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_cli.errors import ArtifactError, PlanError
from aqlm_cli.export.layout import Layout, Slot, named_as_stored, plan_slots
from aqlm_cli.export.model import QuantizedModel
from aqlm_cli.export.model_card import DENSE_LOADING, LOADING, CardFacts, model_card
from aqlm_cli.export.tensors import entries
from aqlm_cli.export.writer import Entry
from aqlm_cli.formatting import some
from aqlm_cli.models import ModelSource, Network, model_config
from aqlm_cli.models.experts import expert_place
from aqlm_cli.runs.files import TensorLayout
from aqlm_cli.spec.plan import Plan
from aqlm_cli.spec.schemes import AdditiveScheme, Scheme
from aqlm_kernels import AdditiveMatrix, Matrix, to_checkpoint


class TransformersExporter:
    name = "transformers"

    def holds(self, plan: Plan) -> bool:
        return plan.is_stock

    def layouts(
        self,
        network: Network,
        stored: Mapping[str, TensorLayout],
        schemes: Mapping[str, Scheme | None],
        changed: Collection[str],
    ) -> Layout:
        coded = {path: scheme for path, scheme in schemes.items() if isinstance(scheme, AdditiveScheme)}
        refuse_experts(network, coded, self.name)
        _refuse_mix(network, schemes)
        slots = plan_slots(
            network, stored, schemes, changed, coded, lambda path, shape: code_layouts(coded[path], shape)
        )
        slots = named_as_stored(slots, stored)
        layout = Layout(slots, _quantization_config(network, slots, coded) if coded else None)
        refuse_unloadable(network, layout, coded, self.name)
        return layout

    def tensors(self, model: QuantizedModel, layout: Layout) -> dict[str, Entry]:
        return entries(model, layout, _tensor)

    def config(self, model: QuantizedModel, layout: Layout) -> dict[str, Any]:
        config = base_config(model)
        return config if layout.quantization is None else {**config, "quantization_config": dict(layout.quantization)}

    def card(self, facts: CardFacts, layout: Layout) -> str:
        if layout.quantization is None:
            return model_card(facts, DENSE_LOADING)
        return model_card(facts, LOADING, tags=["aqlm"])

    def verify(self, base: ModelSource, layout: Layout, directory: Path) -> None:
        refuse_disagreement(base, layout, directory, self.name)


def _refuse_mix(network: Network, schemes: Mapping[str, Scheme | None]) -> None:
    """PlanError, which names the layers, for several schemes and for a quantized table of embeddings."""
    groups: dict[str, list[str]] = {}
    for path, scheme in schemes.items():
        if scheme is not None:
            groups.setdefault(str(scheme), []).append(path)
    modules = dict(network.named_modules())
    tables = [path for path in schemes if isinstance(modules.get(path), nn.Embedding)]
    fix = "use --format native, or --format dense"
    if tables:
        raise PlanError(
            f"the format {TransformersExporter.name} has embeddings in 16 bits, and {some(tables)} is quantized; {fix}"
        )
    if len(groups) > 1:
        found = "; ".join(f"{scheme}: {some(paths)}" for scheme, paths in sorted(groups.items()))
        raise PlanError(
            f"the format {TransformersExporter.name} holds one scheme for all layers, and here are {len(groups)} "
            f"({found}); {fix}"
        )


def code_layouts(scheme: AdditiveScheme, shape: tuple[int, ...]) -> dict[str, TensorLayout]:
    """The tensors in place of a weight of this shape `[out, in]`; `to_checkpoint` fills them."""
    rows, columns = shape
    codes = torch.int8 if scheme.codebook_bits <= 8 else torch.int16
    codebooks = (scheme.num_codebooks, scheme.codebook_size, 1, scheme.group_size)
    return {
        "codes": TensorLayout(codes, (rows, columns // scheme.group_size, scheme.num_codebooks)),
        "codebooks": TensorLayout(torch.float16, codebooks),
        "scales": TensorLayout(torch.float16, (rows, 1, 1, 1)),
    }


def _tensor(matrix: Matrix, last: str, dtype: torch.dtype) -> Tensor:
    if last == "weight":
        return matrix.dequantize(dtype)
    assert isinstance(matrix, AdditiveMatrix)
    return to_checkpoint(matrix)[last]


def _quantization_config(
    network: Network, slots: Mapping[str, Slot], coded: Mapping[str, AdditiveScheme]
) -> dict[str, Any]:
    (scheme,) = set(coded.values())
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


# ------------------------------------------------------------------------------- every format that transformers loads


def base_config(model: QuantizedModel) -> dict[str, Any]:
    """config.json of the base model, in 16 bits, with a key of our own that names the origin and the bits by layer."""
    # transformers 4 wrote the path of the model's directory into it.
    config = {key: value for key, value in model_config(model.base).items() if key != "_name_or_path"}
    for key in ("dtype", "torch_dtype"):  # transformers 5 and 4
        if config.get(key) == "float32":
            config[key] = "float16"
    bits = {path: layer.bits / (layer.shape[0] * layer.shape[1]) for path, layer in model.layers.items()}
    config["aqlm_cli"] = {"model": model.base.identity, "quantized": model.digest, "bits": bits}
    return config


def refuse_experts(network: Network, coded: Collection[str], format: str) -> None:
    """PlanError where an expert of a fused parameter has codes, which no module of that network can hold."""
    fused = [path for path in coded if expert_place(network, path) is not None]
    if fused:
        raise PlanError(
            f"the format {format} cannot hold this model: {len(fused)} matrices are of experts, such as {fused[0]}, "
            "which transformers keeps in one parameter; use --format native or dense, or leave them out with "
            "--skip '.*experts.*'"
        )


def refuse_unloadable(network: Network, layout: Layout, coded: Collection[str], format: str) -> None:
    """PlanError where transformers could not load a checkpoint of this layout."""
    from aqlm_cli.models.trial import refusal  # takes seconds to import, as a network does

    reason = refusal(network, layout.tensors, layout.quantization, coded)
    if reason is not None:
        fix = "use --format dense" if coded else "leave the layer out with --skip, or save the model again"
        raise PlanError(f"the format {format} cannot hold this model: {reason}; {fix}")


def refuse_disagreement(base: ModelSource, layout: Layout, directory: Path, format: str) -> None:
    """ArtifactError where transformers fails on the written directory, or computes something else than aqlm."""
    from aqlm_cli.models.trial import disagreement  # takes seconds to import, as a network does

    reason = disagreement(replace(base, name=str(directory), directory=directory, cached_identity=None))
    if reason is not None:
        fix = "the model cannot be packed" if layout.quantization is None else "use --format dense"
        raise ArtifactError(f"{directory} is not published in the format {format}: {reason}; {fix}")
