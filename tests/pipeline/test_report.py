"""The page about a run: it has the figures of the run's own reports, loads nothing, and says what is missing."""

from __future__ import annotations

import html
import json
import operator
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import refused, run

from aqlm_cli.evaluation import charts, sections


class Page(HTMLParser):
    """Ids, tags and addresses of a page; every tag is closed."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [value for value in [found.get("id")] if value]
        self.addresses += [value for name in ("src", "href", "xlink:href") if (value := found.get(name))]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


SHORT = """
evaluate:
  gate: {tokens: 12, prompts: [One two, x = ]}
  attribution: {sequences: 2, sequence_length: 32}
"""


@pytest.fixture
def made(run_file: Path) -> Path:
    run_file.write_text(run_file.read_text() + SHORT)
    for name, scheme in ("first", "2x4g8"), ("second", "1x4g8"):
        assert run("quantize", "--config", "run.yaml", "--scheme", scheme, "--out", name).exit_code == 0
    return Path("first")


def figures(name: str) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(next(Path("first/reports").glob(name)).read_text())
    return stored


def test_a_page_has_the_figures_of_the_reports(made: Path) -> None:
    assert run("evaluate", "first", "--kind", "ppl,gate,attribution").exit_code in (0, 3)
    assert run("eval-ppl", "second").exit_code == 0 and run("bench", "second").exit_code == 0
    result = run("report", "first", "second", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["missing"] == ["speed"] and told["runs"] == 2
    text = (made / "reports/report.html").read_text()
    assert told["bytes"] == len(text.encode()) < 2e6
    page = Page(text)
    assert not page.open and max(Counter(page.ids).values()) == 1
    outside = [address for address in page.addresses if not address.startswith(("#", "data:"))]
    inside = {address[1:] for address in page.addresses if address.startswith("#")}
    assert not outside and inside <= set(page.ids)
    measured, gate, attribution = figures("eval-ppl-*"), figures("eval-gate.json"), figures("eval-attribution-*")
    assert f"{measured['perplexity']:.3f} ± {measured['stderr']:.3f}" in text
    assert f"{measured['divergence']['mean']:.4f} ± {measured['divergence']['stderr']:.4f}" in text
    assert html.escape(gate["samples"][0]["prompt"]) in html.unescape(text)
    assert f"{max(attribution['effects'].values()):.5f}" in text
    manifest = json.loads((made / "quantized/manifest.json").read_text())
    for path, block in manifest["results"]["blocks"].items():
        assert f'<th scope="row">{path}</th><td class="short">{block["error"] / (1 - block["gain"]):.4g}</td>' in text
    speed = json.loads(next(Path("second/reports").glob("bench*.json")).read_text())["rows"]
    assert speed and all(f"second: {row['name']}" in text for row in speed)
    assert 'aria-label="decoding beside the bound of memory"' in text
    assert text.count('aria-label="relative error of every layer') == 2, "before fitting and after"
    assert "scheme: 2x4g8" in text


def test_a_heat_map_has_the_blocks_in_their_order() -> None:
    layers = {f"model.layers.{block}.mlp.up_proj": 0.1 + block for block in (0, 1, 10, 11, 2)}
    layers |= {"model.embed_tokens": 0.5, "model.layers.2.mlp.experts.1.up_proj": 7.0}
    cells = sections._cells(layers, max)
    assert list(cells) == ["outside", "0", "1", "2", "10", "11"]
    assert cells["2"] == {"up_proj": 7.0} and cells["10"] == {"up_proj": 10.1}
    assert sections._cells(layers, operator.add)["2"] == {"up_proj": 2.1 + 7.0}, "effects of experts add up"


def test_a_perplexity_is_drawn_over_plain_numbers() -> None:
    drawn = charts.points({"one": (1.0, 21.0, 0.5), "two": (2.0, 27.0, 0.5)}, ("MB", "perplexity"), "a chart")
    assert "times" not in drawn and ">24<" in drawn


def test_where_no_block_is_fitted_the_errors_before_are_drawn_alone(run_file: Path) -> None:
    run_file.write_text(run_file.read_text().replace("epochs: 1", "epochs: 0"))
    assert run("quantize", "--config", "run.yaml", "--out", "unfitted").exit_code == 0
    assert run("report", "unfitted").exit_code == 0
    text = Path("unfitted/reports/report.html").read_text()
    assert text.count('aria-label="relative error of every layer') == 1


def test_the_parts_of_the_file_add_up_to_it(made: Path) -> None:
    from aqlm_cli.pipeline.stages.report import _parts

    parts = _parts(made / "packed", set())
    assert sum(parts.values()) == sum(path.stat().st_size for path in (made / "packed").glob("*.safetensors"))
    weights = json.loads((made / "quantized/manifest.json").read_text())["results"]["plan"]
    assert parts["codes"] > 0 and parts["codebooks"] > 0 and 0 < parts["headers"] < 2**14
    assert weights


def test_text_of_a_model_is_escaped(made: Path) -> None:
    assert run("evaluate", "first", "--kind", "gate").exit_code in (0, 3)
    file = made / "reports/eval-gate.json"
    stored = json.loads(file.read_text())
    stored["samples"][0]["model"]["text"] = "<script>alert(1)</script>"
    file.write_text(json.dumps(stored))
    assert run("report", "first").exit_code == 0
    text = (made / "reports/report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text


def test_any_name_of_a_text_is_a_text_on_the_page(made: Path) -> None:
    assert run("eval-ppl", "first").exit_code == 0
    file = next((made / "reports").glob("eval-ppl-*"))
    stored = json.loads(file.read_text())
    for name in ('a" onload="alert(1)" x="<b>.txt', r"a\qb.txt", r"a\1b.txt", "cost $x_{ of $.txt", r"run$\foo$.txt"):
        file.write_text(json.dumps({**stored, "data": name}))
        assert run("report", "first").exit_code == 0, name
        text = (made / "reports/report.html").read_text()
        page = Page(text)
        assert not page.open and " onload=" not in re.sub(r'aria-label="[^"]*"', "", text).split("<table")[0]
        labels = re.findall(r'<svg viewBox="[^"]*" role="img" aria-label="([^"]*)">', text)
        assert any(html.unescape(label).startswith(f"perplexity over size: {name}") for label in labels), name


@pytest.mark.parametrize("content", ["[]", "3", "null", "[" * 200_000, "{}", '{"data": "x"}'])
def test_a_report_that_is_none_is_refused_by_name(made: Path, content: str) -> None:
    (made / "reports").mkdir(exist_ok=True)
    (made / "reports/eval-ppl-x.json").write_text(content)
    assert "first/reports" in refused("report", "first")


@pytest.mark.parametrize(
    ("name", "content"), [("bench.json", {"rows": 5}), ("eval-gate.json", {}), ("eval-attribution-x.json", {"a": 1})]
)
def test_a_foreign_report_of_any_kind_is_refused(made: Path, name: str, content: Any) -> None:
    (made / "reports").mkdir(exist_ok=True)
    (made / "reports" / name).write_text(json.dumps(content))
    assert "no report of this version" in refused("report", "first")


def test_a_run_that_is_named_twice_and_a_page_without_a_name_are_refused(made: Path) -> None:
    assert "first is named twice" in refused("report", "first", "second", "first", status=2)
    assert "is no file" in refused("report", "first", "--out", "", status=2)


def test_figures_of_two_texts_of_one_name_are_not_drawn_together(made: Path) -> None:
    assert run("eval-ppl", "first").exit_code == 0 and run("eval-ppl", "second").exit_code == 0
    file = next(Path("second/reports").glob("eval-ppl-*"))
    stored = json.loads(file.read_text())
    for changes, charts_expected in (({}, 1), ({"passport": {**stored["passport"], "text": "0" * 16}}, 2)):
        file.write_text(json.dumps({**stored, **changes}))
        assert run("report", "first", "second").exit_code == 0
        assert (made / "reports/report.html").read_text().count('aria-label="perplexity over size') == charts_expected


def test_reports_on_an_earlier_model_of_the_run_are_left_out(made: Path) -> None:
    assert run("eval-ppl", "first").exit_code == 0
    file = next((made / "reports").glob("eval-ppl-*"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantized": "that of another"}))
    assert run("report", "first").exit_code == 0
    text = (made / "reports/report.html").read_text()
    assert re.search("Perplexity has not been measured; <code>aqlm eval-ppl first</code> does it", text)
    assert re.search("Speed has not been measured; <code>aqlm bench first</code> does it", text)


def test_a_run_that_is_not_packed_is_refused(run_file: Path) -> None:
    assert run("calibrate", "--config", "run.yaml", "--out", "begun").exit_code == 0
    assert "no complete quantized and packed model" in refused("report", "begun")
    assert "is not a run" in refused("report", "nowhere")
