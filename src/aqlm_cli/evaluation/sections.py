"""The sections of a page about quantized models.

Figures come from the reports of the runs: nothing is computed a second time, and what was not measured says the command
that does it.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aqlm_cli.evaluation import charts
from aqlm_cli.evaluation.attribution import block_of, kind_of
from aqlm_cli.evaluation.comparison import front_of
from aqlm_cli.evaluation.estimates import EDGES
from aqlm_cli.formatting import clock, readable_bytes, text_name


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run directory about itself, as plain values.

    `layers` has the relative error of every layer, `fitted` the same after its block was fitted, `blocks` the error of
    a block's output and the share of it that fitting removed, `parts` the bytes of the file; `perplexities`, `gate`,
    `attribution`, `bench` are reports in JSON.
    `costs` has planned and actual seconds and bytes of memory by stage.
    """

    name: str
    model: str
    scheme: str
    method: str
    stored_bits: float
    bytes: int
    base_bytes: int
    made_from: Mapping[str, str]
    parts: Mapping[str, int]
    layers: Mapping[str, float]
    fitted: Mapping[str, float]
    blocks: Mapping[str, Mapping[str, float]]
    perplexities: Sequence[Mapping[str, Any]]
    gate: Mapping[str, Any] | None
    attribution: Mapping[str, Any] | None
    bench: Mapping[str, Any] | None
    costs: Mapping[str, Mapping[str, float | None]]
    run_file: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Chart:
    svg: str
    caption: str


@dataclass(frozen=True)
class Rows:
    caption: str
    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    about: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Rows] = ()
    text: str = ""
    summary: str = ""


def _missing(what: str, run: RunFacts, command: str) -> str:
    return f"{what} not been measured; `aqlm {command.format(run=run.name)}` does it."


def made_from(run: RunFacts) -> Section:
    return Section("made-from", "Made from", tables=[Rows("What the model was made from", [*run.made_from.items()])])


def sizes(runs: Sequence[RunFacts]) -> Section:
    megabytes = {run.name: {part: size / 1e6 for part, size in run.parts.items()} for run in runs}
    rows = [(part, readable_bytes(size)) for part, size in runs[0].parts.items()]
    chart = Chart(charts.bars(megabytes, "MB", "bytes by part"), "Bytes of the safetensors files, by part")
    return Section("bytes", "Bytes", charts=[chart], tables=[Rows(f"Parts of {runs[0].name}", rows, ("part", "size"))])


def errors(run: RunFacts) -> Section:
    found, fitted = _cells(run.layers, max), _cells(run.fitted, max)
    caption = "Relative error of each layer's output"
    drawn = [
        Chart(charts.heat_map(found, "relative error", "relative error of every layer", [fitted]), caption),
        Chart(
            charts.heat_map(fitted, "relative error", "relative error of every layer after fitting", [found]),
            f"{caption} after its block was fitted; fitting lowers the error of the block, not of each layer",
        ),
    ]
    drawn = [chart for chart in drawn if chart.svg]
    fits = [
        (path, f"{_before(one):.4g}", f"{one['error']:.4g}", f"{one['gain']:.1%}")
        for path, one in sorted(run.blocks.items(), key=lambda one: _order(_number(one[0])))
    ]
    head = ("block", "before fitting", "after", "removed")
    tables = [Rows("Relative error of each block's output", fits, head)] if fits else []
    return Section("errors", "Errors by layer", charts=drawn, tables=tables)


def _before(block: Mapping[str, float]) -> float:
    """The error before fitting: what was removed is a share of it."""
    return block["error"] / (1 - block["gain"]) if block["gain"] < 1 else 0.0


def perplexities(runs: Sequence[RunFacts]) -> Section:
    rows, head = [], ("model", "text", "protocol", "perplexity", "ratio", "KL, nats a token", "same likeliest token")
    groups: dict[tuple[str, str], dict[str, tuple[float, float, float]]] = defaultdict(dict)  # title, digest of text
    for run in runs:
        for report in run.perplexities:
            kl, data, protocol = report.get("divergence"), text_name(report["data"]), report.get("protocol", "gptq")
            passport = report.get("passport", {})
            protocol += f", {passport['formats']}" if passport.get("formats") else ""
            title = f"{data}, {protocol}, {report['sequences']} x {report['sequence_length']}, {report['dtype']}"
            key = title, passport.get("text", "")
            rows.append(
                (
                    run.name,
                    data,
                    f"{protocol}, {report['sequences']} x {report['sequence_length']}, {report['dtype']}",
                    f"{report['perplexity']:.3f} ± {report['stderr']:.3f}",
                    _with_error(report.get("ratio"), report.get("ratio_stderr"), 4),
                    _with_error(kl and kl["mean"], kl and kl["stderr"], 4),
                    f"{kl['agreement']:.1%}" if kl else "",
                )
            )
            groups[key][run.name] = run.bytes / 1e6, report["perplexity"], report["stderr"]
            base = report.get("base_model")
            if base:
                groups[key]["base model"] = run.base_bytes / 1e6, base["perplexity"], base["stderr"]
    if not rows:
        return Section("perplexity", "Perplexity", _missing("Perplexity has", runs[0], "eval-ppl {run}"))
    drawn = []
    for (title, _), found in groups.items():
        front = front_of({name: (x, y) for name, (x, y, _) in found.items()})
        svg = charts.points(found, ("MB of the file", "perplexity"), f"perplexity over size: {title}", front)
        caption = f"{title}: perplexity over size, with standard errors; the line joins what nothing smaller beats"
        drawn.append(Chart(svg, caption))
    return Section(
        "perplexity", "Perplexity", charts=drawn, tables=[Rows("Perplexity beside the base model", rows, head)]
    )


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def divergences(runs: Sequence[RunFacts]) -> Section:
    counts, rows = {}, []
    for run in runs:
        for report in run.perplexities:
            kl = report.get("divergence")
            if kl and kl.get("histogram"):
                name = f"{run.name}, {text_name(report['data'])}"
                counts[name] = kl["histogram"]
                rows.append((name, *(f"{kl[key]:.4g}" for key in ("mean", "median", "percentile_99", "maximum"))))
    if not counts:
        about = _missing("The divergence from the base model has", runs[0], "eval-ppl {run}")
        return Section("divergence", "Divergence", about)
    chart = charts.histogram(counts, EDGES, "KL(base || model), nats", "divergence of single tokens")
    head = ("model, text", "mean", "median", "99 %", "maximum")
    return Section(
        "divergence",
        "Divergence",
        charts=[Chart(chart, "Tokens by their divergence; at the ends with all beyond")],
        tables=[Rows("KL(base || model) of the predictions, in nats", rows, head)],
    )


def attribution(run: RunFacts) -> Section:
    if run.attribution is None:
        command = "evaluate {run} --kind attribution"
        return Section("attribution", "What causes the divergence", _missing("Layers have", run, command))
    effects = run.attribution["effects"]
    svg = charts.heat_map(_cells(effects, operator.add), "KL, nats a token", "divergence that each layer causes alone")
    worst = sorted(effects.items(), key=lambda one: -one[1])[:10]
    rows = [(path, f"{effect:.5f}") for path, effect in worst]
    return Section(
        "attribution",
        "What causes the divergence",
        charts=[Chart(svg, f"Each {run.attribution['unit']} swapped {run.attribution['way']} alone")] if svg else [],
        tables=[Rows("The ten that cause most", rows, (run.attribution["unit"], "KL, nats a token"))],
    )


def texts(run: RunFacts) -> Section:
    if run.gate is None:
        return Section("texts", "Texts", _missing("Texts have", run, "evaluate {run} --kind gate"))
    rows = [(one["prompt"], one["base"]["text"], one["model"]["text"]) for one in run.gate["samples"]]
    verdict = "; ".join(run.gate["reasons"]) or "The model passes the gate."
    about = f"{verdict} It agrees with its base model for {run.gate['agreement']:.1f} tokens on average."
    head = ("prompt", "base model", "quantized")
    return Section("texts", "Texts", about, tables=[Rows("Greedy continuations, side by side", rows, head)])


def speed(runs: Sequence[RunFacts]) -> Section:
    rows, speeds = [], {}
    for run in runs:
        for row in (run.bench or {}).get("rows", ()):
            share = row["decode_median"] / row["decode_bound"]
            error = "" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
            spread = f"{row['decode_median']:.1f} ({row['decode_low']:.1f} to {row['decode_high']:.1f})"
            name = f"{run.name}: {row['name']}"
            speeds[name] = row["decode_median"], row["decode_low"], row["decode_high"], row["decode_bound"]
            rows.append((name, spread, f"{share:.0%}", f"{row['prefill_median']:.1f}", error))
    if not rows:
        return Section("speed", "Speed", _missing("Speed has", runs[0], "bench {run}"))
    head = ("model", "decoding, tokens/s", "of what memory allows", "prompt, tokens/s", "error of the logits")
    svg = charts.bounded_bars(speeds, "tokens/s", "decoding beside the bound of memory")
    caption = "Decoding; the mark is the bound: the bandwidth of the memory over the bytes that a token reads"
    return Section("speed", "Speed", charts=[Chart(svg, caption)], tables=[Rows("Tokens per second", rows, head)])


def costs(run: RunFacts) -> Section:
    def told(value: float | None, form: Any) -> str:
        return "" if value is None else str(form(value))

    rows = [
        (
            stage,
            told(cost.get("planned_seconds"), clock),
            told(cost.get("seconds"), clock),
            told(cost.get("planned_memory"), lambda size: readable_bytes(int(size))),
            told(cost.get("memory"), lambda size: readable_bytes(int(size))),
        )
        for stage, cost in run.costs.items()
    ]
    head = ("stage", "planned time", "time", "planned memory", "memory")
    return Section("costs", "What it took", tables=[Rows("Planned and actual cost of each stage", rows, head)])


def _cells(values: Mapping[str, float], join: Callable[[float, float], float]) -> dict[str, dict[str, float]]:
    """Values of layers by block, in order, and kind; many of one kind in a block, such as experts, are joined."""
    cells: dict[str, dict[str, float]] = defaultdict(dict)
    for path, value in values.items():
        row, kind = cells[_number(path)], kind_of(path)
        row[kind] = join(row[kind], value) if kind in row else value
    return {block: cells[block] for block in sorted(cells, key=_order)}


def _number(path: str) -> str:
    """The number of the block that a layer lies in, or of a block itself; "outside" where there is none."""
    return block_of(path).rpartition(".")[2] or "outside"


def _order(number: str) -> int:
    return -1 if number == "outside" else int(number)
