"""A command that is killed at any instant resumes when it is run again, and ends in the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import commands, tiny_models

from aqlm_cli.quantization import block_inputs

STAGES = ("calibration", "quantized", "packed")

KINDS: Mapping[str, tuple[str, Mapping[str, Any], tuple[str, ...]]] = {
    "tables": (
        "llama",
        {"scheme": "2x4g8c8", "embeddings": "2x4g8+int4g32r8"},
        ("calibration", "quantized", "packed"),
    ),
    "experts": ("mixtral", {"scheme": "2x4g8"}, ("calibration", "quantized", "packed")),
    "target": (
        "mixtral",
        {
            "target": {
                "size": "150kB",
                "among": ["1x4g8", "2x4g8", "2x4g8c8"],
                "tables": ["2x4g8", "2x4g8+int4g32r8", "int4g32"],
                "mixes": 2,
                "sequences": 4,
            }
        },
        ("calibration", "allocation", "quantized", "packed"),
    ),
}
"""Family, changes of the settings of a quantization, and stages, of runs with more than linear layers in 16 bits."""

DRIVER = """
# Whole commands in children of one process that has imported all they need, and has no threads yet.
import json, os, signal, sys
import aqlm_cli.pipeline.order
from aqlm_cli.pipeline.stages import plan
from helpers import commands
from transformers import AutoModelForCausalLM

plan.measure_rates = lambda *_: commands.RATES  # to time this machine would be a quarter of the work

def in_child(out, *, log=None, kill_at=None, delay=0.0):
    pid = os.fork()
    if pid == 0:
        calls, sync = [], os.fsync
        def watched(descriptor):
            calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            if kill_at == len(calls) and delay == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if kill_at == len(calls):
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, delay)
            sync(descriptor)
        os.fsync = watched
        result = commands.run("quantize", "--config", "run.yaml", "--out", out)
        if log:
            open(log, "w").write(json.dumps(calls))
        if result.exit_code:
            sys.stderr.write(result.output + repr(result.exception))
        os._exit(result.exit_code)
    return os.waitpid(pid, 0)[1]

for line in sys.stdin:
    print(in_child(**json.loads(line)), flush=True)
"""


class Driver:
    """Runs `aqlm quantize` to its end or to its death."""

    def __init__(self, directory: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        self._process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, out: str, **how: Any) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"out": out, **how}), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def driver(run_file: Path) -> Any:
    driver = Driver(run_file.parent)
    yield driver
    driver.close()


@pytest.fixture
def kind(request: pytest.FixtureRequest, driver: Driver) -> tuple[str, ...]:
    """A tied model and a run file of KINDS in the working directory; its stages."""
    family, changes, stages = KINDS[request.param]
    shutil.rmtree("tiny")
    tiny_models.save(family, Path("tiny"), tie_word_embeddings=True)
    settings = yaml.safe_load(Path("run.yaml").read_text())
    settings["quantize"] = {**settings["quantize"], **changes}
    Path("run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return stages


def uninterrupted(driver: Driver) -> dict[str, Any]:
    """What a command makes that nothing befalls; its writes are in `log`."""
    assert driver("first") == 0  # fills caches outside of the run
    assert driver("whole", log="log") == 0
    return commands.made("whole")


def syncs_by_stage(log: Path, stages: Sequence[str] = STAGES) -> dict[str, list[int]]:
    """The numbers, from 1, of the writes in each stage."""
    calls = json.loads(log.read_text())
    return {stage: [n for n, path in enumerate(calls, 1) if f"{stage}.partial" in path] for stage in stages}


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_bytes(driver: Driver) -> None:
    expected = uninterrupted(driver)
    for stage, numbers in syncs_by_stage(Path("log")).items():
        moments = (len(numbers) // 2, -1) if stage == "quantized" else (len(numbers) // 2,)
        for number in (numbers[moment] for moment in moments):
            out = f"{stage}-{number}"
            assert driver(out, kill_at=number) == 9
            assert driver(out) == 0
            assert commands.made(out) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["target"], indirect=True)  # which has experts, a table and 8-bit codebooks, too
def test_tables_experts_and_allocations_resume_to_the_same_bytes(driver: Driver, kind: tuple[str, ...]) -> None:
    expected = uninterrupted(driver)
    for stage, numbers in syncs_by_stage(Path("log"), ("allocation", "quantized")).items():  # all of `kind` in the next
        number = numbers[2 * len(numbers) // 3]
        out = f"{stage}-{number}"
        assert driver(out, kill_at=number) == 9
        assert driver(out) == 0
        assert commands.made(out) == expected


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_they_do_when_killed_at_every_write(driver: Driver, kind: tuple[str, ...]) -> None:
    expected = uninterrupted(driver)
    for stage, numbers in syncs_by_stage(Path("log"), kind).items():
        for number in numbers:
            out = f"{stage}-{number}"
            assert driver(out, kill_at=number) == 9
            assert driver(out) == 0
            assert commands.made(out) == expected, out
            shutil.rmtree(out)


@pytest.mark.soak
@pytest.mark.parametrize("stage", STAGES)
def test_25_kills_at_random_instants(stage: str, driver: Driver) -> None:
    expected, draw = uninterrupted(driver), random.Random(0)
    for attempt in range(25):
        out = f"{stage}-{attempt}"
        number, delay = draw.choice(syncs_by_stage(Path("log"))[stage]), draw.uniform(0.001, 0.2)
        while driver(out, kill_at=number, delay=delay) != 0:  # again and again, each time a little later
            number, delay = number + 1, 2 * delay
        assert commands.made(out) == expected


def test_finished_blocks_and_matrices_are_not_done_again(
    finished_run: Path, interrupted_at: Callable[..., Any]
) -> None:
    command = "quantize", "--config", "run.yaml", "--out", "stopped"
    stopped = interrupted_at("model.layers.1", 3, *command)  # two matrices of the second block are whole
    assert stopped.exit_code == 130 and "Run the same command to resume" in stopped.output
    resumed = commands.run(*command).output
    assert "stopped/quantized.partial holds 1 of 2 blocks; resuming after them" in resumed
    assert resumed.count("model.layers.") == 7 - 2
    assert commands.made("stopped") == commands.made(finished_run)


def test_work_of_other_settings_is_refused_and_named(interrupted_run: tuple[str, ...]) -> None:
    other = commands.run(*interrupted_run, "--scheme", "3x4g8")
    assert other.exit_code == 1 and "scheme" in other.output and "--overwrite" in other.output
    assert "1 of 2 blocks" in commands.run(*interrupted_run).output


def test_another_calibration_is_not_mixed_in(interrupted_run: tuple[str, ...]) -> None:
    begun = Path("out/quantized.partial/work/begun.json")
    found = json.loads(begun.read_bytes())
    found["made from"]["calibration"] = "0" * 64
    begun.write_text(json.dumps(found))
    result = commands.run(*interrupted_run)
    assert result.exit_code == 1
    assert "quantized.partial was started with made from.calibration 0000" in result.output
    assert commands.run(*interrupted_run, "--overwrite").exit_code == 0


def test_hidden_states_of_another_size_are_refused(interrupted_run: tuple[str, ...]) -> None:
    os.truncate("out/quantized.partial/work/hidden-001.activations", 100)
    result = commands.run(*interrupted_run)
    assert result.exit_code == 1 and "hidden-001.activations has 100 bytes, not" in result.output
    assert "remove out/quantized.partial/work to start again" in result.output
    shutil.rmtree("out/quantized.partial/work")
    assert commands.run(*interrupted_run).exit_code == 0


def test_what_is_half_removed_is_not_resumed_from(
    interrupted_run: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the work of other settings is given up, and then those first settings are wanted again."""
    remove = shutil.rmtree

    def interrupted(path: Path | str, *arguments: Any, **options: Any) -> None:
        if Path(path).name == "quantized.partial":
            raise KeyboardInterrupt
        remove(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    assert commands.run(*interrupted_run, "--scheme", "3x4g8", "--overwrite").exit_code == 130
    monkeypatch.setattr(shutil, "rmtree", remove)
    result = commands.run(*interrupted_run, "--overwrite")
    assert result.exit_code == 0 and "resuming after them" not in result.output


def test_another_machine_is_not_mixed_in(interrupted_run: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_inputs, "compute_dtype", lambda device: torch.float64)
    result = commands.run(*interrupted_run)
    assert result.exit_code == 1 and "float64 asked; add --overwrite to start again" in result.output
