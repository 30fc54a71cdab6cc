"""Log-likelihoods of the choices of a question, after lm-evaluation-harness (`multiple_choice`, `HFLM`).

A choice follows its question after a space, unless it begins with white space of its own. Both are tokenized together,
and the tokens beyond those of the question alone are the choice's; white space at the end of the question belongs to
the choice. An empty question is the BOS token, or else the end-of-text token. What is longer than the model reads is
cut from the left. The log-likelihood of a choice is the sum over its tokens; the model answers with the largest: of the
sums (acc), or of the sums divided by the characters (acc_norm) or bytes (acc_bytes) of the choice without the space
before it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aqlm_cli.data.questions import Question, read_questions
from aqlm_cli.errors import DataError, ModelError
from aqlm_cli.evaluation.answers import Answers
from aqlm_cli.evaluation.model import EvaluatedModel
from aqlm_cli.evaluation.perplexity import DTYPES
from aqlm_cli.evaluation.scoring import ROWS_PER_CHUNK, Reader, log_probabilities
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted
from aqlm_cli.formatting import text_name
from aqlm_cli.models.positions import stated_length

DEFAULT_LENGTH = 2048
"""Tokens that a model reads where its config does not say, as in lm-evaluation-harness."""

NOT_FINITE = "the weights hold NaN, or activations overflow: try eval_ppl.dtype float32"
"""End of the message about a log-likelihood that is not finite."""

METRICS = ("acc", "acc_norm", "acc_bytes")


@dataclass(frozen=True, eq=False)
class Reading:
    """Tokens that a model reads at once, and choices whose tokens begin to follow after `ids[first]`.

    `cut`: the beginning of the question is left out.
    """

    ids: Tensor  # [n]
    first: int
    choices: tuple[int, ...]
    following: Tensor  # [choices, n - first]
    cut: bool


class Encoder:
    """Tokens of a question and of a choice that follows it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self._opening = None if self._start is None else tokenizer.decode([self._start])

    def pair(self, question: Question, choice: str) -> tuple[list[int], list[int]]:
        """The tokens of the question, and those of the choice; DataError where either has none."""
        continuation = choice if choice[0].isspace() else f" {choice}"
        if not question.text:
            before, following = self._after_nothing(question, continuation)
        else:
            text = question.text.rstrip()
            before = self._encode(text)
            following = self._encode(question.text + continuation)[len(before) :]
        if not before or not following:
            raise DataError(f"{question.place}: {choice!r} adds no token to the question; change one of them")
        return before, following

    def _after_nothing(self, question: Question, continuation: str) -> tuple[list[int], list[int]]:
        if self._start is None:
            raise DataError(f"{question.place}: `question` is empty, and the tokenizer has no BOS token; write one")
        tokens = self._tokenizer.encode(continuation, add_special_tokens=False)
        return (tokens[:1], tokens[1:]) if tokens[:1] == [self._start] else ([self._start], tokens)

    def _encode(self, text: str) -> list[int]:
        special = self._opening is None or not text.startswith(self._opening)  # or BOS would be there twice
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
        return tokens


def context_length(network: Any) -> int:
    """Tokens that a network reads at once, as its config says."""
    stated = stated_length(network.config.to_dict())
    return DEFAULT_LENGTH if stated is None else stated[1]


def readings_of(question: Question, encoder: Encoder, length: int) -> list[Reading]:
    """The readings of a question by a model that reads `length` tokens; choices after the same tokens share one."""
    own: dict[tuple[bool, tuple[int, ...]], list[tuple[int, list[int]]]] = {}
    for number, choice in enumerate(question.choices):
        before, following = encoder.pair(question, choice)
        if len(following) > length:
            raise DataError(f"{question.place}: choice {number} has {len(following)} tokens, the model reads {length}")
        tokens = [*before, *following][:-1]  # the last one is predicted and not read
        own.setdefault((len(tokens) > length, tuple(tokens[-length:])), []).append((number, following))
    return [
        Reading(
            torch.tensor(ids, dtype=torch.int64),
            len(ids) - len(choices[0][1]),
            tuple(number for number, _ in choices),
            torch.tensor([following for _, following in choices], dtype=torch.int64),
            cut,
        )
        for (cut, ids), choices in own.items()
    ]


def log_likelihoods(reader: Reader, reading: Reading, device: torch.device) -> Tensor:  # [choices] float64
    """The log-likelihood of each choice of a reading, in nats."""
    total = torch.zeros(len(reading.choices), dtype=torch.float64, device=device)
    parts = reading.following.to(device).split(ROWS_PER_CHUNK, dim=1)  # [choices, chunk] each
    for tokens, logits in zip(parts, reader.following(reading.ids.to(device), reading.first), strict=True):
        total += log_probabilities(logits).gather(1, tokens.T).sum(0, dtype=torch.float64)
    return total.cpu()


def outcomes_of(question: Question, likelihoods: Sequence[float]) -> Mapping[str, float]:
    """Outcomes by metric: 1 where the right choice is the first with the highest score, else 0."""
    lengths = ([1] * len(likelihoods), map(len, question.choices), (len(one.encode()) for one in question.choices))
    found = {}
    for metric, sizes in zip(METRICS, lengths, strict=True):
        values = [likelihood / size for likelihood, size in zip(likelihoods, sizes, strict=True)]
        found[metric] = float(values.index(max(values)) == question.answer)
    return found


class LocalTask:
    """The questions of a file, or the `first` so many."""

    protocol = "choices"
    packages: tuple[str, ...] = ()

    def __init__(self, file: str, first: int | None) -> None:
        self._name = text_name(file)
        self._questions = read_questions(Path(file))[:first]
        if len(self._questions) < 2:
            raise DataError(f"{file}: one question gives no standard error; write at least two")

    def answers(self, model: EvaluatedModel, tokenizer: Any, dtype: str, emit: Emit) -> Answers:
        """The answers of a model to the questions, as this tokenizer cuts them."""
        network: Any = model.network(DTYPES[dtype])
        encoder, length = Encoder(tokenizer), context_length(network)
        asked = [readings_of(question, encoder, length) for question in self._questions]
        readings = [reading for group in asked for reading in group]
        model.refuse_tokens(torch.cat([part.flatten() for one in readings for part in (one.ids, one.following)]))
        cut = sum(reading.cut for reading in readings)
        if cut:
            told = f"{cut} of {len(readings)} sequences are longer than the {length} tokens that {model.name} reads"
            emit(Noted(f"{told}; the beginning of their questions is left out"))
        likelihoods = tuple(self._likelihoods(network, model, asked, emit))
        found = [outcomes_of(*pair) for pair in zip(self._questions, likelihoods, strict=True)]
        return Answers(
            outcomes={self._name: {metric: tuple(one[metric] for one in found) for metric in METRICS}},
            digest=self._digest(),
            sequences=len(readings),
            tokens=sum(reading.following.numel() for reading in readings),
            cut=cut,
            likelihoods=likelihoods,
        )

    def _likelihoods(
        self, network: Any, model: EvaluatedModel, asked: Sequence[Sequence[Reading]], emit: Emit
    ) -> Iterator[tuple[float, ...]]:
        """The log-likelihoods of the choices of each question."""
        stage, device = f"tasks {model.short_name}", next(network.parameters()).device
        emit(StageStarted(stage, len(asked), "question"))
        right = 0.0
        with torch.inference_mode():
            reader = Reader(network)
        for done, (question, readings) in enumerate(zip(self._questions, asked, strict=True), 1):
            found = [math.nan] * len(question.choices)
            with torch.inference_mode():
                for reading in readings:
                    values = log_likelihoods(reader, reading, device).tolist()
                    for number, value in zip(reading.choices, values, strict=True):
                        found[number] = value
            if not all(math.isfinite(value) for value in found):
                raise ModelError(f"{model.name}: a log-likelihood ({question.place}) is not finite; {NOT_FINITE}")
            right += outcomes_of(question, found)["acc"]
            emit(Advanced(stage, done, f"accuracy {right / done:.3f}"))
            yield tuple(found)

    def _digest(self) -> str:
        content = [[one.text, one.choices, one.answer] for one in self._questions]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
