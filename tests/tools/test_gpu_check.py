"""`make gpu-check` without a GPU: it refuses in one line, its parts run on the CPU, and none outlasts its limit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
WITH_TRANSFORMERS = {"numpy", "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numba"}
"""What a machine must have."""

LEFT_OUT = {"datasets", "pyarrow", "matplotlib", "jinja2"}
"""Read texts of the hub and Parquet, draw, and write the page of a report: too large to be carried, or not needed."""


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import gpu_check

    yield gpu_check


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/gpu_check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    done = check("--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: torch finds no GPU on this machine; run `make gpu-check` where there is one\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_part_runs_and_is_written_down(tmp_path: Path) -> None:
    done = check("--device", "cpu", "--tiny", "--model", "smollm2-135m", "--out", str(tmp_path), "--limit", "400")
    found = json.loads((tmp_path / "gpu-check.json").read_text())["parts"]
    assert done.returncode == 0, done.stdout
    assert list(found) == ["kernels", "matmul", "block", "model"]
    assert {part["state"] for part in found.values()} == {"finished"}
    (tests,) = found["kernels"]["rows"]
    assert tests["tests"] > tests["skipped"] and tests["failures"] == tests["errors"] == 0
    assert all(0 < row["error"] < 0.02 and row["microseconds"] > 0 for row in found["matmul"]["rows"])
    assert sum(row["what"].startswith("model.layers.") for row in found["block"]["rows"]) == 7
    told = {row["what"]: row["value"] for row in found["model"]["rows"]}
    assert told["distillation, KL after"] < told["distillation, KL before"] and told["tokens generated"] == 8
    table = (tmp_path / "gpu-check.md").read_text()
    assert table in done.stdout and "| block 1, fitted |" in table


def test_a_part_that_hangs_is_killed_with_what_it_started_and_its_rows_are_kept(
    tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Namespace(out=tmp_path, device="cpu", model="any", tiny=True)
    rows = tmp_path / "hang.jsonl"
    process = subprocess.Popen
    started: list[Any] = []

    class UntilItsRows(process):  # type: ignore[type-arg, misc, valid-type]
        """The limit is reached when the part has written its rows, however slow this machine is."""

        def wait(self, timeout: float | None = None) -> int:
            started.append(self)
            while timeout is not None and not (rows.exists() and rows.read_text().count("\n") == 2):
                time.sleep(0.05)
            return super().wait(0.1 if timeout is not None else None)

    monkeypatch.setattr(tools.subprocess, "Popen", UntilItsRows)
    result = tools.run_part(tools.Part("hang", "a part that hangs", 60), 60, options)
    assert result["state"] == "stopped at its limit of 60 s"
    first, second = result["rows"]
    assert first["what"] == "a row before"
    assert started[0].returncode is not None and ended(second["value"])


def ended(process: int) -> bool:
    """Gone, or a zombie whose parent has gone."""
    for _ in range(100):
        path = Path(f"/proc/{process}/stat")
        if not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_all_limits_together_are_less_than_eight_minutes(tools: Any) -> None:
    assert tools.SECONDS < 8 * 60
    assert sum(part.seconds for part in tools.parts(2.5)) <= tools.SECONDS


def test_where_no_time_is_left_a_part_is_not_started(tools: Any, tmp_path: Path) -> None:
    options = Namespace(out=tmp_path, device="cpu", model="any", tiny=True)
    result = tools.run_part(tools.Part("model", "a model", 60), 0.5, options)
    assert result["state"] == "no time was left" and not (tmp_path / "model.log").exists()


def test_the_wheels_are_all_that_a_machine_may_lack(tools: Any) -> None:
    section = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("]")[0]
    wanted = set(re.findall(r'"([\w-]+)>', section))
    assert len(wanted) > 10
    carried = {package for group in tools.gpu_wheels.GROUPS for package in group}
    assert wanted - carried == WITH_TRANSFORMERS | LEFT_OUT


def test_more_wheels_than_can_be_carried_are_refused(
    tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tools.gpu_wheels
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: None)
    (tmp_path / "a.whl").write_bytes(b"0" * 1000)
    wheels.download(tmp_path, ROOT / "constraints.txt")
    monkeypatch.setattr(wheels, "MOST_BYTES", 999)
    with pytest.raises(SystemExit, match=r"0\.0 MB of wheels"):
        wheels.download(tmp_path, ROOT / "constraints.txt")


def test_what_is_missing_is_installed_with_its_group_or_named(
    tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tools.gpu_wheels
    assert wheels.missing() == []
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None if name == "typer" else "there")
    assert wheels.missing() == ["typer", "shellingham", "annotated-doc", "click"]
    with pytest.raises(SystemExit, match="typer, shellingham, annotated-doc, click; run `make gpu-wheels`"):
        wheels.install(tmp_path, tmp_path / "target")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "nan"], "'nan' is no number of minutes; give one such as MINUTES=2.5"),
        (["--minutes=-1"], "'-1' is no number of minutes"),
        (["--out", ""], "no folder is named; give one such as OUT=runs/gpu-check"),
        (["--device", "cpu", "--out", "/dev/null/x"], "--out /dev/null/x: Not a directory; choose another folder"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = check("--out", str(tmp_path), *arguments)
    assert done.returncode in (1, 2) and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr and not list(tmp_path.iterdir())
