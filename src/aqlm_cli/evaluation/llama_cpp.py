"""llama.cpp's own benchmark, run on the user's files with the user's program, to stand beside ours."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqlm_cli.errors import ModelError, UsageError


@dataclass(frozen=True)
class LlamaModel:
    """A `.gguf` file as `program`, a llama-bench, runs it."""

    program: str
    file: str
    name: str
    bytes: int

    def speed(self, prompt: int, tokens: int, threads: int) -> tuple[float, float]:
        """Tokens per second of reading a prompt, and of decoding after it."""
        read = _run(self.program, self.file, threads, "-p", prompt, "-n", 0)
        decoded = _run(self.program, self.file, threads, "-p", 0, "-n", tokens, "-d", prompt)
        return read["avg_ts"], decoded["avg_ts"]


def find_llama_models(program: str | None, files: Sequence[str]) -> list[LlamaModel]:
    """The files, with the name and size that llama-bench gives them.

    Raises UsageError where the program comes without files or the other way round, ModelError where it cannot run one.
    """
    if program is None and not files:
        return []
    if program is None or not files:
        raise UsageError("--llama-bench PROGRAM and --llama-model FILE.gguf go together; give both")
    found, short = [], len({Path(file).name for file in files}) == len(files)
    for file in dict.fromkeys(files):
        said = _run(program, file, 1, "-p", 1, "-n", 0)
        name = f"{Path(file).name if short else file}, {said['model_type']}"
        found.append(LlamaModel(program, file, name, int(said["model_size"])))
    return found


def _run(program: str, file: str, threads: int, *test: str | int) -> dict[str, Any]:
    """Figures of llama-bench in one repeat, on the CPU."""
    command = [program, "-m", file, "-t", threads, *test, "-r", 1, "-ngl", 0, "-o", "json"]
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    except OSError as error:
        raise ModelError(f"{program} cannot be run: {error.strerror}; give llama.cpp's llama-bench") from error
    try:
        measured: dict[str, Any] = json.loads(done.stdout)[-1]
        return {name: measured[name] for name in ("avg_ts", "model_type", "model_size")}
    except (ValueError, LookupError, TypeError):
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = lines[-1].strip() if lines else f"exit status {done.returncode}"
        raise ModelError(f"{program} does not measure {file}: {said}") from None
