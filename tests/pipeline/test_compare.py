"""A study: every cell a run, judged alike; what is complete is reused."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.commands import refused, run
from rich.console import Console
from typer.testing import Result

from aqlm_cli.errors import ConfigError
from aqlm_cli.evaluation.comparison import Figure, Row, compared, draw
from aqlm_cli.spec.study import load_study


@pytest.fixture
def study(run_file: Path) -> Path:
    settings = yaml.safe_load(run_file.read_text())
    path = run_file.with_name("study.yaml")
    cells = [
        {"method": "rtn", "scheme": "int4g32", "quantize": {"fit": {"epochs": 0}}},
        {},
        {"name": "twice", "scheme": "2x4g8"},
    ]
    path.write_text(yaml.safe_dump({**settings, "cells": cells}, sort_keys=False))
    return path


def comparison() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(Path("runs/study/comparison.json").read_text())
    return stored


def test_every_cell_is_a_run_with_a_row(study: Path) -> None:
    result = run("compare", "study.yaml", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["name"] for row in rows] == ["rtn-int4g32", "aqlm-2x4g8", "twice"]
    for row in rows:
        directory = Path("runs/study") / row["name"]
        assert row["bytes"] == sum(file.stat().st_size for file in directory.glob("packed/*.safetensors"))
        report = json.loads(next(directory.glob("reports/eval-ppl-*.json")).read_text())
        (figure,) = row["figures"]
        assert (figure["perplexity"], figure["divergence"]) == (report["perplexity"], report["divergence"]["mean"])
    assert rows[1]["figures"] == rows[2]["figures"]  # equal settings, equal bytes
    packed = [Path("runs/study", name, "packed/model.safetensors").read_bytes() for name in ("aqlm-2x4g8", "twice")]
    assert packed[0] == packed[1]
    assert not Path("runs/study/rtn-int4g32/calibration").exists(), "it reads no text"
    shared = [Path("runs/study", row["name"], "calibration/windows.safetensors").stat().st_ino for row in rows[1:]]
    assert len(set(shared)) == 1
    lines = list(csv.DictReader(Path("runs/study/comparison.csv").read_text().splitlines()))
    assert [float(line["perplexity"]) for line in lines] == [row["figures"][0]["perplexity"] for row in rows]
    assert Path("runs/study/comparison.md").read_text().count("\n| ") == 5  # head, rule, three rows
    assert Path("runs/study/comparison.svg").read_bytes()[:5] == b"<?xml"


def test_a_killed_comparison_goes_on_after_its_last_cell(study: Path, interrupted_at: Callable[..., Result]) -> None:
    assert run("compare", "study.yaml", "--out", "whole").exit_code == 0
    assert interrupted_at("compared.json", 2, "compare", "study.yaml").exit_code == 130
    assert len(comparison()["rows"]) == 1
    assert interrupted_at("twice/quantized.partial", 1, "compare", "study.yaml").exit_code == 130
    assert len(comparison()["rows"]) == 2
    result = run("compare", "study.yaml", "--verbose")
    assert result.exit_code == 0 and result.output.count("is evaluated already") == 2
    whole = json.loads(Path("whole/comparison.json").read_text())
    assert [row["figures"] for row in comparison()["rows"]] == [row["figures"] for row in whole["rows"]]


def test_a_cell_that_cannot_be_made_is_refused_before_the_first_is_begun(study: Path) -> None:
    settings = yaml.safe_load(study.read_text())
    study.write_text(
        yaml.safe_dump({**settings, "cells": [*settings["cells"], {"method": "rtn", "scheme": "int4g48"}]})
    )
    refused("compare", "study.yaml")
    assert not list(Path("runs/study").glob("*/quantized"))


def test_a_text_that_has_changed_is_measured_again(study: Path) -> None:
    assert run("compare", "study.yaml").exit_code == 0
    before = comparison()["rows"]
    text = Path("notes.txt").read_text()
    Path("notes.txt").write_text(text[len(text) // 3 :] + text[: len(text) // 3])
    result = run("compare", "study.yaml", "--verbose")
    assert result.exit_code == 0 and "is evaluated already" not in result.output
    for old, new in zip(before, comparison()["rows"], strict=True):
        assert old["figures"] != new["figures"] and old["bytes"] == new["bytes"]


def test_rows_of_an_earlier_comparison_stay_until_their_turn_comes(
    study: Path, interrupted_at: Callable[..., Result]
) -> None:
    assert run("compare", "study.yaml").exit_code == 0
    Path("notes.txt").write_text(Path("notes.txt").read_text() * 2)
    assert interrupted_at("compared.json", 2, "compare", "study.yaml").exit_code == 130
    assert [one["name"] for one in comparison()["rows"]] == ["rtn-int4g32", "aqlm-2x4g8", "twice"]


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"row": {}}', "no JSON"])
def test_a_row_that_is_damaged_is_measured_again_or_refused(study: Path, content: str) -> None:
    assert run("compare", "study.yaml").exit_code == 0
    whole = comparison()
    kept = Path("runs/study/twice/reports/compared.json")
    kept.write_text(content)
    result = run("compare", "study.yaml")
    if content in ("{}", '{"row": {}}'):
        assert result.exit_code == 0 and comparison() == whole
    else:
        assert result.exit_code == 1 and str(kept) in result.output and "remove it" in " ".join(result.output.split())


def test_a_cell_may_import_its_codes(study: Path) -> None:
    assert run("compare", "study.yaml").exit_code == 0
    settings = yaml.safe_load(study.read_text())
    packed = "runs/study/twice/packed"
    settings.pop("quantize")
    study.write_text(yaml.safe_dump({**settings, "cells": [{"name": "imported", "quantize": {"import_from": packed}}]}))
    result = run("compare", "study.yaml", "--out", "other", "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["rows"]
    assert (found["method"], found["scheme"]) == ("imported", "2x4g8")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"evaluate": {"kinds": ["ppl", "nonsense"]}}, "there is no evaluation 'nonsense'"),
        ({"evaluate": {"kinds": ["ppl", "tasks"]}}, "the kind tasks asks questions"),
        ({"eval_ppl": {"data": ["missing.txt"]}}, "unknown text source 'missing.txt'"),
        ({"eval_ppl": {"sequence_length": 100_000}}, "lower eval_ppl.sequence_length"),
        ({"device": "cuda:7"}, "--device cuda:7"),
        ({"name": "comparison.json"}, "is no name for a directory"),
    ],
)
def test_a_cell_that_cannot_be_evaluated_is_refused_before_the_first_is_begun(
    study: Path, changes: dict[str, Any], reason: str
) -> None:
    settings = yaml.safe_load(study.read_text())
    study.write_text(yaml.safe_dump({**settings, "cells": [*settings["cells"], {"name": "last", **changes}]}))
    assert reason in refused("compare", "study.yaml")
    assert not list(Path("runs").glob("study/*/quantized"))


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ({"bits": "x"}, "bits must be a number, found 'x'"),
        ({"bits": {"a": 1}}, "bits must be a number"),
        ({"bits": float("nan")}, "no scheme has nan code bits"),
        ({"layer": 5}, "layer must be a list"),
        ({"layer": [1]}, "layer must be a list"),
        ({"layer": ["x"]}, "--layer 'x' is not understood"),
        ({"among": 3}, "among must be a text"),
        ({"target": 0.1}, "target must be a text"),
        ({"target": "kl=0"}, "kl"),
    ],
)
def test_a_flag_of_another_type_is_refused_with_its_cell(tmp_path: Path, cell: dict[str, Any], reason: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"model": "any", "cells": [cell]}))
    with pytest.raises(ConfigError, match=re.escape(reason)) as error:
        load_study(path)
    assert "cell 1" in str(error.value)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (None, "has no cells"),
        ([], "has no cells"),
        (["2x8g8"], "cell 1 must hold keys and values"),
        ([{"schema": "2x8g8"}], "cell 1: unknown key `schema`"),
        ([{"scheme": "2x8g8"}, {"scheme": "2x8g8"}], "two cells are called aqlm-2x8g8"),
        ([{"scheme": "2x8g8", "name": "../out"}], "is no name for a directory"),
        ([{"quantize": {"fit": {"epochs": -1}}}], "epochs"),
    ],
)
def test_a_study_that_is_none_is_refused(tmp_path: Path, cells: Any, reason: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"model": "any", **({} if cells is None else {"cells": cells})}))
    with pytest.raises(ConfigError, match=re.escape(reason)):
        load_study(path)


# ------------------------------------------------------------------------------------------------------------ the table


def row(name: str, size: int, loss: float | None, column: str = "one") -> Row:
    figure = Figure(column, column, 20.0, 0.1, 1.5, 0.01, loss, None if loss is None else 0.0, 0.9, 10.0)
    return Row(name, "rtn", "int4g64", 4.3, size, 1.0, 1, (figure,))


def test_the_front_has_what_no_other_row_beats() -> None:
    rows = [row("small", 10, 0.9), row("beaten", 11, 0.95), row("middle", 20, 0.5), row("as middle", 20, 0.5)]
    rows += [row("large", 30, 0.5), row("best", 40, 0.1)]
    assert compared("study", "model", rows).front == {"one": ("small", "middle", "as middle", "best")}


def test_figures_of_another_passport_have_columns_of_their_own() -> None:
    report = compared("study", "model", [row("a", 10, 0.9), row("b", 20, 0.8, "two")])
    head, first, second = report.cells()
    assert len(head) == 4 + 2 * 5 + 2 and report.front == {"one": ("a",), "two": ("b",)}
    assert first[4] and not first[9] and second[9] and not second[4]


def test_a_row_without_a_divergence_has_the_log_of_its_ratio() -> None:
    assert row("a", 10, None).loss("one") == pytest.approx(math.log(1.5))
    assert row("a", 10, 0.25).loss("one") == 0.25
    assert row("a", 10, 0.25).loss("two") is None


def test_names_are_texts_for_every_table_and_picture() -> None:
    report = compared("[red]study", "m[/big]", [row("a$b$|", 10, 0.9, "cost $x_{ of | $")])
    assert "m[/big]" in str(report.table().title)
    Console(file=io.StringIO()).print(report.table())
    assert r"a$b$\|" in report.as_markdown()
    assert draw(report).keys() == {"png", "svg"}
