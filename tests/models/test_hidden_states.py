from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aqlm_cli.errors import ArtifactError, StorageError
from aqlm_cli.models.hidden_states import Activations, autocast, compute_dtype, run_block
from aqlm_cli.models.walk import BlockInput

CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block that notes in which type it is given its input and in which its linear layer answers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.seen: list[tuple[torch.dtype, torch.dtype]] = []

    def forward(self, hidden: Tensor) -> Tensor:
        product: Tensor = self.linear(hidden)
        self.seen.append((hidden.dtype, product.dtype))
        return hidden + product


# ---------------------------------------------------------------------------------------------------------- the file


def test_states_are_in_the_file_and_its_space_is_allocated_at_once(tmp_path: Path) -> None:
    path = tmp_path / "hidden.activations"
    states = Activations.create(path, (5, 3, 1000))
    assert len(states) == 5 and path.stat().st_size == 4 * 15000
    assert 512 * path.stat().st_blocks >= path.stat().st_size
    values, chosen = torch.randn(2, 3, 1000), torch.tensor([3, 1])
    states[chosen] = values
    there = np.fromfile(path, np.float32).reshape(5, 3, 1000)
    assert np.array_equal(there[[3, 1]], values.numpy()) and not there[[0, 2, 4]].any()
    assert torch.equal(states[chosen], values) and states[chosen].dtype == torch.float32
    assert torch.equal(
        Activations(path, (5, 3, 1000))[torch.tensor([0, 1])], torch.stack([torch.zeros(3, 1000), values[1]])
    )


def test_a_file_left_by_an_earlier_run_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "hidden.activations"
    path.write_bytes(b"\xff" * 1000)
    assert torch.equal(Activations.create(path, (2, 4))[torch.arange(2)], torch.zeros(2, 4))
    assert path.stat().st_size == 32


def test_states_take_no_memory_of_the_process(tmp_path: Path) -> None:
    states = Activations.create(tmp_path / "hidden.activations", (64, 1024, 1024))  # 256 MB
    before = resident_bytes()
    for window in torch.arange(64).split(1):
        states[window] = torch.ones(1, 1024, 1024)
        states[window]
    assert resident_bytes() - before < 64 * 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_truncated_file_of_states_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hidden.activations"
    states = Activations.create(path, (2, 4))
    os.truncate(path, 20)
    with pytest.raises(ArtifactError, match="truncated"):
        states[torch.arange(2)]


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EIO, "cannot write")],
)
def test_a_disk_that_cannot_hold_it_is_one_line_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        assert (offset, size) == (0, 4 * 24)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    path = tmp_path / "hidden.activations"
    with pytest.raises(StorageError, match=reason) as error:
        Activations.create(path, (2, 3, 4))
    assert str(path) in str(error.value)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        Activations.create(tmp_path / "missing" / "hidden.activations", (1, 1))


# ---------------------------------------------------------------------------------------------------- running a block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matmuls_are_in_the_requested_type_and_the_residual_stream_is_float32(dtype: torch.dtype) -> None:
    block, hidden = Block(), torch.randn(2, 3, 8)
    output, handed = run_block(block, BlockInput.alone(hidden), dtype)
    assert not handed
    assert block.seen == [(torch.float32, dtype)]
    assert output.dtype == torch.float32 and not output.requires_grad
    torch.testing.assert_close(output, block(hidden).detach(), rtol=0, atol=1e-6 if dtype == torch.float32 else 0.05)


def test_backward_runs_under_autocast_and_float32_disables_it() -> None:
    block, hidden = Block(), torch.randn(2, 3, 8)
    with autocast(CPU, torch.bfloat16):
        block(hidden).sum().backward()
    assert block.linear.weight.grad is not None
    with autocast(CPU, torch.float32):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
    ],
)
def test_bfloat16_is_taken_where_the_machine_multiplies_it(
    capabilities: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert compute_dtype(CPU) == dtype
    assert compute_dtype(torch.device("cuda")) == torch.bfloat16
