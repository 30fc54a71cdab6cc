"""Text from a model, token by token."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from aqlm_cli.errors import DataError
from aqlm_cli.events import Emit, Noted
from aqlm_cli.models import (
    Subject,
    end_tokens,
    open_decoding,
    open_tokenizer,
    refuse_too_long,
    refuse_unknown_tokens,
)
from aqlm_cli.records import GenerationReport
from aqlm_cli.spec.config import Head


def generate(
    subject: Subject,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    backend: str | None,
    head: Head,
    emit: Emit,
) -> GenerationReport:
    """Continue `prompt` as it stands, without a chat template, with any model or with what a run has packed.

    At temperature 0 the likeliest token is taken each time; above it tokens are drawn, by `seed`.  The speed counts
    reading the prompt too; `bench` measures the two apart.
    """
    source = subject.source
    tokenizer = open_tokenizer(source)
    ids = torch.tensor(tokenizer.encode(prompt), dtype=torch.int64, device=device)  # [length]
    if ids.numel() == 0:
        raise DataError("the prompt has no token; give some text with --prompt")
    refuse_unknown_tokens(source, ids)
    refuse_too_long(source, len(ids) + max_new_tokens - 1, "--tokens, or shorten --prompt")  # the last is not read
    emit(Noted(f"generating with {source.directory}"))
    decoding = open_decoding(source, len(ids) + max_new_tokens, backend, head, device)
    ends = end_tokens(source)
    draw = torch.Generator(device).manual_seed(seed)
    started = time.perf_counter()
    logits = decoding.prefill(ids)
    new = [_choose(logits, temperature, draw)]
    while len(new) < max_new_tokens and new[-1] not in ends:
        logits = decoding.step(new[-1])
        new.append(_choose(logits, temperature, draw))
    seconds = time.perf_counter() - started
    return GenerationReport(
        model=source.name,
        prompt=prompt,
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        tokens=len(new),
        seconds=seconds,
        tokens_per_second=len(new) / seconds,
        decoding=decoding.name,
    )


def _choose(logits: Tensor, temperature: float, draw: torch.Generator) -> int:  # logits [vocabulary]
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=draw))
