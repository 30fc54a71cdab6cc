"""One page about quantized models: what they are made of, what was measured, and what it cost, in a single HTML file.

The page loads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from aqlm_cli.evaluation import sections
from aqlm_cli.formatting import readable_bytes, text_name

TEMPLATE = Path(__file__).with_name("report.html")


def page(runs: Sequence[sections.RunFacts]) -> str:
    """The page about the first run, beside the others."""
    first = runs[0]
    made = [
        sections.made_from(first),
        sections.sizes(runs),
        sections.errors(first),
        sections.perplexities(runs),
        sections.divergences(runs),
        sections.attribution(first),
        sections.texts(first),
        sections.speed(runs),
        sections.costs(first),
        sections.Section("run-file", "Run file", text=first.run_file, summary="The complete settings of this run"),
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["code"] = _with_code
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=first.name,
        about=f"{first.model}, {first.method} {first.scheme}",
        tiles=_tiles(first),
        sections=made,
        footer=", ".join(f"{name} {version}" for name, version in first.versions.items()),
    )


def _with_code(text: str) -> Markup:
    """Text in which what stands between backticks is code."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _tiles(run: sections.RunFacts) -> list[tuple[str, str, str]]:
    times = run.base_bytes / run.bytes if run.bytes else 0.0
    tiles = [
        ("size", readable_bytes(run.bytes), f"{times:.2f}x smaller than {readable_bytes(run.base_bytes)}"),
        ("bits a weight", f"{run.stored_bits:.3f}", "stored, with tables and scales"),
    ]
    for report in run.perplexities[:1]:
        ratio = "" if report.get("ratio") is None else f"{report['ratio']:.3f}x the base model's"
        tiles.append(("perplexity", f"{report['perplexity']:.2f}", ratio or text_name(report["data"])))
        if report.get("divergence"):
            kl = report["divergence"]
            tiles.append(("KL", f"{kl['mean']:.3f}", f"nats a token; {kl['agreement']:.1%} the same likeliest token"))
    if run.gate is not None:
        tiles.append(("gate", "collapsed" if run.gate["reasons"] else "passes", "texts beside the base model's"))
    return tiles
