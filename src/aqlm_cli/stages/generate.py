"""Text from a model, by transformers' own `generate`."""

from __future__ import annotations

import time
from typing import Any

import torch

from aqlm_cli.errors import DataError
from aqlm_cli.events import Emit, Noted
from aqlm_cli.model import Subject, load_network, load_tokenizer
from aqlm_cli.report import GenerationReport


def generate(
    subject: Subject, prompt: str, max_new_tokens: int, temperature: float, seed: int, device: str, emit: Emit
) -> GenerationReport:
    """Continue `prompt` as it stands, without a chat template, with any model or with what a run has packed.

    At temperature 0 the likeliest token is taken each time; above it tokens are drawn, by `seed`.  The speed counts
    reading the prompt too; `bench` measures the two apart.
    """
    source = subject.source
    tokenizer = load_tokenizer(source)
    ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64, device=device)  # [1, length]
    if ids.numel() == 0:
        raise DataError("the prompt has no token; give some text with --prompt")
    emit(Noted(f"generating with {source.directory}"))
    network: Any = load_network(source, torch.float32, device)  # transformers' types hide that it generates
    choice = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    started = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            **choice,
        )  # [1, length + new]
    seconds = time.perf_counter() - started
    new = out[0, ids.shape[1] :].tolist()
    return GenerationReport(
        model=source.name,
        prompt=prompt,
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        tokens=len(new),
        seconds=seconds,
        tokens_per_second=len(new) / seconds,
    )
