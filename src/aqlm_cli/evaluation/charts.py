"""Charts of a report as SVG for a page: they take the colour of its text, and ids differ from chart to chart.

matplotlib draws them. What it draws in INK becomes the page's own colour, light or dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from aqlm_cli.evaluation.plots import logarithmic_y, plain

INK = "#010203"
"""A colour that nothing else has."""

PALETTE = ("#3b82c4", "#d9822b", "#4c9f70", "#b65fcf", "#c7504a", "#8a8d91", "#a08c2d", "#2aa4a8")

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aqlm",
    "font.size": 9,
    **{f"{name}.color": INK for name in ("text", "xtick", "ytick")},
    **{f"axes.{name}": INK for name in ("edgecolor", "labelcolor", "titlecolor")},
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


def bars(parts: Mapping[str, Mapping[str, float]], unit: str, name: str) -> str:
    """One stacked bar for every row, by the size of its parts."""
    kinds = list(dict.fromkeys(kind for row in parts.values() for kind in row))

    def draw(axes: Any) -> None:
        for number, kind in enumerate(kinds):
            left = [sum(row.get(one, 0.0) for one in kinds[:number]) for row in parts.values()]
            widths = [row.get(kind, 0.0) for row in parts.values()]
            axes.barh(list(map(plain, parts)), widths, left=left, color=PALETTE[number % len(PALETTE)], label=kind)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return _drawn(draw, name, (7, 1.3 + 0.4 * len(parts)))


Cells = Mapping[str, Mapping[str, float]]
"""Values by row and column."""


def heat_map(cells: Cells, label: str, name: str, beside: Sequence[Cells] = ()) -> str:
    """A shade for the logarithm of every value above 0, and nothing where there is none.

    The same shade is the same value in the maps of all cells `beside`.
    """
    from matplotlib.colors import LogNorm

    rows, columns = list(cells), list(dict.fromkeys(kind for row in cells.values() for kind in row))
    values = [value for one in (cells, *beside) for row in one.values() for value in row.values() if value > 0]

    def draw(axes: Any) -> None:
        grid = [
            [value if (value := cells[row].get(kind, 0.0)) > 0 else float("nan") for kind in columns] for row in rows
        ]
        shades = axes.imshow(grid, aspect="auto", cmap="cividis", norm=LogNorm(min(values), max(values) * 1.0001))
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        axes.figure.colorbar(shades, ax=axes, label=label)

    drawn = any(value > 0 for row in cells.values() for value in row.values())
    return _drawn(draw, name, (7, 1.5 + 0.17 * len(rows))) if drawn else ""


def points(
    series: Mapping[str, tuple[float, float, float]], labels: tuple[str, str], name: str, line: Sequence[str] = ()
) -> str:
    """A point (x, y, error of y) by name, on a logarithmic y; a line through those of `line`."""

    def draw(axes: Any) -> None:
        for number, (title, (x, y, error)) in enumerate(series.items()):
            axes.errorbar([x], [y], yerr=[error], fmt="o", capsize=3, color=PALETTE[number % len(PALETTE)])
            axes.annotate(plain(title), (x, y), xytext=(5, 4), textcoords="offset points")
        ordered = sorted(series[title][:2] for title in line)
        if len(ordered) > 1:
            axes.plot(*zip(*ordered, strict=True), color=INK, alpha=0.4, zorder=0)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        logarithmic_y(axes)
        axes.margins(x=0.2, y=0.15)
        axes.grid(color=INK, alpha=0.12)

    return _drawn(draw, name, (7, 3.6))


def bounded_bars(values: Mapping[str, tuple[float, float, float, float]], unit: str, name: str) -> str:
    """A bar for each (value, lowest, highest, bound) by name, with its spread and a mark at its bound."""

    def draw(axes: Any) -> None:
        for number, (middle, low, high, bound) in enumerate(values.values()):
            axes.barh([number], [middle], color=PALETTE[0], xerr=[[middle - low], [high - middle]], ecolor=INK)
            axes.plot([bound, bound], [number - 0.4, number + 0.4], color=PALETTE[4], linewidth=2)
        axes.set_yticks(range(len(values)), list(map(plain, values)))
        axes.invert_yaxis()
        axes.set_xlabel(unit)

    return _drawn(draw, name, (7, 1.0 + 0.35 * len(values)))


def histogram(counts: Mapping[str, Sequence[int]], edges: Sequence[float], label: str, name: str) -> str:
    """Shares of all counts, by steps between edges on a logarithmic axis; what lies outside counts at the ends."""

    def draw(axes: Any) -> None:
        for number, (title, found) in enumerate(counts.items()):
            total = sum(found) or 1
            inside = [found[0] + found[1], *found[2:-2], found[-2] + found[-1]]
            shares = [100 * one / total for one in inside]
            axes.stairs(shares, edges, label=plain(title), color=PALETTE[number % len(PALETTE)], linewidth=1.5)
        axes.set(xscale="log", xlabel=label, ylabel="% of the tokens")
        axes.grid(color=INK, alpha=0.12)
        axes.legend(frameon=False)

    return _drawn(draw, name, (7, 3))


def _drawn(draw: Any, name: str, size: tuple[float, float]) -> str:
    """The SVG element of a chart called `name`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    prefix = re.sub(r"\W+", "-", name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    label = html.escape(name)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        lambda found: f'<svg viewBox="{found[1]}" role="img" aria-label="{label}">',
        svg,
        count=1,
    )
    return svg.replace(INK, "currentColor")
