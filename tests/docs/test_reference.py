"""The reference pages are what the program says of itself, and it says something of everything."""

from __future__ import annotations

import importlib.util
import types

import pytest
import typer
from helpers import pages

import aqlm_cli
import aqlm_kernels
from aqlm_cli.cli.app import app

GROUP = typer.main.get_command(app)


def _generator() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("generate", pages.ROOT / "docs" / "reference" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cli.md", "run-file.md", "python.md"])
def test_page_is_what_the_generator_writes(name: str) -> None:
    page = pages.ROOT / "docs" / "reference" / name
    assert page.read_text(encoding="utf-8") == _generator().pages()[name], "run `make docs-reference`"


@pytest.mark.parametrize("name", sorted(GROUP.commands))
def test_every_command_and_option_has_help(name: str) -> None:
    command = GROUP.commands[name]
    assert command.help and "Example:" in command.help
    for parameter in command.params:
        assert parameter.help, f"aqlm {name}: {parameter.name}"


@pytest.mark.parametrize("module", [aqlm_cli, aqlm_kernels], ids=lambda module: module.__name__)
def test_every_public_name_has_a_docstring(module: types.ModuleType) -> None:
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        assert not callable(thing) or (thing.__doc__ or "").strip(), name


def test_every_setting_is_explained() -> None:
    generator = _generator()
    comments = generator.comments_of((pages.ROOT / "configs" / "default.yaml").read_text(encoding="utf-8"))
    for path, section in generator.sections(generator.RunConfig):
        for row in generator.settings_rows(path, section, comments):
            assert row[-1] or row[0] == "`model`", f"{path}: {row[0]} has no comment in configs/default.yaml"
