"""Pictures of what was measured, as PNG and SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from aqlm_cli.evaluation.speed_report import BenchReport, BenchRow
from aqlm_cli.formatting import counted

FORMATS = ("png", "svg")


def draw_speed(report: BenchReport) -> dict[str, bytes]:
    """Tokens per second of each model over the bytes that one token reads, below the line that memory bounds.

    The file's content by its format.
    """
    from matplotlib.figure import Figure  # takes a second to import
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    read = [report.read_bandwidth / row.decode_bound for row in report.rows]  # bytes a token
    ends = [min(read) / 1.6, max(read) * 1.6]
    axes.plot([one / 1e6 for one in ends], [report.read_bandwidth / one for one in ends], color="0.3")
    for number, (row, size) in enumerate(zip(report.rows, read, strict=True)):
        _point(axes, row, size / 1e6, f"C{number}")
    axes.set(xscale="log", yscale="log", xlabel="MB that one token reads", ylabel="tokens per second")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    axes.grid(color="0.9")
    axes.set_title(_title(report), fontsize=9)
    figure.legend(fontsize=8, loc="outside lower left")
    return {name: rendered(figure, name) for name in FORMATS}


def plain(text: str) -> str:
    """The text as a label that matplotlib draws as it is: between two of its $ it would read a formula."""
    return text.replace("$", r"\$")


def logarithmic_y(axes: Any) -> None:
    """A logarithmic y whose ticks are plain numbers."""
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter())


def draw_curve(curve: Sequence[Mapping[str, float]]) -> dict[str, bytes]:
    """The held-out KL of a finetuning over its minutes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([point["seconds"] / 60 for point in curve], [point["held_out"] for point in curve], marker="o")
    axes.set(xlabel="minutes", ylabel="held-out KL, nats a token")
    axes.grid(color="0.9")
    return {name: rendered(figure, name) for name in FORMATS}


def _point(axes: Any, row: BenchRow, megabytes: float, color: str) -> None:
    spread = [[row.decode_median - row.decode_low], [row.decode_high - row.decode_median]]
    label = f"{plain(row.name)}: {row.decode_median:.1f} tokens/s, {row.decode_share:.0%} of what memory allows"
    axes.errorbar([megabytes], [row.decode_median], yerr=spread, fmt="o", capsize=3, color=color, label=label)


def _title(report: BenchReport) -> str:
    model, threads = plain(report.model), counted(report.threads, "thread")
    return f"{model}: decoding with {threads}; the line is {report.read_bandwidth / 1e9:.1f} GB/s of memory"


def rendered(figure: Any, name: str) -> bytes:
    """The content of a file of this format."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # The same numbers give the same bytes: no date, and no random names inside an SVG.
    with rc_context({"svg.hashsalt": "aqlm"}):
        figure.savefig(buffer, format=name, dpi=150, metadata={"Date": None} if name == "svg" else {"Software": None})
    return buffer.getvalue()
