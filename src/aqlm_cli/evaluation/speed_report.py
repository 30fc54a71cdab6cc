"""The report of `bench`: speeds of models and of single matmuls, for people, programs and spreadsheets."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from aqlm_cli.formatting import counted, readable_bytes
from aqlm_cli.records import Record


@dataclass(frozen=True)
class BenchRow:
    """Tokens per second: median, lowest and highest of the repeats.

    `decode_times`: times as fast as the base model in each type. `decode_bound`: the speed at which memory delivers the
    weights. `read_bytes`: bytes that one token reads, by part, of embeddings that are not also the head one row; empty
    for a model of another program. `relative_error` is that of the logits, as relative RMS against the same weights in
    float32; None where the row is that reference, or there is none.
    """

    name: str
    decode_median: float
    decode_low: float
    decode_high: float
    decode_times: Mapping[str, float]
    decode_bound: float
    prefill_median: float
    prefill_low: float
    prefill_high: float
    bytes: int
    read_bytes: Mapping[str, int]
    relative_error: float | None

    @property
    def decode_share(self) -> float:
        """Share of the speed at which memory delivers the weights."""
        return self.decode_median / self.decode_bound


@dataclass(frozen=True)
class MatmulRow:
    """One shape of y = x W^T with weights from memory. `times`: times as fast as torch's matmul in each type;
    `bandwidth_share`: bytes of codes a second, of those that memory gives; `relative_error` against float64."""

    out_features: int
    in_features: int
    rows: int
    backend: str
    microseconds: float
    times: Mapping[str, float]
    bandwidth_share: float
    relative_error: float


@dataclass(frozen=True)
class BenchReport(Record):
    """Speed of batch-1 decoding and of prefill; `backend` is the code that the quantized model ran through,
    `read_bandwidth` in bytes per second."""

    model: str
    threads: int
    backend: str
    prompt: int
    tokens: int
    repeats: int
    read_bandwidth: float
    rows: tuple[BenchRow, ...]
    matmuls: tuple[MatmulRow, ...]
    version: int = 1

    def table(self) -> Group:
        return Group(self._models(), self._parts(), *([self._matmuls()] if self.matmuls else []))

    def as_markdown(self) -> str:
        return "\n\n".join(
            "\n".join(_markdown_row(row) for row in [header, ["---"] * len(header), *rows])
            for header, *rows in self._plain_tables()
        )

    def as_csv(self) -> str:
        """The models, an empty line, the matmuls."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for number, rows in enumerate(self._plain_tables()):
            text.write("\n" * (number > 0))
            writer.writerows(rows)
        return text.getvalue().rstrip("\n")

    def _plain_tables(self) -> list[list[list[str]]]:
        """The same two tables with plain numbers; the first row holds the names of the columns."""
        tables = []
        for records in (self.rows, self.matmuls):
            flat = [_flat(dataclasses.asdict(record)) for record in records]
            columns = list(dict.fromkeys(name for row in flat for name in row))
            if flat:
                tables.append([columns, *([row.get(name, "") for name in columns] for row in flat)])
        return tables

    def _parts(self) -> Table:
        rows = [row for row in self.rows if row.read_bytes]
        parts = [part for part in rows[0].read_bytes if any(row.read_bytes[part] for row in rows)]
        columns = ("model", *(part.replace("_", " ") for part in parts), "all")
        table = Table(*columns, title="bytes a token while decoding", title_justify="left")
        for row in rows:
            sizes = [row.read_bytes[part] for part in parts]
            table.add_row(Text(row.name), *(readable_bytes(size) for size in (*sizes, sum(sizes))))
        return table

    def _matmuls(self) -> Table:
        others = self.matmuls[0].times
        columns = ("matmul", "us", *(f"x {name}" for name in others), "of bandwidth", "error", "backend")
        table = Table(*columns, title="single matmuls, weights from memory", title_justify="left")
        for row in self.matmuls:
            table.add_row(
                f"{row.rows} x {row.in_features} x {row.out_features}",
                f"{row.microseconds:.1f}",
                *(f"{row.times[name]:.2f}" for name in others),
                f"{row.bandwidth_share:.0%}",
                f"{row.relative_error:.1e}",
                row.backend,
            )
        return table

    def _models(self) -> Table:
        title = (
            f"{self.model}: tokens per second, median of {self.repeats} (lowest to highest); prompt of {self.prompt} "
            f"tokens, then {self.tokens} one by one; {counted(self.threads, 'thread')} reading "
            f"{self.read_bandwidth / 1e9:.1f} GB/s; {self.backend}"
        )
        others = self.rows[0].decode_times
        columns = ("model", "decode", *(f"x {name}" for name in others), "roofline", "prefill", "size", "logits' error")
        table = Table(*columns, title=Text(title), title_justify="left")
        for row in self.rows:
            table.add_row(
                Text(row.name),
                f"{row.decode_median:.1f} ({row.decode_low:.1f}-{row.decode_high:.1f})",
                *(f"{row.decode_times[name]:.2f}" for name in others),
                f"{row.decode_share:.0%}",
                f"{row.prefill_median:.0f} ({row.prefill_low:.0f}-{row.prefill_high:.0f})",
                readable_bytes(row.bytes),
                "-" if row.relative_error is None else f"{row.relative_error:.1e}",
            )
        return table


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _flat(record: Mapping[str, Any]) -> dict[str, str]:
    """Field by field as text; a mapping gives a field for each of its keys."""
    flat: dict[str, str] = {}
    for name, value in record.items():
        parts = {f"{name}_{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
        for key, part in parts.items():
            flat[key] = "" if part is None else f"{part:.6g}" if isinstance(part, float) else str(part)
    return flat
