from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.commands import run
from safetensors.torch import load_file

from aqlm_cli.quantization.training.distributed import World, own_device

SECTION = """
finetune: {steps: 6, batch: 4, micro_batch: 1, sequence_length: 16, held_out: 3, evaluate_every: 2, save_every: 2,
  learning_rate: 0.05, codes: {share: 0.05, learning_rate: 0.3, trust_ratio: null}}
"""


def command(*arguments: str) -> list[str]:
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return [sys.executable, "-m", *launcher, "-m", "aqlm_cli", *arguments]


def together(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)


def succeeded(*arguments: str) -> str:
    """What it wrote to stdout."""
    result = together(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def made(run_file: Path) -> Path:
    run_file.write_text(run_file.read_text() + SECTION)
    assert run("quantize", "--config", "run.yaml", "--out", "run").exit_code == 0
    return Path("run")


def test_two_processes_come_to_what_one_does(made: Path) -> None:
    assert run("finetune", "run").exit_code == 0
    alone = load_file(made / "finetuned/block-000.safetensors")
    told = json.loads((made / "reports/finetune.json").read_text())
    stdout = succeeded("finetune", "run", "--overwrite", "--json")
    assert stdout.count('{"finetune"') == 1, "the first one alone reports"
    assert json.loads(stdout)["finetune"]["after"] == pytest.approx(told["after"], rel=1e-3)
    start, both = (load_file(made / f"{name}/block-000.safetensors") for name in ("quantized", "finetuned"))
    for kind in ("codes", "codebooks", "scales", "layernorm.weight"):  # what moved, moved alike
        names = [name for name in alone if name.endswith(kind)]
        moved, apart = (
            sum(float((alone[name].float() - other[name].float()).norm()) for name in names) for other in (start, both)
        )
        assert apart < 0.2 * moved, kind


def test_what_two_began_two_go_on_with_and_nobody_else(made: Path) -> None:
    shutil.copytree(made, "whole")
    succeeded("finetune", "whole", "--steps", "40")
    state = made / "finetuned.partial/work/training.safetensors"
    running = subprocess.Popen(command("finetune", "run", "--steps", "40"))
    while not state.exists():
        time.sleep(0.02)
        assert running.poll() is None
    workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    for process in (running.pid, *map(int, workers)):  # torchrun gives each of them a session of its own
        os.kill(process, signal.SIGKILL)
    running.wait()
    alone = run("finetune", "run", "--steps", "40")
    assert alone.exit_code == 1 and "machine.processes 2 there, None asked" in alone.stderr
    assert "going on after them" in succeeded("finetune", "run", "--steps", "40")
    for path in Path("whole/finetuned").glob("*.safetensors"):
        assert path.read_bytes() == (made / "finetuned" / path.name).read_bytes()


def test_what_is_there_is_reused_and_what_cannot_be_shared_refused(made: Path) -> None:
    succeeded("finetune", "run")
    assert "exists already" in succeeded("finetune", "run"), "and the second process does not wait for ever"
    refused = together("finetune", "run", "--batch", "3", "--overwrite")
    assert refused.returncode != 0 and "--batch 3 is not the same for each of 2 processes" in refused.stderr


@pytest.mark.parametrize(("size", "seen"), [("1", True), ("2", False)])
@pytest.mark.parametrize(("flag", "status"), [("--version", 0), ("--no-such-flag", 2)])
def test_a_process_of_a_team_ends_without_python_s_own_end(size: str, seen: bool, flag: str, status: int) -> None:
    """Which the others of a world would be ended by, now and then; its words and its status are those of any other."""
    program = "import atexit, sys; from aqlm_cli.cli.app import main; atexit.register(print, 'its own end'); main()"
    environment = {**os.environ, "WORLD_SIZE": size}
    found = subprocess.run([sys.executable, "-c", program, flag], capture_output=True, text=True, env=environment)
    assert found.returncode == status and ("its own end" in found.stdout) == seen
    assert found.stdout.startswith("aqlm") if status == 0 else flag in found.stderr


def test_every_window_is_one_process_s() -> None:
    windows = torch.arange(8)
    shares = [World(rank, 4).share(windows) for rank in range(4)]
    assert sorted(torch.cat(shares).tolist()) == windows.tolist() and {len(share) for share in shares} == {2}


def test_each_process_has_a_card_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (own_device("cuda"), own_device("cpu"), own_device("cuda:0")) == ("cuda:1", "cpu", "cuda:0")
