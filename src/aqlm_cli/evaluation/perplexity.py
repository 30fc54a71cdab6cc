"""Perplexity of a model on a text: exp of the mean negative log likelihood of its tokens, as GPTQ measures it.

The text is cut into sequences without overlap, each read on its own, and every token but a sequence's first is scored.
So a model does better with longer sequences, and figures compare only at equal data, tokenizer and sequence length.

With `bos` a sequence of L tokens is the opening b, of p tokens (mostly p = 1), and L - p tokens t of the text, all of
which are scored: its loss is -1/(L - p) * sum_i log P(t_i | b, t_1 ... t_{i-1}). Without, b is the sequence's own first
token. Models that were trained with a BOS token, Gemma above all, say little without it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from aqlm_cli.arguments import check_fields
from aqlm_cli.data.sequences import evaluation_sequences, opening_tokens
from aqlm_cli.errors import DataError, ModelError, UsageError
from aqlm_cli.evaluation.evaluation import Remember, compute_again
from aqlm_cli.evaluation.model import EvaluatedModel
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted
from aqlm_cli.formatting import text_name
from aqlm_cli.records import Record

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Rows of logits that are in float32 at a time: with a vocabulary of 50,000 they take 50 MB.
ROWS_PER_CHUNK = 256


@dataclass(frozen=True)
class PerplexitySettings:
    """`data` is a source of `data.documents`. `sequences`: only the first so many; None: all. `bos` None: as the
    tokenizer starts a text. Weights and matmuls are in `dtype`, the log-softmax in float32."""

    data: str
    sequence_length: int = 2048
    sequences: int | None = None
    bos: bool | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.sequences is not None and self.sequences < 1:
            raise UsageError(f"{self.sequences} sequences are none; give at least 2, or leave --sequences out for all")
        if self.sequence_length < 2:
            raise UsageError(f"sequences of {self.sequence_length} tokens score none; raise --sequence-length")
        if self.dtype not in DTYPES:
            raise UsageError(f"there is no type {self.dtype!r} to compute in; choose {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log likelihood), with the standard error that the spread over the sequences gives it."""

    perplexity: float
    stderr: float


@dataclass(frozen=True)
class PerplexityReport(Record):
    """Perplexity of `model` on `data`; `ratio` is to the base model's on the same sequences, where there is one.

    `bos`: each sequence begins with the BOS token. Figures with and without it do not compare.
    """

    model: str
    data: str
    perplexity: float
    stderr: float
    sequences: int
    sequence_length: int
    dtype: str
    base_model: Perplexity | None
    ratio: float | None
    bos: bool = False
    version: int = 1

    def table(self) -> Table:
        columns = ("model", "data", "sequences x tokens", "type", "perplexity", "ratio")
        table = Table(*columns, title="perplexity", title_justify="left")
        ratio = "" if self.ratio is None else f"{self.ratio:.4f}"
        rows = [(self.model, Perplexity(self.perplexity, self.stderr), ratio)]
        if self.base_model is not None:
            rows.insert(0, ("base", self.base_model, "1"))
        for name, measured, ratio in rows:
            table.add_row(
                Text(name),
                Text(text_name(self.data)),
                f"{self.sequences} x {self.sequence_length}" + (", bos" if self.bos else ""),
                self.dtype,
                f"{measured.perplexity:.3f} ± {measured.stderr:.3f}",
                ratio,
            )
        return table


class PerplexityEvaluation:
    beside_base = True

    def run(
        self,
        model: EvaluatedModel,
        base: EvaluatedModel | None,
        settings: PerplexitySettings,
        emit: Emit,
        remember: Remember = compute_again,
    ) -> PerplexityReport:
        ids, opening = _sequences(model, settings, emit)
        measured = measure(model, ids, opening, settings.dtype, emit)
        compared = None
        if base is not None:
            facts = {
                "model": base.identity,
                "dtype": settings.dtype,
                "sequences": list(ids.shape),
                "ids": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
            }
            kept = remember(facts, lambda: _as_dict(measure(base, ids, opening, settings.dtype, emit)))
            compared = Perplexity(kept["perplexity"], kept["stderr"])
        return PerplexityReport(
            model=model.name,
            data=settings.data,
            perplexity=measured.perplexity,
            stderr=measured.stderr,
            sequences=len(ids),
            sequence_length=settings.sequence_length,
            dtype=settings.dtype,
            base_model=compared,
            ratio=None if compared is None else measured.perplexity / compared.perplexity,
            bos=opening > 0,
        )

    def files(self, report: PerplexityReport) -> Mapping[str, Mapping[str, Any] | bytes]:
        """eval-ppl-wikitext2-148x2048-float32.json, with -bos where sequences begin so; of a path only its name."""
        text = re.sub(r"[^\w.-]+", "_", text_name(report.data))
        size = f"{report.sequences}x{report.sequence_length}"
        return {f"eval-ppl-{text}-{size}-{report.dtype}{'-bos' if report.bos else ''}.json": report.as_json()}


def perplexity(losses: Tensor) -> Perplexity:  # losses [n]
    """exp(m) for the mean m of the sequences' mean losses, which is the mean over tokens, as lengths are equal.

    By the delta method exp(m) is uncertain by exp(m) times the uncertainty of m, the sequences' standard deviation over
    the root of their number. Not covered: that neighbouring sequences of one document are alike.
    """
    mean = math.exp(losses.mean().item())
    return Perplexity(mean, mean * losses.std().item() / math.sqrt(len(losses)))


@torch.inference_mode()
def sequence_losses(network: nn.Module, ids: Tensor, given: int = 1) -> Iterator[float]:  # ids [n, L]
    """Mean negative log likelihood, in nats, of all tokens but the `given` first, of one sequence after the other.

    One sequence's logits are the only large tensor: each chunk of them becomes float32 on its own.
    """
    for sequence in ids:
        logits = network(sequence[None], use_cache=False).logits[0, given - 1 : -1]  # [L - given, vocabulary]
        total = 0.0
        for chunk, following in zip(logits.split(ROWS_PER_CHUNK), sequence[given:].split(ROWS_PER_CHUNK), strict=True):
            total += nn.functional.cross_entropy(chunk.float(), following, reduction="sum").item()
        yield total / len(logits)


def measure(model: EvaluatedModel, ids: Tensor, opening: int, dtype: str, emit: Emit) -> Perplexity:  # ids [n, L]
    """Perplexity on these sequences, the first `opening` tokens of which are no text."""
    stage = f"eval-ppl {model.short_name}"
    network = model.network(DTYPES[dtype])
    device = next(network.parameters()).device
    emit(StageStarted(stage, len(ids), "sequence"))
    losses: list[float] = []
    for loss in sequence_losses(network, ids.to(device), max(1, opening)):
        if not math.isfinite(loss):
            raise ModelError(
                f"{model.name}: the loss on sequence {len(losses)} is not finite in {dtype}; the weights hold NaN, or "
                f"activations overflow: try --dtype float32"
            )
        losses.append(loss)
        emit(Advanced(stage, len(losses), f"perplexity {math.exp(sum(losses) / len(losses)):.2f}"))
    return perplexity(torch.tensor(losses, dtype=torch.float64))


def _sequences(model: EvaluatedModel, settings: PerplexitySettings, emit: Emit) -> tuple[Tensor, int]:
    """Token ids `[n, L]`, and how many at the start of each are no text."""
    length, data = settings.sequence_length, settings.data
    model.refuse_length(length, "--sequence-length", stated=True)
    tokenizer = model.tokenizer()
    opening = opening_tokens(tokenizer, settings.bos)
    if opening and settings.bos is None:
        emit(Noted("every sequence begins as the tokenizer begins a text; published figures mostly need --no-bos"))
    ids = evaluation_sequences(data, length, tokenizer, opening=opening, emit=emit)[: settings.sequences]
    if len(ids) < 2:
        raise DataError(f"one sequence of {data} gives no standard error; lower --sequence-length or raise --sequences")
    model.refuse_tokens(ids)
    return ids, len(opening)


def _as_dict(measured: Perplexity) -> dict[str, float]:
    return {"perplexity": measured.perplexity, "stderr": measured.stderr}
