"""Mostly in processes of their own: which library of threads a process has is settled when torch is first imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aqlm_cli import openmp
from aqlm_kernels.cpu.dequantize import dequantize

LIBRARIES = """
import json, sys
import torch
from aqlm_kernels.cpu.dequantize import dequantize

torch.ones(300, 300) @ torch.ones(300, 300)
dequantize(torch.zeros(64, 8, 2, dtype=torch.uint8), torch.ones(2, 256, 8), torch.ones(64), torch.float32)
print(json.dumps([line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line]), file=sys.stderr)
"""

SHARED = """
from aqlm_cli.openmp import share_pool

share_pool()
"""

COMMAND = """
import sys
from aqlm_cli.cli.app import main

sys.argv = ["aqlm", "doctor"]
try:
    main()
except SystemExit:
    pass
"""


def libraries(before: str) -> set[str]:
    """The copies of GNU OpenMP in a process that has used both torch and Numba."""
    done = subprocess.run([sys.executable, "-c", before + LIBRARIES], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.fixture(scope="module")
def separate() -> set[str]:
    if sys.platform != "linux":
        pytest.skip("what a process has loaded is read from /proc")
    found = libraries("")
    if len(found) < 2:
        pytest.skip("torch and Numba have one library here in any case")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("before", [SHARED, COMMAND], ids=["function", "command"])
def test_torch_and_numba_share_one_pool_of_threads(before: str, separate: set[str]) -> None:
    (library,) = libraries(before)
    assert library in separate


def test_tests_compute_in_one_pool_as_commands_do(separate: set[str]) -> None:
    """With two, one waits on the cores that the other needs, and tests take several times as long."""
    torch.ones(300, 300) @ torch.ones(300, 300)
    dequantize(torch.zeros(64, 8, 2, dtype=torch.uint8), torch.ones(2, 256, 8), torch.ones(64), torch.float32)
    (library,) = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert library in separate


LEVELS = """
import ctypes, sys
from aqlm_cli.openmp import LIBRARY, share_pool

share_pool()
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.pipeline.order import use_machine

use_machine(RunConfig(model="any"))
from aqlm_kernels.cpu.dequantize import dequantize
import torch

dequantize(torch.zeros(64, 8, 2, dtype=torch.uint8), torch.ones(2, 256, 8), torch.ones(64), torch.float32)
print(ctypes.CDLL(LIBRARY).omp_get_max_active_levels(), file=sys.stderr)
"""


@pytest.mark.slow
def test_threads_start_no_threads_of_their_own_after_numba_has_started(separate: set[str]) -> None:
    done = subprocess.run([sys.executable, "-c", LEVELS], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "1"


@pytest.mark.parametrize(
    ("load", "busy"),
    [("0.00 0.01 0.05 1/84 25222", False), ("1.17 2.21 2.45 3/84 25224", True), ("", False), (None, False)],
)
def test_threads_sleep_early_where_others_need_the_cores(
    load: str | None, busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openmp, "LOAD", tmp_path / "loadavg")
    if load is not None:
        openmp.LOAD.write_text(load)
    monkeypatch.setattr(os, "environ", {})
    openmp.share_pool()
    assert os.environ == ({"GOMP_SPINCOUNT": openmp.SHORT} if busy else {})


@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "5"}])
def test_a_user_who_says_how_threads_wait_is_obeyed(
    own: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openmp, "LOAD", tmp_path / "loadavg")
    openmp.LOAD.write_text("9.17 9.21 9.45 9/84 25224")
    monkeypatch.setattr(os, "environ", dict(own))
    openmp.share_pool()
    assert os.environ == own
