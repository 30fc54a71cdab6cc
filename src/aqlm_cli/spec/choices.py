"""Choices: the layers that an allocation decides about, the treatments that each can get, and the bytes of each.

Decided are the layers that `quantize.scheme` would quantize, in the blocks, and the tables outside; not those that a
rule names, or a table whose scheme is given. To stay in 16 bits is a choice, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from aqlm_cli.errors import PlanError
from aqlm_cli.spec.plan import BYTES_PER_FLOAT, OUTSIDE, Layer, Plan, Target, make_plan
from aqlm_cli.spec.schemes import total_bytes
from aqlm_cli.spec.selection import Selection, compiled
from aqlm_cli.spec.target import TargetConfig
from aqlm_cli.spec.treatment import Treatment

HEADER_LINE = 80
"""Characters of one tensor in a safetensors header, beside its name."""


@dataclass(frozen=True)
class Choice:
    """One treatment of a layer, None: 16 bits; its bytes in a file, header included, and those read for a token."""

    treatment: Treatment | None
    bytes: int
    read: int

    def __str__(self) -> str:
        return "16 bits" if self.treatment is None else str(self.treatment)


@dataclass(frozen=True)
class OpenLayer:
    """A layer that the allocation decides about; `depth` is 0 at the first block and 1 at the last."""

    path: str
    kind: str
    out_features: int
    in_features: int
    depth: float
    choices: tuple[Choice, ...]

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def outside(self) -> bool:
        """True for embeddings, head and tables."""
        return self.kind in OUTSIDE

    @property
    def name(self) -> str:
        """The last part of its path, by which the same matrices of all blocks are called."""
        return self.path.rpartition(".")[2]


def open_layers(
    layers: Sequence[Layer],
    parameters: int,
    selection: Selection,
    target: TargetConfig,
    blocks: Sequence[str],
    native: bool,
    expert_share: float = 1.0,
) -> dict[str, OpenLayer]:
    """The layers to decide about, by path, with all choices that the settings allow.

    `blocks` are the paths of the blocks; a token reads `expert_share` of the experts. Raises PlanError where nothing
    is left to decide, and as `make_plan` does.
    """
    among = target.treatments(selection.default.method)
    possible = _possible(layers, parameters, selection, among)
    ruled = [compiled(rule.match, [layer.path for layer in layers], "layer") for rule in selection.rules]
    given = {"embedding": selection.embeddings, "head": selection.head}
    given["table"] = selection.embeddings or selection.head
    tables = target.of_tables(selection.default.method)
    found: dict[str, OpenLayer] = {}
    for layer in layers:
        if layer.reason or any(pattern.matches(layer.path) for pattern in ruled) or given.get(layer.kind):
            continue
        if layer.kind in OUTSIDE:
            usable = [one for one in tables if not one.scheme.refuses(layer.out_features, layer.in_features)]
        else:
            usable = [one for one in among if layer.path in possible.get(one, ())]
        if usable:
            share = {"embedding": 1 / layer.out_features, "expert": expert_share}.get(layer.kind, 1.0)
            choices = [_choice(layer, one, share, native) for one in (*usable, None)]
            depth = _depth(layer.path, blocks)
            found[layer.path] = OpenLayer(
                layer.path, layer.kind, layer.out_features, layer.in_features, depth, tuple(choices)
            )
    if not found:
        raise PlanError(
            "a target leaves no layer to decide about: every one is skipped, kept or has a scheme of its own"
        )
    return found


def _possible(
    layers: Sequence[Layer], parameters: int, selection: Selection, among: Sequence[Treatment]
) -> dict[Treatment, set[str]]:
    """Paths of the layers in the blocks that each treatment alone would quantize.

    Raises the PlanError of the last one where all of them have one.
    """
    possible: dict[Treatment, set[str]] = {}
    for treatment in among:
        try:
            plan = make_plan(layers, parameters, replace(selection, default=treatment))
        except PlanError as error:
            refusal = error
            continue
        possible[treatment] = {target.path for target in plan.quantized if target.treatment == treatment}
    if not possible:
        raise refusal
    return possible


def _choice(layer: Layer, treatment: Treatment | None, share: float, native: bool) -> Choice:
    rows, columns = layer.out_features, layer.in_features
    if treatment is None:
        size, tensors = BYTES_PER_FLOAT * rows * columns, 1
    else:
        scheme = treatment.scheme
        layouts = scheme.native_layouts(rows, columns) if native else scheme.packed_layouts(rows, columns)
        size, tensors = total_bytes(layouts), len(layouts)
    header = tensors * (len(layer.path) + HEADER_LINE)
    return Choice(treatment, size + header, round(share * size))


def _depth(path: str, blocks: Sequence[str]) -> float:
    place = next((number for number, block in enumerate(blocks) if path.startswith(f"{block}.")), 0)
    return place / max(1, len(blocks) - 1)


def read_beside(plan: Plan, open_paths: Mapping[str, object]) -> int:
    """Bytes that a token reads of everything that is not decided: norms, biases, and all other matrices.

    Of embeddings that stay as they are it reads one row.
    """
    fixed = [target for target in plan.targets if target.path not in open_paths]
    return BYTES_PER_FLOAT * plan.other_parameters + sum(_read(target) for target in fixed)


def _read(target: Target) -> int:
    return target.bytes_after // (target.out_features if target.kind == "embedding" else 1)
