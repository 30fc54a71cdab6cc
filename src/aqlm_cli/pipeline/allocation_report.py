"""Reports of an allocation: by the stage that makes it, and by `aqlm plan` before it is made."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from aqlm_cli.errors import UsageError
from aqlm_cli.formatting import facts, readable_bytes
from aqlm_cli.pipeline.stage_reports import StageReport
from aqlm_cli.records import Record
from aqlm_cli.runs.artifact import Artifact
from aqlm_cli.spec.allocation_record import AllocationRecord
from aqlm_cli.spec.scores import Scores

RECORD = "scores.json"
"""The file of `allocation/`: everything that was measured."""


@dataclass(frozen=True, kw_only=True)
class AllocationReport(StageReport):
    """The chosen plan: its measured `divergence`, in nats a token, and how many whole models were measured.

    `schemes` counts layers by name and treatment; `single` is the divergence of the best single scheme that keeps the
    target, None where none does.
    """

    target: str
    divergence: float
    single: float | None
    measured: int
    schemes: Mapping[str, Mapping[str, int]]

    def table(self) -> Table:
        rows = [("target", self.target), *_by_name(self.schemes), ("divergence", f"{self.divergence:.4f} nats a token")]
        if self.single is not None:
            rows.append(("best single scheme", f"{self.single:.4f} nats a token"))
        rows.append(("whole models measured", str(self.measured)))
        return facts("allocation", [*rows, *self.costs(), ("wrote", str(self.directory))])


@dataclass(frozen=True)
class AllocationForecast(Record):
    """The allocation that a target gives, before anything is quantized: from `scores` of a run, or expected.

    `divergence` is foretold, in nats a token; `safetensors_bytes` is the exact size of the files.
    """

    target: str
    divergence: float
    safetensors_bytes: int
    measured: bool
    schemes: Mapping[str, Mapping[str, int]]

    def table(self) -> Table:
        source = "measured scores" if self.measured else "a forecast from priors; the run measures"
        rows = [
            ("target", self.target),
            *_by_name(self.schemes),
            ("safetensors", f"{self.safetensors_bytes} bytes ({readable_bytes(self.safetensors_bytes)})"),
            ("divergence", f"{self.divergence:.3g} nats a token ({source})"),
        ]
        return facts("allocation", rows)


def _by_name(schemes: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str]]:
    words = {name: [f"{word} ({count})" for word, count in counts.items()] for name, counts in schemes.items()}
    return [(name, ", ".join(counted)) for name, counted in words.items()]


def schemes_by_name(choices: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Counts of treatments for layers of the same name, such as q_proj."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for path, word in choices.items():
        counts[path.rpartition(".")[2]][word.rpartition(":")[2]] += 1
    return {name: dict(sorted(count.items())) for name, count in sorted(counts.items())}


def single_divergence(record: AllocationRecord) -> float | None:
    """The measured divergence of the best single scheme, where one kept the target."""
    return next((one.divergence for one in record.candidates if one.mixes is None), None)


def read_record(allocation: Artifact) -> AllocationRecord:
    """The record of an allocation. ArtifactError where it is damaged."""
    with allocation.reading(RECORD) as file:
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != allocation.manifest.files[RECORD].sha256:
            raise ValueError("its digest differs from the manifest")
        try:
            return AllocationRecord.from_json(json.loads(content))
        except (UsageError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"it holds no allocation: {error}") from error


def same_layers(record: AllocationRecord, scores: Scores) -> bool:
    """True where the record scores the same layers and the same choices for each."""
    known = {path: [one.word for one in layer.options] for path, layer in record.scores.layers.items()}
    return known == {path: [one.word for one in layer.options] for path, layer in scores.layers.items()}
