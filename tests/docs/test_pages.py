"""What holds for every page: links lead somewhere, commands exist, settings are valid, pictures have words."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import typer
from helpers import pages

from aqlm_cli.cli.app import app
from aqlm_cli.export import EXPORTERS
from aqlm_cli.spec.run_file import RENAMED, build_config, load_run_file
from aqlm_cli.spec.study import load_study

GROUP = typer.main.get_command(app)
RESULTS = sorted((pages.ROOT / "configs" / "results").rglob("*.yaml"))


def _name(path: Path) -> str:
    return str(path.relative_to(pages.ROOT))


@pytest.mark.parametrize("page", pages.PAGES, ids=_name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{_name(page)} links to {link}"
        assert not anchor or anchor in pages.anchors(target), f"{_name(page)} links to {link}"


@pytest.mark.parametrize("page", pages.PAGES, ids=_name)
def test_commands_and_their_options_exist(page: Path) -> None:
    for _, name, *arguments in pages.commands(page):
        assert name in GROUP.commands, f"{_name(page)}: aqlm {name}"
        parameters = GROUP.commands[name].params
        flags = {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts, "--help")}
        assert {word for word in arguments if word.startswith("--")} <= flags, f"{_name(page)}: aqlm {name}"


@pytest.mark.parametrize("page", pages.PAGES, ids=_name)
def test_settings_shown_are_valid(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(pages.blocks(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        if "cells:" in block:
            load_study(path)
        else:
            build_config(None, path, {"model": "tiny"})


@pytest.mark.parametrize("page", pages.PAGES, ids=_name)
def test_pictures_have_a_text_in_their_place(page: Path) -> None:
    assert all(len(text) > 40 for text in re.findall(r"!\[([^\]]*)\]", page.read_text(encoding="utf-8")))


def test_every_file_of_results_is_valid_and_linked_from_the_page_of_results() -> None:
    page = (pages.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for path in RESULTS:
        assert f"(../{_name(path)})" in page
        build_config(None, path, {})
        assert load_run_file(path)["eval_ppl"] == {"data": ["wikitext-2-raw-v1-test.parquet"]}


def test_numbers_of_the_picture_are_those_of_the_page() -> None:
    page = (pages.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    with open(pages.ROOT / "docs" / "data" / "perplexity.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        digits = 0 if "." not in row["perplexity"] else 3
        told = f"{float(row['perplexity']):,.{digits}f} ± {float(row['standard_error']):,.{digits}f}"
        line = next(line for line in page.splitlines() if told in line and line.startswith("|"))
        assert row["stored_bits"] in line and (row["megabytes"] or "|") in line and row["config"] in line


def test_table_of_formats_has_a_column_for_each_in_their_order() -> None:
    page = (pages.ROOT / "docs" / "guides" / "formats-and-loaders.md").read_text(encoding="utf-8")
    heading = next(line for line in page.splitlines() if line.startswith("| | "))
    assert re.findall(r"`(\w+)`", heading) == list(EXPORTERS)


def test_changelog_has_every_key_of_the_run_file_that_was_renamed() -> None:
    page = (pages.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for old, new in RENAMED.items():
        same = old.rpartition(".")[2] == new.rpartition(".")[2] and old.startswith("quantize.search.")
        row = "| `quantize.search.NAME` | `quantize.aqlm.NAME`" if same else f"| `{old}` | `{new}`"
        assert row in page


@pytest.mark.parametrize("page", pages.PAGES, ids=_name)
def test_files_of_the_code_that_are_named_exist(page: Path) -> None:
    roots = [pages.ROOT / folder for folder in (".", "src/aqlm_cli", "kernels", "kernels/aqlm_kernels")]
    for name in re.findall(r"`([\w/-]+/\w+\.(?:py|yaml|md|svg|csv))`", page.read_text(encoding="utf-8")):
        if not re.search(r"mean|sign|NAME", name):  # examples of what one could add
            assert any((root / name).exists() for root in roots), f"{_name(page)} names {name}"
