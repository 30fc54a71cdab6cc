"""Perplexity of a model on a text: exp of the mean negative log likelihood of its tokens, as GPTQ measures it.

The text is cut into windows without overlap, each read on its own, and every token but a window's first is scored. So a
model is better measured with longer windows, and figures compare only at equal data, tokenizer and window.

With `bos` a window of L tokens is the beginning b, of p tokens (mostly p = 1), and L - p tokens t of the text, all of
which are scored: the window's loss is -1/(L - p) * sum_i log P(t_i | b, t_1 ... t_{i-1}). Without, b is the window's
own first token. Models that were trained with a beginning token, Gemma above all, say little without it.

A run is measured beside the model it was made from, on the same windows. The original's figure depends on nothing that
happens in the run, so it is computed once and kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from aqlm_cli import models
from aqlm_cli.data.sequences import evaluation_sequences, opening_tokens
from aqlm_cli.errors import DataError, ModelError
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted
from aqlm_cli.formatting import text_name
from aqlm_cli.models import ModelSource, Subject
from aqlm_cli.records import Perplexity, PerplexityReport

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Rows of logits that are in float32 at a time: with a vocabulary of 50,000 they take 50 MB.
ROWS_PER_CHUNK = 256


def eval_ppl(
    subject: Subject,
    text: str,
    sequence_length: int,
    dtype: str,
    windows: int | None,
    device: str,
    emit: Emit,
    bos: bool | None = None,
) -> PerplexityReport:
    """Measure a model, or what a run has packed beside its original; `text` is a source of `data.documents`.

    `windows`: only the first so many; None: all. `bos` None: where the tokenizer has it. Weights and products are in
    `dtype`, the log-softmax in float32. The report of a run is written to its `reports/`, with the digest of the
    quantized model that was measured.
    """
    emit(Noted(f"measuring {subject.source.directory}"))
    ids, given = _windows(subject.source, text, sequence_length, windows, bos, emit)
    measured = _measure(subject.source, ids, given, dtype, device, emit)
    quantized = None if subject.run is None else subject.run.artifact("quantized")
    if quantized is not None:
        emit(Noted(f"{subject.source.directory} is made from {quantized.directory.name}/"))
    original = _original(subject, ids, given, dtype, device, emit)
    report = PerplexityReport(
        model=subject.source.name,
        data=text,
        perplexity=measured.perplexity,
        stderr=measured.stderr,
        windows=len(ids),
        sequence_length=sequence_length,
        dtype=dtype,
        original=original,
        ratio=None if original is None else measured.perplexity / original.perplexity,
        bos=given > 0,
    )
    if subject.run is not None:
        parents = subject.run.current("packed").manifest.parents
        path = subject.run.write_report(_file_name(report), {**report.as_json(), "quantized": parents.get("quantized")})
        emit(Noted(f"wrote {path}; `aqlm pack {subject.run.path} --overwrite` puts it on the model card"))
    return report


def perplexity(losses: Tensor) -> Perplexity:  # losses [windows]
    """exp(m) for the mean m of the windows' mean losses; windows have equal length, so m is the mean over tokens.

    By the delta method exp(m) is uncertain by exp(m) times the uncertainty of m, the windows' standard deviation over
    the root of their number. Not covered: that neighbouring windows of one document are alike.
    """
    mean = math.exp(losses.mean().item())
    return Perplexity(mean, mean * losses.std().item() / math.sqrt(len(losses)))


@torch.inference_mode()
def sequence_losses(network: nn.Module, ids: Tensor, given: int = 1) -> Iterator[float]:  # ids [windows, length]
    """Mean negative log likelihood, in nats, of all tokens but the `given` first, of one window after the other.

    One window's logits are the only large tensor: each chunk of them becomes float32 on its own.
    """
    for window in ids:
        logits = network(window[None], use_cache=False).logits[0, given - 1 : -1]  # [length - given, vocabulary]
        total = 0.0
        for chunk, following in zip(logits.split(ROWS_PER_CHUNK), window[given:].split(ROWS_PER_CHUNK), strict=True):
            total += nn.functional.cross_entropy(chunk.float(), following, reduction="sum").item()
        yield total / len(logits)


def _windows(
    source: ModelSource, text: str, sequence_length: int, windows: int | None, bos: bool | None, emit: Emit
) -> tuple[Tensor, int]:
    """Token ids `[windows, length]`, and how many at the beginning of each are no text."""
    models.refuse_longer_than_stated(source, sequence_length, "--sequence-length")
    tokenizer = models.load_tokenizer(source)
    opening = opening_tokens(tokenizer, bos)
    if opening and bos is None:
        emit(Noted("every window begins as the tokenizer begins a text; published figures mostly need --no-bos"))
    ids = evaluation_sequences(text, sequence_length, tokenizer, opening=opening, emit=emit)[:windows]
    if len(ids) < 2:
        raise DataError(f"one window of {text} gives no standard error; lower --sequence-length or raise --windows")
    models.refuse_unknown_tokens(source, ids)
    return ids, len(opening)


def _measure(source: ModelSource, ids: Tensor, given: int, dtype: str, device: str, emit: Emit) -> Perplexity:
    stage = f"eval-ppl {source.short_name}"
    network = models.load_network(source, DTYPES[dtype], device)
    emit(StageStarted(stage, len(ids), "window"))
    losses: list[float] = []
    for loss in sequence_losses(network, ids.to(device), max(1, given)):
        if not math.isfinite(loss):
            raise ModelError(
                f"{source.name}: the loss on window {len(losses)} is not finite in {dtype}; the weights hold NaN, or "
                f"activations overflow: try --dtype float32"
            )
        losses.append(loss)
        emit(Advanced(stage, len(losses), f"perplexity {math.exp(sum(losses) / len(losses)):.2f}"))
    return perplexity(torch.tensor(losses, dtype=torch.float64))


def _original(subject: Subject, ids: Tensor, given: int, dtype: str, device: str, emit: Emit) -> Perplexity | None:
    """The figure of the model that a run was made from; kept under a digest of all that it depends on."""
    source = subject.original()
    if source is None or subject.run is None:
        return None
    facts = {"model": source.identity, "dtype": dtype, "windows": list(ids.shape)}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + ids.numpy().tobytes()).hexdigest()
    kept = subject.run.reports / f"original-{digest[:16]}.json"
    if kept.exists():
        found = subject.run.read_report(kept.name)
        return Perplexity(found["perplexity"], found["stderr"])
    measured = _measure(source, ids, given, dtype, device, emit)
    subject.run.write_report(kept.name, {**facts, "perplexity": measured.perplexity, "stderr": measured.stderr})
    return measured


def _file_name(report: PerplexityReport) -> str:
    """eval-ppl-wikitext2-148x2048-float32.json, with -bos where windows have it; of a file only its name counts."""
    text = re.sub(r"[^\w.-]+", "_", text_name(report.data))
    return (
        f"eval-ppl-{text}-{report.windows}x{report.sequence_length}-{report.dtype}{'-bos' if report.bos else ''}.json"
    )
