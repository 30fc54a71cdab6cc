"""The text of `aqlm finetune` that the base model writes itself, where `--data` names `self`.

The artifact holds the token ids. It is a cache: one that was made with the same settings is used even where all else is
redone, and under other settings it is rebuilt without being asked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from aqlm_cli.data.sequences import opening_tokens
from aqlm_cli.data.spec import sampled_sequences
from aqlm_cli.errors import ArtifactError
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted
from aqlm_cli.memory import peak_memory_bytes, reset_peak_memory
from aqlm_cli.models import ModelSource, load_tokenizer, open_sampling
from aqlm_cli.models.hidden_states import compute_dtype
from aqlm_cli.pipeline.job import Job
from aqlm_cli.runs.directory import RunDirectory
from aqlm_cli.runs.files import digest_file, save_tensors
from aqlm_cli.runs.stages import FINETUNE, SAMPLE, StageKey
from aqlm_cli.seeds import generator
from aqlm_cli.spec.config import RunConfig

WINDOWS = "windows.safetensors"

AT_ONCE = 2**15
"""Tokens of the sequences that are written together: a decode step reads all weights, for however many. Keys and values
of so many lie in memory beside the model, before finetuning needs it for a second one."""


def sample(job: Job) -> None:
    """Write `text/`, unless it exists or `finetune` will not come to read it."""
    run, config, section = job.run, job.config, job.config.finetune
    source, windows = job.base_model(run), sampled_sequences(section.data, section.sequences)
    opening = opening_tokens(load_tokenizer(source), section.bos)
    if not _will_be_read(run, config, bool(opening), job.overwrite):
        return
    settings = {"windows": windows, "sequence_length": section.sequence_length, "seed": config.seed}
    settings |= {"bos": True} if opening else {}
    key = StageKey(SAMPLE, settings, {"model": source.identity})
    if _is_there(run, key):
        job.emit(Noted(f"{run.path / 'text'} exists already, sampled with the same settings"))
        return
    with run.stage(key) as stage:
        reset_peak_memory()
        started = time.monotonic()
        ids = _windows(config, source, windows, opening, job.emit)
        save_tensors(stage.directory / WINDOWS, {"ids": ids.to(torch.int32)})
        stage.publish({"seconds": time.monotonic() - started, "memory_bytes": peak_memory_bytes()})


def _will_be_read(run: RunDirectory, config: RunConfig, bos: bool, overwrite: bool) -> bool:
    """True unless `finetune` reuses or refuses existing work before it reads any text."""
    if overwrite:
        return True
    if run.own(FINETUNE) is not None:
        return False
    text = config.finetune.model_dump(mode="json", include={"data", "sequences", "sequence_length"})
    begun = run.known_settings(FINETUNE, overwrite)
    return not begun or ({"bos": False, **begun}).items() >= {**text, "bos": bos, "seed": config.seed}.items()


def _is_there(run: RunDirectory, key: StageKey) -> bool:
    """True where the artifact is whole and was made with the same key; a damaged cache is rebuilt."""
    try:
        found = run.own(SAMPLE)
        if found is None or (found.manifest.settings, found.manifest.parents) != (key.settings, key.parents):
            return False
        return digest_file(found.path(WINDOWS)) == found.manifest.files[WINDOWS].sha256
    except ArtifactError:
        return False


def _windows(config: RunConfig, source: ModelSource, windows: int, opening: Sequence[int], emit: Emit) -> Tensor:
    """Token ids `[n, L]`; the random draws of a sequence depend on the seed and its number alone."""
    length, device = config.finetune.sequence_length, torch.device(config.device)
    names = [f"{SAMPLE.name} {number}" for number in range(windows)]
    draws = [torch.rand(length, dtype=torch.float64, generator=generator(config.seed, name)) for name in names]
    sampling = open_sampling(source, compute_dtype(device), device)
    emit(StageStarted(SAMPLE.name, windows, "sequence"))
    started, tokens, done = time.monotonic(), 0, 0

    def written(more: int) -> None:
        """Report every sequence's worth of tokens, as a batch of sequences takes long and ends at once."""
        nonlocal tokens, done
        tokens += more
        while done < tokens // length:
            done += 1
            emit(Advanced(SAMPLE.name, done, f"{tokens / (time.monotonic() - started):.0f} tokens/s"))

    parts = torch.stack(draws).to(device).split(max(1, AT_ONCE // length))
    return torch.cat([sampling.texts(part, written, opening).cpu() for part in parts])
