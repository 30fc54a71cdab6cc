"""`import aqlm_cli` is the command line without the command line: the same stages, bytes and errors."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from helpers import commands
from helpers.commands import made, refused, run

import aqlm_cli
from aqlm_cli.cli.app import app
from aqlm_cli.errors import ArtifactError, ModelError, UsageError
from aqlm_cli.events import BlockQuantized, Event

FOR_THE_CONSOLE = {"json", "quiet", "verbose", "dry_run", "help", "teacher"}
FOR_PYTHON = {"emit", "self"}


def test_the_import_loads_neither_torch_nor_transformers_and_all_its_names_exist() -> None:
    code = """
import sys, aqlm_cli
print(sorted({'torch', 'transformers', 'datasets', 'numba', 'aqlm_kernels'} & sys.modules.keys()), dir(aqlm_cli))
print([callable(getattr(aqlm_cli, name)) for name in aqlm_cli.__all__])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "[] ['AqlmError', 'Run', 'load', 'open_run', 'quantize']"
    assert second == str([True] * 5)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        aqlm_cli.quantise  # noqa: B018


@pytest.mark.parametrize(
    ("command", "function"), [("quantize", aqlm_cli.quantize), ("finetune", aqlm_cli.Run.finetune)]
)
def test_keywords_are_the_flags_of_the_command(command: str, function: Callable[..., object]) -> None:
    flags = {str(parameter.name) for parameter in typer.main.get_group(app).commands[command].params}
    if command != "quantize":  # where it is a flag, and not the run itself
        flags -= {"target"}
    assert inspect.signature(function).parameters.keys() - FOR_PYTHON == flags - FOR_THE_CONSOLE


def test_python_and_the_command_write_the_same_bytes(run_file: Path) -> None:
    run_file.write_text(commands.RUN_FILE.replace("builtin:8", "builtin:16"))
    assert run("quantize", "--config", "run.yaml", "--scheme", "2x5g8", "--out", "typed").exit_code == 0
    assert run("finetune", "typed", "--steps", "2", "--data", "builtin:40", "--batch", "2").exit_code == 0
    told: list[Event] = []
    called = aqlm_cli.quantize(config="run.yaml", scheme="2x5g8", out="called", emit=told.append)
    assert told
    assert called.finetune(steps=2, data="builtin:40", batch=2).path == called.path == Path("called")
    of_python, of_command = (
        {name: content for name, content in made(place).items() if not name.startswith("reports/")}  # they tell times
        for place in ("called", "typed")
    )
    assert of_python == of_command and "packed/model.safetensors" in of_python


@pytest.fixture
def quantized(run_file: Path, capfd: pytest.CaptureFixture[str]) -> aqlm_cli.Run:
    capfd.readouterr()
    run = aqlm_cli.quantize("tiny", config="run.yaml", out="run")
    assert capfd.readouterr() == ("", ""), "silent unless it is given an emit"
    return run


def test_a_run_is_evaluated_packed_and_loaded(quantized: aqlm_cli.Run) -> None:
    report = quantized.evaluate()
    assert report.data == "notes.txt" and report.base_model is not None and report.ratio is not None
    assert aqlm_cli.open_run("run") == quantized and quantized.config.model == "tiny"
    model, tokenizer = aqlm_cli.load(quantized.path, dtype="float32")
    ids = torch.tensor([tokenizer.encode("1 is 1. ")])
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    assert quantized.pack("dense", overwrite=True).as_json()["format"] == "dense"


def test_load_takes_whatever_model_may_be(run_file: Path) -> None:
    model, tokenizer = aqlm_cli.load("tiny", dtype="float32")
    assert model.dtype == torch.float32 and tokenizer.decode(tokenizer.encode("text")).endswith("text")
    with pytest.raises(UsageError, match="'int8' is no floating-point type"):
        aqlm_cli.load("tiny", dtype="int8")


def test_errors_are_the_lines_of_the_command(run_file: Path) -> None:
    with pytest.raises(UsageError) as both:
        aqlm_cli.quantize("tiny", bits=2, scheme="2x8g8")
    assert refused("quantize", "tiny", "--bits", "2", "--scheme", "2x8g8", status=2) == f"error: {both.value}\n"
    with pytest.raises(ArtifactError) as missing:
        aqlm_cli.open_run("nowhere")
    assert refused("pack", "nowhere") == f"error: {missing.value}\n"


# ------------------------------------------------------------------------------------------ arguments that are no such


@pytest.mark.parametrize(
    ("keyword", "value", "words"),
    [
        ("bits", "2", "`bits` takes float | None, not '2'"),
        ("bits", True, "`bits` takes float | None, not True"),
        ("method", ["aqlm"], "`method` takes str | None, not ['aqlm']"),
        ("only", "x", "`only` takes list[str] | tuple[str, ...] | None, not 'x'"),
        ("skip", [3], "`skip` takes list[str] | tuple[str, ...] | None, not [3]"),
        ("config", 3, "`config` takes str | Path | None, not 3"),
        ("out", b"run", "`out` takes str | Path | None, not b'run'"),
        ("out", "a\0b", "`out` takes str | Path | None, not 'a\\x00b'"),
        ("preset", [], "`preset` takes str | None, not []"),
        ("overwrite", "no", "`overwrite` takes bool, not 'no'"),
        ("emit", 3, "`emit` takes Emit | None, not 3"),
    ],
)
def test_an_argument_of_another_type_is_one_line(run_file: Path, keyword: str, value: Any, words: str) -> None:
    with pytest.raises(UsageError) as error:
        aqlm_cli.quantize("tiny", **{"config": "run.yaml", "out": "new", keyword: value})
    assert str(error.value) == f"quantize: {words}"
    assert not Path("new").exists() and not Path("runs").exists()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: aqlm_cli.open_run(None), "open_run: `path` takes str | Path, not None"),  # type: ignore[arg-type]
        (lambda: aqlm_cli.Run(3), "Run: `path` takes str | Path, not 3"),  # type: ignore[arg-type]
        (lambda: aqlm_cli.load("tiny", dtype=torch.half), "load: `dtype` takes str | None, not torch.float16"),  # type: ignore[arg-type]
        (lambda: aqlm_cli.load("tiny", device="tpu"), "there is no device 'tpu'; choose cpu, cuda or cuda:NUMBER"),
        (lambda: aqlm_cli.load("tiny", device="cuda:99"), "--device cuda:99: torch finds"),
    ],
)
def test_other_functions_check_their_arguments_too(run_file: Path, call: Callable[[], object], words: str) -> None:
    with pytest.raises(UsageError) as error:
        call()
    assert words in str(error.value)


def test_a_run_may_be_named_by_text(finished_run: Path) -> None:
    assert aqlm_cli.Run("run") == aqlm_cli.open_run(finished_run)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "words"), [("x" * 5000, "neither locally"), ("~nobody-of-this-name/x", "x ")])
def test_a_name_that_can_be_no_path_is_a_model_that_does_not_exist(run_file: Path, name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        aqlm_cli.quantize(name, bits=2)


@pytest.mark.parametrize("count", [0, -1])
def test_no_sequences_are_none_to_evaluate(finished_run: Path, count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} sequences are none"):
        aqlm_cli.open_run(finished_run).evaluate(sequences=count)


def test_an_interruption_in_a_session_leaves_what_the_next_call_resumes(run_file: Path, workspace: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, BlockQuantized):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        aqlm_cli.quantize(config="run.yaml", out="run", emit=interrupt)
    assert aqlm_cli.quantize(config="run.yaml", out="run").path == Path("run")
    assert made("run") == made(workspace / "run")
