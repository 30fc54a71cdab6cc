"""A study: every cell a run, judged alike; what is complete is reused."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.commands import refused, run
from typer.testing import Result

from aqlm_cli.errors import ConfigError
from aqlm_cli.evaluation.comparison import Figure, Row, compared
from aqlm_cli.spec.study import load_study


@pytest.fixture
def study(run_file: Path) -> Path:
    settings = yaml.safe_load(run_file.read_text())
    path = run_file.with_name("study.yaml")
    cells = [{"method": "rtn", "scheme": "int4g32"}, {}, {"name": "twice", "scheme": "2x4g8"}]
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
    shared = [Path("runs/study", row["name"], "calibration/windows.safetensors").stat().st_ino for row in rows]
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
