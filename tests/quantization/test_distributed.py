from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.commands import add_settings, run
from safetensors.torch import load_file

from aqlm_cli.quantization.training.distributed import World, own_device

SECTION = """
finetune: {steps: 6, batch: 4, micro_batch: 1, sequence_length: 16, held_out: 3, evaluate_every: 2, save_every: 2,
  learning_rate: 0.05, codes: {share: 0.05, learning_rate: 0.3, trust_ratio: null}}
"""


def torchrun(*arguments: str) -> str:
    """What it wrote to stdout, in two processes as a user starts them."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = [sys.executable, "-m", *launcher, "-m", "aqlm_cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def start(*arguments: str) -> list[subprocess.Popen[str]]:
    """The two processes of a command, without the third that torchrun is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "aqlm_cli", *arguments],
            env={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def together(*arguments: str) -> tuple[int, str, str]:
    """Status of the first process, and what both wrote to stdout and to stderr."""
    processes = start(*arguments)
    written = [process.communicate(timeout=300) for process in processes]
    return processes[0].returncode, "".join(out for out, _ in written), "".join(error for _, error in written)


def succeeded(*arguments: str) -> str:
    """What they wrote to stdout."""
    status, stdout, stderr = together(*arguments)
    assert status == 0, stderr
    return stdout


@pytest.fixture
def made(finished_run: Path) -> Path:
    add_settings(finished_run, SECTION)
    return finished_run


@pytest.mark.slow
def test_two_processes_come_to_what_one_does_and_what_cannot_be_shared_is_refused(made: Path) -> None:
    assert run("finetune", "run").exit_code == 0
    alone = load_file(made / "finetuned/block-000.safetensors")
    told = json.loads((made / "reports/finetune.json").read_text())
    stdout = torchrun("finetune", "run", "--overwrite", "--json")
    assert stdout.count('{"finetune"') == 1, "the first one alone reports"
    assert json.loads(stdout)["finetune"]["after"] == pytest.approx(told["after"], rel=1e-3)
    before, both = (load_file(made / f"{name}/block-000.safetensors") for name in ("quantized", "finetuned"))
    for kind in ("codes", "codebooks", "scales", "layernorm.weight"):  # what moved, moved alike
        names = [name for name in alone if name.endswith(kind)]
        moved, apart = (
            sum(float((alone[name].float() - other[name].float()).norm()) for name in names) for other in (before, both)
        )
        assert apart < 0.2 * moved, kind
    reuse = succeeded("finetune", "run")
    assert "already" in reuse, "and the second process does not wait for ever"
    status, _, stderr = together("finetune", "run", "--batch", "3", "--overwrite")
    assert status != 0 and "--batch 3 is not the same for each of 2 processes" in stderr


@pytest.mark.soak
def test_what_two_began_two_resume_with_and_nobody_else(made: Path) -> None:
    shutil.copytree(made, "whole")
    succeeded("finetune", "whole", "--steps", "40")
    state = made / "finetuned.partial/work/training.safetensors"
    running = start("finetune", "run", "--steps", "40")
    while not state.exists():
        time.sleep(0.02)
        assert running[0].poll() is None
    for process in running:
        process.kill()
        process.communicate()
    alone = run("finetune", "run", "--steps", "40")
    assert alone.exit_code == 1 and "machine.processes 2 there, None asked" in alone.stderr
    assert "resuming" in succeeded("finetune", "run", "--steps", "40")
    for path in Path("whole/finetuned").glob("*.safetensors"):
        assert path.read_bytes() == (made / "finetuned" / path.name).read_bytes()


@pytest.mark.parametrize(("size", "seen"), [("1", True), ("2", False)])
@pytest.mark.parametrize(("flag", "status"), [("--version", 0), ("--no-such-flag", 2)])
def test_a_process_of_a_team_ends_without_python_s_own_end(size: str, seen: bool, flag: str, status: int) -> None:
    """Which the others of a world would be ended by, now and then; its words and its status are those of any other."""
    program = "import atexit, sys; from aqlm_cli.cli.app import main; atexit.register(print, 'its own end'); main()"
    environment = {**os.environ, "WORLD_SIZE": size}
    found = subprocess.run([sys.executable, "-c", program, flag], capture_output=True, text=True, env=environment)
    assert found.returncode == status and ("its own end" in found.stdout) == seen
    assert found.stdout.startswith("aqlm") if status == 0 else flag in found.stderr


def test_every_sequence_is_one_process_s() -> None:
    windows = torch.arange(8)
    shares = [World(rank, 4).share(windows) for rank in range(4)]
    assert sorted(torch.cat(shares).tolist()) == windows.tolist() and {len(share) for share in shares} == {2}


def test_each_process_has_a_card_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (own_device("cuda"), own_device("cpu"), own_device("cuda:0")) == ("cuda:1", "cpu", "cuda:0")


def test_every_rank_runs_one_function_and_rank_zero_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker does not compute what rank 0 tells; it gets what came through JSON."""
    sent: list[list[object]] = []

    def broadcast(message: list[object], src: int, device: torch.device) -> None:
        assert src == 0
        sent.append(list(message))
        message[0] = '{"steps": 7}'

    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "gloo")
    assert World(0, 2).from_rank_zero(lambda: {"steps": 7}) == {"steps": 7}
    assert World(1, 2).from_rank_zero(lambda: pytest.fail("a worker computed it")) == {"steps": 7}
    assert sent == [['{"steps": 7}'], [None]]
    assert World().from_rank_zero(lambda: {"steps": 7}) == {"steps": 7} and len(sent) == 2, "alone, nothing is sent"
