"""Text from a model, token by token."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from aqlm_cli.arguments import check_fields
from aqlm_cli.errors import DataError, UsageError
from aqlm_cli.evaluation.evaluation import Remember, compute_again
from aqlm_cli.evaluation.model import EvaluatedModel
from aqlm_cli.events import Emit
from aqlm_cli.formatting import facts
from aqlm_cli.records import Record
from aqlm_cli.spec.evaluate import Head


@dataclass(frozen=True)
class GenerationSettings:
    """`prompt` is continued as it is, without a chat template. `backend` and `head` as in the section `bench`.

    At temperature 0 the likeliest token is taken each time; above it tokens are drawn, by `seed`.
    """

    prompt: str
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    backend: str | None = None
    head: Head = "exact"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_new_tokens < 1:
            raise UsageError(f"{self.max_new_tokens} new tokens are none; give at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature {self.temperature} is not possible; give 0 or more")


@dataclass(frozen=True)
class GenerationReport(Record):
    """`text` is the continuation without the prompt; `tokens` counts it. The speed includes reading the prompt."""

    model: str
    prompt: str
    text: str
    tokens: int
    seconds: float
    tokens_per_second: float
    decoding: str
    version: int = 1

    def table(self) -> Table:
        speed = f"{self.tokens} tokens in {self.seconds:.1f} s: {self.tokens_per_second:.1f} tokens/s; {self.decoding}"
        return facts(self.model, [("prompt", self.prompt), ("text", self.text), ("speed", speed)])


class GenerationEvaluation:
    beside_base = False

    def run(
        self,
        model: EvaluatedModel,
        base: EvaluatedModel | None,
        settings: GenerationSettings,
        emit: Emit,
        remember: Remember = compute_again,
    ) -> GenerationReport:
        """Text of the model alone."""
        tokenizer, longest = model.text_tokenizer(), settings.max_new_tokens
        ids = torch.tensor(tokenizer.encode(settings.prompt), dtype=torch.int64, device=model.device)  # [length]
        if ids.numel() == 0:
            raise DataError("the prompt has no token; give some text with --prompt")
        model.refuse_tokens(ids)
        # The last token is not read.
        model.refuse_length(len(ids) + longest - 1, "--tokens, or shorten --prompt", stated=False)
        decoding = model.decoding(len(ids) + longest, settings.backend, settings.head)
        ends = model.end_tokens()
        draw = torch.Generator(model.device).manual_seed(settings.seed)
        started = time.perf_counter()
        new = [_choose(decoding.prefill(ids), settings.temperature, draw)]
        while len(new) < longest and new[-1] not in ends:
            new.append(_choose(decoding.step(new[-1]), settings.temperature, draw))
        seconds = time.perf_counter() - started
        return GenerationReport(
            model=model.name,
            prompt=settings.prompt,
            text=str(tokenizer.decode(new, skip_special_tokens=True)),
            tokens=len(new),
            seconds=seconds,
            tokens_per_second=len(new) / seconds,
            decoding=decoding.name,
        )

    def files(self, report: GenerationReport) -> Mapping[str, Mapping[str, Any] | bytes]:
        """None: the text is for the screen."""
        return {}


def _choose(logits: Tensor, temperature: float, draw: torch.Generator) -> int:  # logits [vocabulary]
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=draw))
