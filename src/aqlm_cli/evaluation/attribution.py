"""Attribution: the divergence from the base model that the quantization of each layer causes alone.

A layer is swapped into the base model by itself ("in"), or taken out of the quantized model, where it has 16 bits again
("out"): what the divergence of the whole falls by is then the layer's. Effects do not add up at 2 bits, so the two
differ. A block stands for all of its layers together.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from aqlm_cli.arguments import check_fields
from aqlm_cli.data.sequences import evaluation_sequences
from aqlm_cli.errors import ModelError, UsageError
from aqlm_cli.evaluation.evaluation import Remember, compute_again, needed
from aqlm_cli.evaluation.model import EvaluatedModel
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted
from aqlm_cli.formatting import facts, file_word, text_name
from aqlm_cli.quantization.mixed_model import MixedModel
from aqlm_cli.records import Record
from aqlm_kernels import CompressedEmbedding, Matrix, quantized_layers

Way: TypeAlias = Literal["in", "out"]
Unit: TypeAlias = Literal["layer", "block"]

WORST = 10
"""Rows of the table of layers."""

STAGE = "attribution"


@dataclass(frozen=True)
class AttributionSettings:
    """`data` is a source of `data.documents`, of which the first `sequences` are read.

    `budget_minutes`: fewer and shorter sequences, so that all is measured in about that time; None: no limit.
    """

    data: str
    way: Way = "in"
    unit: Unit = "layer"
    sequences: int = 4
    sequence_length: int = 512
    budget_minutes: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.sequences < 1 or self.sequence_length < 2:
            raise UsageError(
                f"{self.sequences} sequences of {self.sequence_length} tokens have no prediction to evaluate"
            )
        if self.budget_minutes is not None and not self.budget_minutes > 0:
            raise UsageError(f"--budget-minutes {self.budget_minutes} leaves no time; give more than 0")


@dataclass(frozen=True)
class AttributionReport(Record):
    """`effects`: KL in nats a token by path; `blocks` by the path of a block, its layers together or as their sum.

    `whole` is the divergence of the model with all of its matrices.
    """

    model: str
    data: str
    way: Way
    unit: Unit
    sequences: int
    sequence_length: int
    whole: float
    effects: dict[str, float]
    blocks: dict[str, float]
    seconds: float
    version: int = 1

    @property
    def worst_block(self) -> str:
        """The block that causes most."""
        numbered = [path for path in self.blocks if path.rpartition(".")[2].isdigit()]
        return max(numbered or self.blocks, key=lambda path: self.blocks[path])

    def table(self) -> Group:
        ordered = sorted(self.effects.items(), key=lambda one: -one[1])
        parts = Table(self.unit, "KL, nats a token", "share of the sum", title="attribution", title_justify="left")
        total = sum(self.effects.values()) or 1.0
        for path, effect in ordered[:WORST]:
            parts.add_row(path, f"{effect:.5f}", f"{effect / total:.1%}")
        about = [
            ("text", f"{text_name(self.data)}, {self.sequences} x {self.sequence_length}"),
            ("swapped", self.way),
            ("whole", f"{self.whole:.4f} nats a token; the parts have {total:.4f} together"),
        ]
        return Group(parts, *([self._heat_map()] if self.unit == "layer" else []), facts("", about))

    def _heat_map(self) -> Table:
        """Blocks by kinds of matrices, in thousandths of a nat."""
        kinds = list(dict.fromkeys(kind_of(path) for path in self.effects if block_of(path)))
        cells: dict[str, dict[str, float]] = defaultdict(dict)
        for path, effect in self.effects.items():
            cells[block_of(path)][kind_of(path)] = cells[block_of(path)].get(kind_of(path), 0.0) + effect
        largest = max(self.effects.values(), default=0.0) or 1.0
        table = Table("block", *kinds, title="KL, thousandths of a nat", title_justify="left")
        for block in filter(block_of, self.blocks):
            row = (cells[block].get(kind) for kind in kinds)
            table.add_row(block, *("" if one is None else f"[{_shade(one / largest)}]{1000 * one:.2f}" for one in row))
        return table


class AttributionEvaluation:
    beside_base = True

    def run(
        self,
        model: EvaluatedModel,
        base: EvaluatedModel | None,
        settings: AttributionSettings,
        emit: Emit,
        remember: Remember = compute_again,
    ) -> AttributionReport:
        base = needed(base, model)
        model.refuse_length(settings.sequence_length, "the length of the sequences", stated=True)
        ids = evaluation_sequences(settings.data, settings.sequence_length, model.tokenizer(), emit=emit)
        ids = ids[: settings.sequences]
        model.refuse_tokens(ids)
        return attribute(model, base, ids, settings, emit)

    def files(self, report: AttributionReport) -> Mapping[str, Mapping[str, Any] | bytes]:
        """eval-attribution-wikitext2-in-layer.json."""
        text = file_word(text_name(report.data))
        return {f"eval-attribution-{text}-{report.way}-{report.unit}.json": report.as_json()}


def attribute(
    model: EvaluatedModel, base: EvaluatedModel, ids: Tensor, settings: AttributionSettings, emit: Emit
) -> AttributionReport:
    """The effects of the quantized layers of `model` on the sequences `[n, L]`.

    Raises ModelError where it has none.
    """
    started = time.monotonic()
    layers, tables = _matrices(model)
    units = _units([*layers, *tables], settings.unit)
    network: Any = base.network(torch.float32)

    def mixed(ids: Tensor) -> MixedModel:
        return MixedModel(network, ids, torch.float32)

    def divergence(of: MixedModel, paths: set[str]) -> float:
        inside = {path: matrix for path, matrix in layers.items() if path in paths}
        return of.divergence(inside, {path: matrix for path, matrix in tables.items() if path in paths})

    every = {*layers, *tables}
    ids = _within_budget(ids, settings, len(units), lambda one: divergence(mixed(one), every), emit)
    compared = mixed(ids)
    whole = divergence(compared, every)
    emit(StageStarted(STAGE, len(units), settings.unit))
    effects: dict[str, float] = {}
    for number, (name, paths) in enumerate(units.items(), 1):
        effects[name] = (
            divergence(compared, paths) if settings.way == "in" else whole - divergence(compared, every - paths)
        )
        emit(Advanced(STAGE, number, f"KL {effects[name]:.5f} of {name}"))
    blocks: dict[str, float] = defaultdict(float)
    for name, effect in effects.items():
        blocks[block_of(name) or name] += effect
    return AttributionReport(
        model=model.name,
        data=settings.data,
        way=settings.way,
        unit=settings.unit,
        sequences=len(ids),
        sequence_length=ids.shape[1],
        whole=whole,
        effects=effects,
        blocks=dict(blocks),
        seconds=time.monotonic() - started,
    )


def _matrices(model: EvaluatedModel) -> tuple[dict[str, Matrix], dict[str, Matrix]]:
    """The matrices of the layers, and those of embeddings and head, by path."""
    found = quantized_layers(model.network(torch.float32))
    if not found:
        raise ModelError(f"{model.name} has no quantized layer, so nothing to attribute")
    outside = {path for path, layer in found.items() if isinstance(layer, CompressedEmbedding) or not block_of(path)}
    layers = {path: layer.matrix() for path, layer in found.items() if path not in outside}
    return layers, {path: found[path].matrix() for path in outside}


def _units(paths: list[str], unit: Unit) -> dict[str, set[str]]:
    """The paths of every unit, by its name: a layer, or a block with embeddings and head for one each."""
    units: dict[str, set[str]] = {}
    for path in paths:
        units.setdefault(path if unit == "layer" else block_of(path) or path, set()).add(path)
    return units


def _within_budget(ids: Tensor, settings: AttributionSettings, units: int, measure: Any, emit: Emit) -> Tensor:
    """The sequences, or the part of them that the time allows, by the time of the first."""
    if settings.budget_minutes is None:
        return ids
    started = time.monotonic()
    measure(ids[:1])
    one = (time.monotonic() - started) / 2  # the base model's states are made, too
    share = 60 * settings.budget_minutes / (one * (units + 2))
    sequences, length = max(1, int(min(len(ids), share))), ids.shape[1]
    if share < 1:
        length = max(min(length, 32), int(length * share))
    if (sequences, length) != tuple(ids.shape):
        emit(Noted(f"for --budget-minutes {settings.budget_minutes:g}: {sequences} sequences of {length} tokens"))
    return ids[:sequences, :length]


def block_of(path: str) -> str:
    """The path of the block that a layer lies in; empty outside the blocks."""
    found = re.match(r"(.*?\.\d+)(\.|$)", path)
    return found.group(1) if found else ""


def kind_of(path: str) -> str:
    """The name of a layer."""
    return path.rpartition(".")[2]


def _shade(share: float) -> str:
    """A style for a share of the largest."""
    return "red" if share > 0.5 else "yellow" if share > 0.2 else "default"
