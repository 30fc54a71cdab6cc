"""Comparison of many quantized models of one base model: one table, and a picture of loss over size.

Nothing is computed twice: a row holds what the run of a cell and its evaluations said. Figures share a column only
where their passports agree; the rows of another passport get columns of their own. A row is on the front where no other
row of its column has at most its bytes and at most its divergence, and less of one.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from aqlm_cli.evaluation.perplexity import PerplexityReport
from aqlm_cli.formatting import clock, readable_bytes, text_name
from aqlm_cli.records import Record


@dataclass(frozen=True)
class Figure:
    """Figures of a model on one text by one protocol. `column` tells which figures compare."""

    column: str
    title: str
    perplexity: float
    stderr: float
    ratio: float
    ratio_stderr: float
    divergence: float | None
    divergence_stderr: float | None
    agreement: float | None
    base: float


@dataclass(frozen=True)
class Row:
    """One cell. `seconds` and `memory_bytes` are of quantizing; `figures` has one for each text."""

    name: str
    method: str
    scheme: str
    stored_bits: float
    bytes: int
    seconds: float
    memory_bytes: int
    figures: tuple[Figure, ...]

    def loss(self, column: str) -> float | None:
        """The divergence in a column, or the log of the ratio where none was measured."""
        figure = next((one for one in self.figures if one.column == column), None)
        if figure is None:
            return None
        return math.log(figure.ratio) if figure.divergence is None else figure.divergence

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Row:
        """The inverse of `formatting.plain`."""
        return cls(**{**stored, "figures": tuple(Figure(**figure) for figure in stored["figures"])})


@dataclass(frozen=True)
class ComparisonReport(Record):
    """The rows in order of the study; `front` has the names of those that no other beats, by column."""

    study: str
    model: str
    rows: tuple[Row, ...]
    front: dict[str, tuple[str, ...]]
    version: int = 1

    def table(self) -> Table:
        cells = self.cells()
        table = Table(*map(escape, cells[0]), title=Text(f"{self.study}: {self.model}"), title_justify="left")
        for row in cells[1:]:
            table.add_row(*map(Text, row))
        return table

    @property
    def columns(self) -> dict[str, str]:
        """Title of every column of figures, in order of their first row."""
        return {figure.column: figure.title for row in self.rows for figure in row.figures}

    def cells(self) -> list[list[str]]:
        """The head of the table and its rows, as texts; * marks the front."""
        many = len(self.columns) > 1
        head = ["cell", "scheme", "stored bits", "size"]
        for title in self.columns.values():
            of = f", {title}" if many else ""
            head += [f"perplexity{of}", f"ratio{of}", f"KL, nats{of}", f"same token{of}", f"front{of}"]
        lines = [[*head, "time", "memory"]]
        for row in self.rows:
            line = [row.name, f"{row.method} {row.scheme}", f"{row.stored_bits:.3f}", readable_bytes(row.bytes)]
            for column in self.columns:
                line += self._figures(row, column)
            lines.append([*line, clock(row.seconds), readable_bytes(row.memory_bytes)])
        return lines

    def _figures(self, row: Row, column: str) -> list[str]:
        found = next((figure for figure in row.figures if figure.column == column), None)
        if found is None:
            return [""] * 5
        kl, agreed = "", ""
        if found.divergence is not None:
            kl, agreed = f"{found.divergence:.4f} ± {found.divergence_stderr:.4f}", f"{found.agreement:.1%}"
        return [
            f"{found.perplexity:.3f} ± {found.stderr:.3f}",
            f"{found.ratio:.4f} ± {found.ratio_stderr:.4f}",
            kl,
            agreed,
            "*" if row.name in self.front[column] else "",
        ]

    def as_markdown(self) -> str:
        """The table for a page, under what it says about the text."""
        head, *lines = self.cells()
        bases = {figure.column: figure.base for row in self.rows for figure in row.figures}
        about = "; ".join(f"{title}: base model {bases[column]:.3f}" for column, title in self.columns.items())
        rows = [[cell.replace("|", r"\|") for cell in row] for row in (head, ["---"] * len(head), *lines)]
        return f"{about}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)

    def as_csv(self) -> str:
        """One line for every row and column of figures, as plain numbers."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([*_OF_ROW, *_OF_FIGURE, "front"])
        for row in self.rows:
            for figure in row.figures:
                values = [getattr(row, name) for name in _OF_ROW] + [getattr(figure, name) for name in _OF_FIGURE]
                writer.writerow([*values, row.name in self.front[figure.column]])
        return buffer.getvalue()


_OF_ROW = ("name", "method", "scheme", "stored_bits", "bytes", "seconds", "memory_bytes")
_OF_FIGURE = tuple(name for name in Figure.__dataclass_fields__ if name != "column")


def compared(study: str, model: str, rows: Sequence[Row]) -> ComparisonReport:
    """The comparison of these rows."""
    columns = dict.fromkeys(figure.column for row in rows for figure in row.figures)
    front = {
        column: front_of({row.name: (row.bytes, loss) for row in rows if (loss := row.loss(column)) is not None})
        for column in columns
    }
    return ComparisonReport(study, model, tuple(rows), front)


def figure_of(report: PerplexityReport) -> Figure:
    """The figure of a perplexity that was measured beside a base model."""
    kl, formats = report.divergence, report.passport.formats
    assert report.base_model is not None and report.ratio is not None and report.ratio_stderr is not None
    title = f"{text_name(report.data)}, {report.protocol}, {report.sequences} x {report.sequence_length}"
    return Figure(
        column="/".join(report.passport.column),
        title=f"{title}, {formats}" if formats else title,
        perplexity=report.perplexity,
        stderr=report.stderr,
        ratio=report.ratio,
        ratio_stderr=report.ratio_stderr,
        divergence=None if kl is None else kl.mean,
        divergence_stderr=None if kl is None else kl.stderr,
        agreement=None if kl is None else kl.agreement,
        base=report.base_model.perplexity,
    )


def front_of(places: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    """Names of those that no other beats: none has at most their size and at most their loss, and less of one."""

    def beaten(size: float, loss: float) -> bool:
        return any(b <= size and k <= loss and (b, k) != (size, loss) for b, k in places.values())

    return tuple(name for name, place in places.items() if not beaten(*place))


def draw(report: ComparisonReport) -> dict[str, bytes]:
    """Perplexity and divergence over the bytes of the file, one panel each, by format; the front is a line."""
    from matplotlib.figure import Figure as Picture  # takes a second to import

    from aqlm_cli.evaluation.plots import FORMATS, logarithmic_y, plain, rendered

    picture = Picture(figsize=(7, 7), layout="constrained")
    column, title = next(iter(report.columns.items()))
    panels = [("perplexity", "stderr", "perplexity"), ("divergence", "divergence_stderr", "KL, nats a token")]
    for axes, (name, error, label) in zip(picture.subplots(2, sharex=True), panels, strict=True):
        front = []
        for number, row in enumerate(report.rows):
            found = next((one for one in row.figures if one.column == column), None)
            if found is None or getattr(found, name) is None:
                continue
            place = row.bytes / 1e6, getattr(found, name)
            axes.errorbar(*place, yerr=getattr(found, error), fmt="o", capsize=3, color=f"C{number % 10}")
            axes.annotate(plain(row.name), place, xytext=(5, 4), textcoords="offset points", fontsize=8)
            if row.name in report.front[column]:
                front.append(place)
        axes.plot(*zip(*sorted(front), strict=True), color="0.6", zorder=0) if front else None
        axes.set_ylabel(label)
        logarithmic_y(axes)
        axes.grid(color="0.9")
    axes.set_xlabel("MB of the file")
    picture.suptitle(plain(f"{report.model}: {title}"), fontsize=9)
    return {name: rendered(picture, name) for name in FORMATS}
