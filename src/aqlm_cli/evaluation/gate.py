"""A gate against collapse: what a quantized model writes, beside what its base model writes.

At 2 bits a model with a fair perplexity can still babble. Some fixed prompts are continued greedily by both models, and
of each continuation are told:

- agreement: tokens before the first in which the two differ;
- distinct: the share of its 3-grams that differ from those before them; a loop has few;
- loop: the most tokens in a row that repeat those a fixed distance before them, of at most LARGEST_PERIOD;
- surprise: the mean negative log likelihood of its tokens by the base model, in nats: babble has much, a loop little;
- whether it ended by itself.

A model collapsed where their means over the prompts cross a limit of GateConfig. The block that causes most is named
then, by the divergence of the base model with that block quantized alone, on what the base model wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from aqlm_cli.arguments import check_fields
from aqlm_cli.errors import UsageError
from aqlm_cli.evaluation.attribution import AttributionSettings, attribute
from aqlm_cli.evaluation.evaluation import Remember, compute_again, needed
from aqlm_cli.evaluation.model import EvaluatedModel
from aqlm_cli.evaluation.protocols import ScoredSequence
from aqlm_cli.evaluation.repetition import common_start, distinct_share, longest_loop
from aqlm_cli.evaluation.scoring import Reader, score
from aqlm_cli.events import Advanced, Emit, StageStarted, Warned
from aqlm_cli.formatting import facts
from aqlm_cli.records import Record
from aqlm_cli.spec.evaluate import GateConfig

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "Once upon a time, in a small village by the sea, there lived",
    "The three primary colours are",
    "To make a cup of tea, first",
    "The main difference between a cat and a dog is",
    "In 1969, the first people landed on",
    "def fibonacci(n):\n",
    "Dear Sir or Madam,\n\nI am writing to",
    "The theory of evolution explains how",
    "Two plus two equals four, and three plus three equals",
    "The most important thing to remember about money is",
)
"""Texts that are continued, unless the run file has others."""

ROW = 128
"""Tokens of a sequence, when blocks are evaluated on what the base model wrote."""


@dataclass(frozen=True)
class GateSettings:
    """`limits` also has the number of tokens, and prompts; none: PROMPTS."""

    limits: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Continuation:
    """The text of one model after one prompt."""

    text: str
    tokens: int
    distinct: float
    loop: int
    surprise: float
    ended: bool


@dataclass(frozen=True)
class Sample:
    """A prompt, and both continuations; `agreement` counts tokens."""

    prompt: str
    agreement: int
    base: Continuation
    model: Continuation


@dataclass(frozen=True)
class GateReport(Record):
    """Means over the samples; `reasons` are the limits that were crossed, and `block` is named if there are any."""

    model: str
    tokens: int
    agreement: float
    distinct: float
    base_distinct: float
    longest_loop: int
    surprise: float
    base_surprise: float
    ended: int
    base_ended: int
    reasons: tuple[str, ...]
    block: str | None
    block_divergence: float | None
    samples: tuple[Sample, ...]
    version: int = 1

    @property
    def collapsed(self) -> bool:
        return bool(self.reasons)

    def table(self) -> Group:
        texts = Table("prompt", "base model", "model", title="texts", title_justify="left", show_lines=True)
        for sample in self.samples:
            texts.add_row(Text(sample.prompt.strip()), Text(sample.base.text), Text(sample.model.text))
        verdict = "passes" if not self.collapsed else "COLLAPSED: " + "; ".join(self.reasons)
        rows = [
            ("verdict", verdict),
            ("agreement", f"{self.agreement:.1f} of {self.tokens} tokens, on average"),
            ("distinct 3-grams", f"{self.distinct:.1%}, base model {self.base_distinct:.1%}"),
            ("surprise", f"{self.surprise:.2f} nats a token by the base model, its own text {self.base_surprise:.2f}"),
            ("longest loop", f"{self.longest_loop} tokens"),
            ("ended", f"{self.ended} of {len(self.samples)}, base model {self.base_ended}"),
        ]
        if self.block is not None:
            rows.append(("worst block", f"{self.block}: {self.block_divergence:.3f} nats a token by itself"))
        return Group(texts, facts("gate", rows))


class GateEvaluation:
    beside_base = True

    def run(
        self,
        model: EvaluatedModel,
        base: EvaluatedModel | None,
        settings: GateSettings,
        emit: Emit,
        remember: Remember = compute_again,
    ) -> GateReport:
        base = needed(base, model)
        limits = settings.limits
        prompts = [_ids(model, prompt) for prompt in limits.prompts or PROMPTS]
        of_base, own = (_written(one, prompts, limits.tokens, emit) for one in (base, model))
        surprises = _surprises(base, prompts, [of_base, own])
        samples = tuple(
            _sample(model, prompt, (of_base[number], own[number]), pair)
            for number, (prompt, pair) in enumerate(zip(limits.prompts or PROMPTS, surprises, strict=True))
        )
        report = _report_of(model.name, limits, samples)
        if not report.collapsed:
            return report
        block, divergence = _worst_block(model, base, prompts, of_base, emit)
        emit(Warned(f"{model.name} collapsed: {'; '.join(report.reasons)}; {block} is the worst of its blocks"))
        return GateReport(**{**vars(report), "block": block, "block_divergence": divergence})

    def files(self, report: GateReport) -> Mapping[str, Mapping[str, Any] | bytes]:
        """eval-gate.json."""
        return {"eval-gate.json": report.as_json()}


# ------------------------------------------------------------------------------------------------------------- running


def _ids(model: EvaluatedModel, prompt: str) -> list[int]:
    found = model.text_tokenizer().encode(prompt)
    if not found:
        raise UsageError(f"the prompt {prompt!r} has no token; give other evaluate.gate.prompts")
    model.refuse_tokens(torch.tensor(found))
    return found


def _written(model: EvaluatedModel, prompts: Sequence[list[int]], tokens: int, emit: Emit) -> list[list[int]]:
    """The likeliest tokens after each prompt, with the one that ends a text."""
    longest = max(map(len, prompts)) + tokens
    model.refuse_length(longest - 1, "evaluate.gate.tokens", stated=False)
    decoding, ends = model.decoding(longest, None, "exact"), model.end_tokens()
    stage = f"gate {model.short_name}"
    emit(StageStarted(stage, len(prompts), "text"))
    texts = []
    for number, prompt in enumerate(prompts, 1):
        new = [int(decoding.prefill(torch.tensor(prompt)).argmax())]
        while len(new) < tokens and new[-1] not in ends:
            new.append(int(decoding.step(new[-1]).argmax()))
        texts.append(new)
        emit(Advanced(stage, number))
    return texts


def _surprises(
    base: EvaluatedModel, prompts: Sequence[list[int]], written: Sequence[Sequence[list[int]]]
) -> list[tuple[float, ...]]:
    """Mean negative log likelihood by the base model of what each model wrote after each prompt."""
    network = base.network(torch.float32)
    sequences = [
        ScoredSequence(torch.tensor([*prompt, *texts[number]]), len(prompt), 1.0, number)
        for texts in written
        for number, prompt in enumerate(prompts)
    ]
    with torch.inference_mode():
        reader = Reader(network)
    found = [float(one.losses[0].mean()) for one in score([reader], sequences, next(network.parameters()).device)]
    return list(
        zip(*(found[start : start + len(prompts)] for start in range(0, len(found), len(prompts))), strict=True)
    )


def _sample(
    model: EvaluatedModel, prompt: str, written: tuple[list[int], list[int]], surprises: tuple[float, ...]
) -> Sample:
    tokenizer, ends = model.text_tokenizer(), model.end_tokens()
    base, own = (
        Continuation(
            text=str(tokenizer.decode(ids, skip_special_tokens=True)),
            tokens=len(ids),
            distinct=distinct_share(ids),
            loop=longest_loop(ids),
            surprise=surprise,
            ended=ids[-1] in ends,
        )
        for ids, surprise in zip(written, surprises, strict=True)
    )
    return Sample(prompt, common_start(*written), base, own)


def _report_of(name: str, limits: GateConfig, samples: Sequence[Sample]) -> GateReport:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    agreement = mean([one.agreement for one in samples])
    distinct, base_distinct = (
        mean([one.model.distinct for one in samples]),
        mean([one.base.distinct for one in samples]),
    )
    surprise, base_surprise = (
        mean([one.model.surprise for one in samples]),
        mean([one.base.surprise for one in samples]),
    )
    reasons = []
    if agreement < limits.least_agreement:
        reasons.append(f"it agrees with its base model for {agreement:.1f} tokens, limit {limits.least_agreement:g}")
    if base_distinct - distinct > limits.most_repetition:
        reasons.append(f"{distinct:.0%} of its 3-grams are new, {base_distinct:.0%} of its base model's")
    if surprise - base_surprise > limits.most_surprise:
        told = f"{surprise:.2f} nats a token, {base_surprise:.2f} of its own text"
        reasons.append(f"its text has {told} by its base model, limit {limits.most_surprise:g} more")
    return GateReport(
        model=name,
        tokens=limits.tokens,
        agreement=agreement,
        distinct=distinct,
        base_distinct=base_distinct,
        longest_loop=max(one.model.loop for one in samples),
        surprise=surprise,
        base_surprise=base_surprise,
        ended=sum(one.model.ended for one in samples),
        base_ended=sum(one.base.ended for one in samples),
        reasons=tuple(reasons),
        block=None,
        block_divergence=None,
        samples=tuple(samples),
    )


def _worst_block(
    model: EvaluatedModel,
    base: EvaluatedModel,
    prompts: Sequence[list[int]],
    written: Sequence[list[int]],
    emit: Emit,
) -> tuple[str, float]:
    """The block whose quantization alone makes the largest divergence on the base model's texts, and how much."""
    texts = [[*prompt, *new] for prompt, new in zip(prompts, written, strict=True)]
    tokens = torch.tensor([token for text in texts for token in text])  # one after another, as documents are
    length = min(ROW, max(map(len, texts)))  # so many at once the model has read before
    ids = tokens[: len(tokens) // length * length].view(-1, length)
    found = attribute(model, base, ids, AttributionSettings("the base model's texts", unit="block"), emit)
    return found.worst_block, found.blocks[found.worst_block]
