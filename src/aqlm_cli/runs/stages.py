"""The table of stages: every stage that makes an artifact of a run, in order.

Nothing else lists stages. Where an artifact lies, what rebuilds it, which settings it depends on, what `aqlm status`
shows and what `aqlm verify` reads all derive from this table. A new stage is one row here and one file in
pipeline/stages/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StageSpec:
    """One stage. `name` names its log and its lines in `aqlm status`; `command` runs it, or what runs it.

    `sections` of the run file must stay what they were while the artifact exists; "" stands for the settings outside
    all sections. `kept_section` is the one that stays in the run file as the artifact was made with. `parents` are the
    kinds of artifacts that it is made from. `replaces` is the directory of an earlier stage whose artifact it takes the
    place of: its manifest names that one's digest under START. A run without an `optional` stage is complete.
    """

    name: str
    command: str
    directory: str
    kind: str
    sections: tuple[str, ...] = ()
    kept_section: str | None = None
    parents: tuple[str, ...] = ()
    replaces: str | None = None
    optional: bool = False


START = "start"
"""The parent by which an artifact names the one that it takes the place of."""

CALIBRATE = StageSpec(
    name="calibrate",
    command="aqlm calibrate --config {run}/run.yaml --out {run}",
    directory="calibration",
    kind="calibration",
    sections=("", "calibrate"),
)
ALLOCATE = StageSpec(
    name="allocate",
    command="aqlm quantize --config {run}/run.yaml --out {run}",
    directory="allocation",
    kind="allocation",
    sections=("", "calibrate", "quantize"),
    parents=("calibration",),
    optional=True,
)
QUANTIZE = StageSpec(
    name="quantize",
    command="aqlm quantize --config {run}/run.yaml --out {run}",
    directory="quantized",
    kind="quantized",
    sections=("", "calibrate", "quantize"),
    parents=("calibration", "allocation"),
)
SAMPLE = StageSpec(name="sample", command="aqlm finetune {run}", directory="text", kind="text", optional=True)
FINETUNE = StageSpec(
    name="finetune",
    command="aqlm finetune {run}",
    directory="finetuned",
    kind="quantized",
    kept_section="finetune",
    parents=("calibration",),
    replaces="quantized",
    optional=True,
)
PACK = StageSpec(name="pack", command="aqlm pack {run}", directory="packed", kind="packed", parents=("quantized",))

STAGES: tuple[StageSpec, ...] = (CALIBRATE, ALLOCATE, QUANTIZE, SAMPLE, FINETUNE, PACK)
"""The stages in the order in which they run: each is made from earlier ones only."""


def kinds() -> tuple[str, ...]:
    """Every kind of artifact, in order."""
    return tuple(dict.fromkeys(stage.kind for stage in STAGES))


def stages_of(kind: str) -> tuple[StageSpec, ...]:
    """The stages that make this kind of artifact, the last one first: the first complete artifact counts."""
    return tuple(stage for stage in reversed(STAGES) if stage.kind == kind)


def stage_at(directory: Path, kind: str) -> StageSpec:
    """The stage that makes the artifact in a directory of this name, or else the first one that makes its kind."""
    named = next((stage for stage in STAGES if stage.directory == directory.name), None)
    return named or stages_of(kind)[-1]


@dataclass(frozen=True)
class StageKey:
    """The inputs of an artifact: equal keys give the same bytes.

    `parents` maps each kind that it is made from to that parent's digest (for the model: its identity). `machine` is
    what else decides the last bits; only a stage that can resume compares it. With `overwrite`, existing work under
    another key is given up.
    """

    stage: StageSpec
    settings: Mapping[str, Any]
    parents: Mapping[str, str]
    machine: Mapping[str, str] = field(default_factory=dict)
    overwrite: bool = False
