from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import run
from safetensors.torch import load_file

from aqlm_cli.team import Team, own_device

SECTION = """
finetune: {steps: 6, batch: 4, windows_at_once: 1, sequence_length: 16, held_out: 3, evaluate_every: 2, keep_every: 2,
  codes: {share: 0.05, learning_rate: 0.3, trust_ratio: null}}
"""


def together(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    command = (sys.executable, *launcher, "-m", "aqlm_cli", *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))


@pytest.fixture
def made(run_file: Path) -> Path:
    run_file.write_text(run_file.read_text() + SECTION)
    assert run("quantize", "--config", "run.yaml", "--out", "run").exit_code == 0
    return Path("run")


def test_two_processes_come_to_what_one_does(made: Path) -> None:
    assert run("finetune", "run").exit_code == 0
    alone = load_file(made / "finetuned/block-000.safetensors")
    told = json.loads((made / "reports/finetune.json").read_text())
    result = together("finetune", "run", "--overwrite", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('{"finetune"') == 1, "the first one alone reports"
    assert json.loads(result.stdout)["finetune"]["after"] == pytest.approx(told["after"], rel=1e-3)
    both = load_file(made / "finetuned/block-000.safetensors")
    for name, tensor in alone.items():
        if name.endswith("codes"):
            assert float((tensor != both[name]).float().mean()) < 0.02, name
        else:
            torch.testing.assert_close(both[name], tensor, rtol=2e-2, atol=2e-3)


def test_what_two_began_is_not_gone_on_with_by_one(made: Path) -> None:
    assert together("finetune", "run").returncode == 0
    assert "is there already" in together("finetune", "run").stdout, "and the second process does not wait for ever"
    section = yaml.safe_load((made / "run.yaml").read_text())["finetune"]
    assert section["batch"] == 4
    refused = together("finetune", "run", "--batch", "3", "--overwrite")
    assert refused.returncode != 0 and "--batch 3 is not the same for each of 2 processes" in refused.stderr


def test_every_window_is_one_process_s() -> None:
    windows = torch.arange(8)
    shares = [Team(rank, 4).share(windows) for rank in range(4)]
    assert sorted(torch.cat(shares).tolist()) == windows.tolist() and {len(share) for share in shares} == {2}


def test_each_process_has_a_card_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (own_device("cuda"), own_device("cpu"), own_device("cuda:0")) == ("cuda:1", "cpu", "cuda:0")
