"""What all tests share: a home of their own, a run to try commands on, a disk that can be made to fail, and how many
examples a property is tried on."""

# ruff: noqa: E402, the pool of threads is settled before torch is imported

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from aqlm_cli.openmp import forbid_nested_loops, share_pool

# As in a command, torch and Numba have one pool of threads. Threads without work sleep: `make test` runs two processes,
# and a thread that spins takes a core from the other one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
share_pool()

import numba
import pytest
import torch
from helpers import commands
from hypothesis import HealthCheck, settings
from typer.testing import Result

from aqlm_cli.evaluation import matmul
from aqlm_cli.pipeline.stages import plan
from aqlm_kernels.cpu import bandwidth

# The same examples on every machine, and none kept. A fixture is made once for all examples of a test: they
# write to the same place, which is what a user does.
settings.register_profile(
    "repeatable",
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write the files of tests/golden/run anew")
    parser.addoption("--device", default="cuda", help="where tests/kernels/test_device.py multiplies")


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches of models and digests start empty, and the user's own stay untouched."""
    directory = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(directory))
    return directory


@pytest.fixture(scope="session", autouse=True)
def common_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For what is made once for several tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("common-home")))
        yield


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Commands and stages set the threads of the whole process."""
    before = torch.get_num_threads(), numba.get_num_threads()
    forbid_nested_loops()
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a tiny model, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return commands.save_run_file(tmp_path)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `run.yaml`, the model and the text that it names, and the finished run that it makes, in `run`.

    It is made once, by a whole command, and only to be copied: paths in it are relative, so that a copy is a run too.
    """
    directory = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        commands.save_run_file(directory)
        result = commands.run("quantize", "--config", "run.yaml", "--out", "run")
        assert result.exit_code == 0, result.output
    return directory


@pytest.fixture
def finished_run(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`run`, a copy of the finished run in the working directory, with all that it is made from beside it."""
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("run")


@pytest.fixture(scope="session")
def interrupted_workspace(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without `run`, and the run `out`, which was interrupted in the second of its two blocks."""
    directory = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(workspace, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert interrupt("model.layers.1", 3, "quantize", "--config", "run.yaml", "--out", "out").exit_code == 130
    return directory


@pytest.fixture
def interrupted_run(interrupted_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The command whose run, `out`, was interrupted when two matrices of the second block were whole."""
    shutil.copytree(interrupted_workspace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return "quantize", "--config", "run.yaml", "--out", "out"


@pytest.fixture
def fail_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`fail_disk(code, successes)`: after so many writes every further one fails with this errno.

    It is the sync that fails, which is where a full disk may first speak up: all bytes seem to be written by then.
    """

    def fail(code: int, successes: int) -> None:
        sync, calls = os.fsync, []

        def broken(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) > successes:
                raise OSError(code, os.strerror(code))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", broken)

    return fail


@pytest.fixture
def interrupted_at() -> Callable[..., Result]:
    """`interrupted_at(text, count, *arguments)`: a command, Ctrl-C at its `count`-th write to a path with `text`."""

    return interrupt


def interrupt(text: str, count: int, *arguments: str) -> Result:
    sync, seen = os.fsync, []

    def interrupted(descriptor: int) -> None:
        seen.extend(path for path in [os.readlink(f"/proc/self/fd/{descriptor}")] if text in path)
        if len(seen) == count:
            raise KeyboardInterrupt
        sync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        return commands.run(*arguments)


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks read little memory: here only their arithmetic counts."""
    monkeypatch.setattr(matmul, "ROTATED", 2**14)
    monkeypatch.setattr(bandwidth, "SIZE", 2**20)


@pytest.fixture(autouse=True)
def no_benchmark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands forecast from numbers that are given: to time this machine is half of what a tiny run takes.

    It is timed once for `workspace`, and in every test that asks for the fixture `benchmark`.
    """
    if "benchmark" not in request.fixturenames:
        monkeypatch.setattr(plan, "measure_rates", lambda *_: commands.RATES)


@pytest.fixture
def benchmark() -> None:
    """The forecast times this machine, as it does for a user."""
