"""The result of `aqlm plan`: what a run will cost on this machine, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from aqlm_cli.formatting import clock, facts, readable_bytes
from aqlm_cli.records import Record
from aqlm_cli.spec.cost import Cost


@dataclass(frozen=True)
class ForecastReport(Record):
    """`stages` in order; `safetensors_bytes` is the exact size of the files of weights in `packed/`.

    `advice` says for everything that this machine has too little of, what to change.
    """

    stages: Mapping[str, Cost]
    batch: int
    safetensors_bytes: int
    memory_available: int
    disk_available: int
    measured_seconds: float
    advice: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.stages.values())

    @property
    def memory_bytes(self) -> int:
        return max(cost.memory_bytes for cost in self.stages.values())

    @property
    def disk_bytes(self) -> int:
        return max(cost.disk_bytes for cost in self.stages.values())

    def table(self) -> Group:
        table = Table("stage", "time", "peak memory", "peak disk", title="forecast", title_justify="left")
        for stage, cost in self.stages.items():
            table.add_row(
                stage, clock(cost.seconds), readable_bytes(cost.memory_bytes), readable_bytes(cost.disk_bytes)
            )
        table.add_row("all", clock(self.seconds), readable_bytes(self.memory_bytes), readable_bytes(self.disk_bytes))
        table.add_row(
            "this machine has", "", readable_bytes(self.memory_available), readable_bytes(self.disk_available)
        )
        rows = [
            ("sequences at once", str(self.batch)),
            ("packed weights", f"{self.safetensors_bytes} bytes of safetensors"),
            ("measured in", f"{self.measured_seconds:.0f} s on this machine"),
            *(("does not fit", line) for line in self.advice),
        ]
        return Group(table, Text(), facts("", rows))
