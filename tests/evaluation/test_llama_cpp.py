"""llama.cpp beside ours, with a program that answers as llama-bench does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from aqlm_cli.errors import ModelError, UsageError
from aqlm_cli.evaluation.llama_cpp import find_llama_models


def program(directory: Path, body: str) -> Path:
    """A program that writes its arguments to `calls` and then does `body`."""
    path = directory / "llama-bench"
    path.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"with open({str(directory / 'calls')!r}, 'a') as calls: calls.write(json.dumps(sys.argv[1:]) + chr(10))\n"
        f"arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n{body}\n"
    )
    path.chmod(0o755)
    return path


def answering(directory: Path) -> Path:
    return program(
        directory,
        "speed = 100.0 if arguments['-n'] == '0' else 20.0\n"
        "print(json.dumps([{'model_type': 'llama 1B Q2_K', 'model_size': 58, 'avg_ts': speed}]))",
    )


def test_prompt_and_decoding_are_measured_apart_with_the_threads_asked(tmp_path: Path) -> None:
    (model,) = find_llama_models(str(answering(tmp_path)), [str(tmp_path / "a.gguf")])
    assert (model.name, model.bytes) == ("a.gguf, llama 1B Q2_K", 58)
    assert model.speed(prompt=512, tokens=32, threads=2) == (100.0, 20.0)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    common = ["-r", "1", "-ngl", "0", "-o", "json"]
    assert calls[1] == ["-m", str(tmp_path / "a.gguf"), "-t", "2", "-p", "512", "-n", "0", *common]
    assert calls[2] == ["-m", str(tmp_path / "a.gguf"), "-t", "2", "-p", "0", "-n", "32", "-d", "512", *common]


def test_program_and_files_go_together(tmp_path: Path) -> None:
    assert find_llama_models(None, []) == []
    with pytest.raises(UsageError, match="give both"):
        find_llama_models(str(answering(tmp_path)), [])
    with pytest.raises(UsageError, match="give both"):
        find_llama_models(None, ["a.gguf"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('error: failed to load model', file=sys.stderr); sys.exit(1)", "error: failed to load model"),
        ("sys.exit(3)", "exit status 3"),
        ("print('[]')", r"\[\]"),
        ("print('[{}]')", r"\[{}\]"),
        ("print('7')", "7"),
    ],
)
def test_a_program_that_does_not_measure_is_shown_with_what_it_says(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(ModelError, match=rf"llama-bench does not measure a\.gguf: {said}$"):
        find_llama_models(str(program(tmp_path, body)), ["a.gguf"])


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing cannot be run: No such file or directory"):
        find_llama_models(str(tmp_path / "nothing"), ["a.gguf"])


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    found = find_llama_models(str(answering(tmp_path)), ["x/a.gguf", "y/a.gguf", "x/a.gguf"])
    assert [model.name for model in found] == ["x/a.gguf, llama 1B Q2_K", "y/a.gguf, llama 1B Q2_K"]
