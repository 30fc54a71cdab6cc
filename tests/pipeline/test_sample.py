"""`--data self:N`: text for finetuning that the original model writes itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import add_settings, refused, run
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import Result

from aqlm_cli.data.sequences import calibration_sequences
from aqlm_cli.data.spec import sampled_sequences
from aqlm_cli.errors import DataError
from aqlm_cli.events import Advanced, Event, StageStarted
from aqlm_cli.models import load_tokenizer, resolve
from aqlm_cli.pipeline.job import make_job
from aqlm_cli.pipeline.stages import sample as stage
from aqlm_cli.runs.directory import read_run

SECTION = """
finetune: {steps: 2, batch: 2, micro_batch: 2, sequence_length: 16, held_out: 2, evaluate_every: 2, save_every: 1}
"""

LENGTH = 16


@pytest.fixture
def made(finished_run: Path) -> Path:
    """A quantized run, with settings for finetuning."""
    add_settings(finished_run, SECTION)
    return finished_run


def text(directory: Path) -> Tensor:
    return load_file(directory / "text/windows.safetensors")["ids"].clone()  # not a view of what may be written over


def sampled(directory: Path, data: str = "self:6", **settings: Any) -> tuple[Tensor, list[Event]]:
    """The token ids `[windows, L]` that the stage leaves for these settings, and what it told meanwhile."""
    config, told = read_run(directory).config, list[Event]()
    section = config.finetune.model_copy(update={"data": data})
    stage.sample(make_job(config.model_copy(update={"finetune": section, **settings}), directory, emit=told.append))
    return text(directory), told


def test_the_same_seed_gives_the_same_tokens_and_another_one_others(made: Path) -> None:
    first, _ = sampled(made)
    assert first.shape == (6, LENGTH) and first.dtype == torch.int32
    shutil.rmtree(made / "text")
    assert torch.equal(sampled(made)[0], first)
    other, _ = sampled(made, seed=1)
    assert not any(torch.equal(row, window) for row in other for window in first)
    assert len({tuple(window.tolist()) for window in first}) == 6, "no two windows are the same"


def test_neither_the_batch_nor_the_number_of_sequences_changes_a_sequence(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "compute_dtype", lambda device: torch.float32)
    together, _ = sampled(made)
    shutil.rmtree(made / "text")
    monkeypatch.setattr(stage, "AT_ONCE", 4 * LENGTH)
    assert torch.equal(sampled(made)[0], together)
    assert torch.equal(sampled(made, "self:9")[0][:6], together)


def test_progress_is_told_sequence_by_sequence(made: Path) -> None:
    _, told = sampled(made, "self:24")  # at once, so that a step may be worth more than a window of 16 tokens
    assert told[0] == StageStarted("sample", 24, "sequence")
    assert [event.done for event in told if isinstance(event, Advanced)] == list(range(1, 25))
    assert all(event.detail.endswith(" tokens/s") for event in told if isinstance(event, Advanced))


def test_a_model_is_finetuned_on_its_originals_text(made: Path) -> None:
    result = run("finetune", "run", "--data", "self:8", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["finetune"]
    assert told["text_tokens"] == (8 - 2) * LENGTH and told["steps"] == 2
    manifest = json.loads((made / "text/manifest.json").read_text())
    assert manifest["kind"] == "text" and manifest["settings"] == {"windows": 8, "sequence_length": LENGTH, "seed": 0}
    original = json.loads((made / "quantized/manifest.json").read_text())["parents"]["model"]
    assert manifest["parents"] == {"model": original}
    stages = json.loads(run("status", "run", "--json").stdout)["stages"]
    assert [one["stage"] for one in stages] == ["calibrate", "quantize", "sample", "finetune", "pack"]
    assert {one["state"] for one in stages} == {"finished"}
    assert "sample: 8 of 8 sequences, done in" in result.stderr
    (made / "text/windows.safetensors").write_bytes(b"0" * (made / "text/windows.safetensors").stat().st_size)
    assert "text/windows.safetensors is damaged" in refused("verify", "run")


def test_sampled_and_other_text_are_mixed(made: Path) -> None:
    told = json.loads(run("finetune", "run", "--data", "self:6,notes.txt:4", "--json").stdout)["finetune"]
    assert told["text_tokens"] == (6 + 4 - 2) * LENGTH
    assert text(made).shape == (6, LENGTH)


def test_sequences_stand_in_the_order_of_the_sources(run_file: Path) -> None:
    tokenizer: Any = load_tokenizer(resolve("tiny"))
    own = torch.arange(5 * LENGTH).view(5, LENGTH)
    notes = calibration_sequences("notes.txt:2", None, LENGTH, 0, tokenizer).ids
    found = calibration_sequences("self:2,notes.txt:2,self:3", None, LENGTH, 0, tokenizer, own)
    assert torch.equal(found.ids, torch.cat([own[:2], notes, own[2:]]))
    assert found.sources == ("self",) * 2 + ("notes.txt",) * 2 + ("self",) * 3


@pytest.mark.parametrize(
    ("spec", "sequences", "windows"),
    [
        (None, None, 0),
        ("c4:4", None, 0),
        ("./self:4", None, 0),
        ("self:8,c4:4", None, 8),
        ("self:8,self:1", None, 9),
        ("self,c4", 9, 5),
        ("self", None, 192),
    ],
)
def test_self_is_counted_like_any_source(spec: str | None, sequences: int | None, windows: int) -> None:
    assert sampled_sequences(spec, sequences) == windows


# --------------------------------------------------------------------------------------------------------- as a cache


def test_the_same_text_is_taken_again_and_another_number_of_sequences_is_sampled(made: Path) -> None:
    run("finetune", "run", "--data", "self:8")
    first, written = text(made), (made / "text/windows.safetensors").stat().st_mtime_ns
    again = run("finetune", "run", "--data", "self:8", "--steps", "3", "--overwrite")
    assert again.exit_code == 0 and "run/text exists already" in again.output
    assert (made / "text/windows.safetensors").stat().st_mtime_ns == written
    more = run("finetune", "run", "--data", "self:10", "--overwrite")
    assert more.exit_code == 0 and "run/text exists already" not in more.output
    assert text(made).shape == (10, LENGTH) and torch.equal(text(made)[:8], first)


def test_damaged_text_is_sampled_again(made: Path) -> None:
    first, _ = sampled(made)
    path = made / "text/windows.safetensors"
    for damaged in (path.read_bytes()[:-4], path.read_bytes()[:-4] + b"0000"):
        path.write_bytes(damaged)
        assert torch.equal(sampled(made)[0], first)


def test_what_finetune_refuses_costs_no_text(made: Path, interrupted_at: Callable[..., Result]) -> None:
    assert interrupted_at("training.safetensors", 2, "finetune", "run", "--data", "self:8").exit_code == 130
    kept = text(made)
    assert "finetuned.partial was started with settings.data self:8 there" in refused(
        "finetune", "run", "--data", "self:9"
    )
    assert torch.equal(text(made), kept)
    assert "resuming" in run("finetune", "run", "--data", "self:8").output
    assert "finetuned exists with settings.data self:8 there" in refused("finetune", "run", "--data", "self:9")
    assert torch.equal(text(made), kept)
    shutil.rmtree(made / "text")
    assert "finetuned exists already" in run("finetune", "run", "--data", "self:8").output
    assert not (made / "text").exists(), "nobody would read it"


def test_interrupted_before_it_is_published_it_begins_again(made: Path, interrupted_at: Callable[..., Result]) -> None:
    assert interrupted_at("text.partial", 1, "finetune", "run", "--data", "self:6").exit_code == 130
    assert not (made / "text").exists()
    states = {one["stage"]: one["state"] for one in json.loads(run("status", "run", "--json").stdout)["stages"]}
    assert states["sample"] == "interrupted: Ctrl-C" and "finetune" not in states
    assert run("finetune", "run", "--data", "self:6").exit_code == 0
    assert text(made).shape == (6, LENGTH) and not (made / "text.partial").exists()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("command", ["calibrate", "quantize"])
@pytest.mark.parametrize("data", ["self:4", "notes.txt:2,self:4"])
def test_only_finetuning_samples_from_the_model(command: str, data: str, run_file: Path) -> None:
    line = refused(command, "--config", "run.yaml", "--data", data, "--out", "new")
    assert "self: only `aqlm finetune` samples text from the model" in line
    assert not Path("new/calibration").exists()


def test_sampled_text_that_is_too_short_is_refused_like_any(made: Path) -> None:
    assert "2 sequences, and 2 are held out" in refused("finetune", "run", "--data", "self:2")
    assert "only some sources of self:2,notes.txt have a count" in refused(
        "finetune", "run", "--data", "self:2,notes.txt"
    )
    with pytest.raises(DataError, match="2 sequences, but --sequences is 3"):
        sampled_sequences("self:2", 3)
