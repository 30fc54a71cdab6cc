"""The result of a stage: one frozen record that can be shown in two ways.

`as_json()` is for programs and `table()` for people. No number in a record stands alone: a perplexity carries its data,
sequences and standard error, a speed its spread and the error of what was computed.
"""

from __future__ import annotations

import abc
import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from aqlm_cli.formatting import both_bits, clock, counted, facts, plain, readable_bytes, shrinkage, some


@dataclass(frozen=True)
class Record(abc.ABC):
    """The result of one stage."""

    def as_json(self) -> dict[str, Any]:
        """The fields by name, in JSON types."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @abc.abstractmethod
    def table(self) -> Table | Group:
        """The fields as a table for the console."""


@dataclass(frozen=True)
class PlanReport(Record):
    """The plan of `quantize`. Bits are per quantized weight, bytes those of the whole model.

    `kernel` is the backend that will multiply by the quantized layers on this machine, None where it is torch;
    `schemes` are those of the quantized layers by path, `skipped` pairs a path with the reason why it stays in 16 bits.
    """

    model: str
    method: str
    scheme: str
    layers: int
    code_bits: float
    stored_bits: float
    bytes_before: int
    bytes_after: int
    kernel: str | None
    schemes: Mapping[str, str]
    skipped: tuple[tuple[str, str], ...]

    def table(self) -> Table:
        by_reason: dict[str, list[str]] = defaultdict(list)
        for path, reason in self.skipped:
            by_reason[reason].append(path)
        return facts(
            "plan",
            [
                ("model", self.model),
                ("layers", f"{self.layers}, {self.method} {self.scheme}"),
                ("bits per weight", both_bits(self.code_bits, self.stored_bits)),
                ("model size", shrinkage(self.bytes_before, self.bytes_after)),
                *([("matmul kernel", self.kernel)] if self.kernel else []),
                *((f"skipped {len(paths)}", f"{some(paths)}: {reason}") for reason, paths in by_reason.items()),
            ],
        )


@dataclass(frozen=True)
class VerifyReport(Record):
    """All `files` of the run's artifacts match their manifests; `layer` was quantized again to the same codes.

    `layer` is None if nothing is quantized yet, or if that was done on another kind of machine.
    """

    directory: Path
    files: int
    bytes: int
    layer: str | None
    seconds: float

    def table(self) -> Table:
        again = "nothing to quantize again" if self.layer is None else f"{self.layer}: the same codes"
        rows = [
            ("files", f"{self.files} match their manifests, {readable_bytes(self.bytes)}"),
            ("quantized again", again),
            ("time", clock(self.seconds)),
        ]
        return facts(f"{self.directory} is sound", rows)


@dataclass(frozen=True)
class StageStatus:
    """`state` in words; for a stage that has started, `done` of `total` steps and the seconds left, if known."""

    stage: str
    state: str
    done: int | None = None
    total: int | None = None
    unit: str | None = None
    seconds_left: float | None = None


@dataclass(frozen=True)
class StatusReport(Record):
    """The state of a run; `process` is the one that runs it, None if there is none."""

    directory: Path
    model: str
    scheme: str
    process: str | None
    stages: tuple[StageStatus, ...]

    def table(self) -> Table:
        rows = [("model", f"{self.model}, {self.scheme}"), ("running", self.process or "no")]
        for stage in self.stages:
            steps = "" if stage.total is None else f", {stage.done} of {counted(stage.total, stage.unit or 'step')}"
            left = "" if stage.seconds_left is None else f", {clock(stage.seconds_left)} left"
            rows.append((stage.stage, f"{stage.state}{steps}{left}"))
        return facts(str(self.directory), rows)


@dataclass(frozen=True)
class BackendReport:
    """A backend and a scheme on this machine; `refusal` is the reason why it cannot multiply by it, or None."""

    name: str
    scheme: str
    device: str
    refusal: str | None


@dataclass(frozen=True)
class MachineReport(Record):
    """Processor, accelerators and packages of this machine. `versions` of packages that are not installed are None."""

    processor: str
    features: tuple[str, ...]
    cores: int
    threads: int
    accelerators: tuple[str, ...]
    versions: Mapping[str, str | None]
    backends: tuple[BackendReport, ...]

    def table(self) -> Table:
        return facts(
            "this machine",
            [
                ("processor", f"{self.processor}, {counted(self.cores, 'core')}"),
                ("threads in use", str(self.threads)),
                ("features", ", ".join(self.features) or "none that matter here"),
                ("accelerators", ", ".join(self.accelerators) or "none"),
                *((name, version or "not installed") for name, version in self.versions.items()),
                *(
                    (f"backend {row.name}", f"{row.scheme} on {row.device}: {row.refusal or 'ready'}")
                    for row in self.backends
                ),
            ],
        )
