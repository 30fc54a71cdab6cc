from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import commands

from aqlm_cli.errors import ArtifactError
from aqlm_cli.runs.lock import LOCK, exclusive

HOLDER = """
import sys
from pathlib import Path
from aqlm_cli.runs.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("here", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process at work in `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    return process


def test_a_second_process_is_refused_and_told_who_is_there(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    said = rf"run is in use by process {holder.pid} \(`-c .*, since 2\d+-.*; wait"
    with pytest.raises(ArtifactError, match=said), exclusive(tmp_path / "run"):
        pass
    with exclusive(tmp_path / "another"):
        pass
    holder.communicate()
    with exclusive(tmp_path / "run"):
        pass


def test_the_lock_of_a_dead_process_means_nothing(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / LOCK).read_text()  # it is still written there
    with exclusive(tmp_path / "run"):
        assert f'"process": {os.getpid()}' in (tmp_path / "run" / LOCK).read_text()
    assert (tmp_path / "run" / LOCK).read_text() == ""


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": 1}'])
def test_a_strange_lock_file_does_no_harm(content: str, holder: subprocess.Popen[str], tmp_path: Path) -> None:
    (tmp_path / "run" / LOCK).write_text(content)
    with pytest.raises(ArtifactError, match="in use by another process; wait"), exclusive(tmp_path / "run"):
        pass
    holder.communicate()


def test_every_command_that_writes_keeps_others_out(
    run_file: Path, holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    for command in (
        ["calibrate", "--config", str(run_file), "--out", "run"],
        ["quantize", "--config", str(run_file), "--out", "run"],
    ):
        result = commands.run(*command)
        assert result.exit_code == 1 and f"in use by process {holder.pid}" in result.output
    holder.communicate()


def test_a_directory_of_somebody_else_is_left_as_it_is(run_file: Path) -> None:
    other = Path("other")
    other.mkdir()
    (other / "lock").write_text("mine")
    result = commands.run("calibrate", "--config", str(run_file), "--out", "other")
    assert result.exit_code == 1 and "is not an aqlm lock file" in result.output
    (other / "notes").write_text("mine, too")
    result = commands.run("calibrate", "--config", str(run_file), "--out", "other")
    assert result.exit_code == 1 and "is not a run directory" in result.output
    assert (other / "lock").read_text() == "mine"
    assert sorted(path.name for path in other.iterdir()) == ["lock", "notes"]


def test_a_look_at_the_lock_does_not_stop_who_wants_it(tmp_path: Path) -> None:
    with open(tmp_path / LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.05, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        with exclusive(tmp_path):
            pass
