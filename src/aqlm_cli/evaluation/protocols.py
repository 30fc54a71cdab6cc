"""Protocols: which tokens of a text a model reads together, and which of them are scored.

A text of n tokens t becomes sequences; of each the tokens from `first` on are scored, given all before them in the
sequence. With l the negative log likelihoods, in nats, of the m scored tokens of a sequence:

- gptq-L: sequences t[iL : (i+1)L], all complete ones, scored from the second token on; exp(mean l). aqlm-4096 and
  llama3-8192 are the same at the lengths of those papers;
- llamacpp-512: sequences as those of gptq at L = 512, the first token replaced by BOS where the tokenizer puts one
  before a text; scored are the last 255 tokens of each; exp(mean l);
- strided-2048/512: sequences t[512i : 512i + 2048], until one reaches the end of the text; scored is what no sequence
  before it has; exp(sum (m-1) mean(l) / sum (m-1)), where m counts the first token of the text, too;
- word: every document by itself, after a BOS token: sequences t[2048i : 2048(i+1)], given the token before them; the
  last one is given as much as 2048 tokens allow; exp(sum l / words), and the same for bytes.

Sources: gptq, github.com/IST-DASLab/gptq (datautils.py, and its loop over sequences of 2048); llamacpp-512,
`llama-perplexity` of llama.cpp; strided, "Perplexity of fixed-length models" in the documentation of transformers,
whose weight of a sequence is one less than its tokens; word, `loglikelihood_rolling` of lm-evaluation-harness with
max_length=2048: words are what white space separates, bytes those of UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aqlm_cli.data.chats import Chat
from aqlm_cli.data.files import Document
from aqlm_cli.data.sequences import (
    TextTokenizer,
    evaluation_sequences,
    evaluation_tokens,
    opening_tokens,
)
from aqlm_cli.data.sources import documents
from aqlm_cli.errors import DataError
from aqlm_cli.events import Emit

TOKEN, WORD, BYTE = "token", "word", "byte"
"""Units that a perplexity is counted by."""


@dataclass(frozen=True, eq=False)
class ScoredSequence:
    """Tokens read together: those from `first` on are scored. Its mean loss counts `weight` times."""

    ids: Tensor  # [L]
    first: int
    weight: float
    unit: int  # the sequence or document that it is, or is part of: standard errors take these for independent


@dataclass(frozen=True, eq=False)
class Cut:
    """The sequences of a text, in order of their units; `counts` are the tokens, words or bytes of each unit."""

    sequences: tuple[ScoredSequence, ...]
    counts: Mapping[str, Tensor]  # [units] float64 each

    @property
    def scored(self) -> int:
        """Tokens that are scored."""
        return sum(len(sequence.ids) - sequence.first for sequence in self.sequences)

    @property
    def units(self) -> int:
        return self.sequences[-1].unit + 1

    @property
    def longest(self) -> int:
        return max(len(sequence.ids) for sequence in self.sequences)

    def first(self, units: int | None) -> Cut:
        """The first units alone; None: all."""
        if units is None or units >= self.units:
            return self
        kept = tuple(sequence for sequence in self.sequences if sequence.unit < units)
        return Cut(kept, {name: count[:units] for name, count in self.counts.items()})


@dataclass(frozen=True)
class Protocol:
    """A model reads at most `length` tokens at once; `main` is what the perplexity is counted by."""

    name: str
    length: int
    cut: Callable[[str, TextTokenizer, Emit], Cut]
    main: str = TOKEN


# ------------------------------------------------------------------------------------------------------- the sequences


def rows(ids: Tensor, first: int) -> Cut:  # ids [n, L]
    """Sequences of one length, each a unit, scored from token `first` on."""
    return _by_tokens([ScoredSequence(row, first, len(row) - first, unit) for unit, row in enumerate(ids)])


def sliding(tokens: Sequence[int], length: int, stride: int) -> Cut:
    """Sequences that start every `stride` tokens; each scores what comes after the one before it."""
    sequences: list[ScoredSequence] = []
    ids, scored = torch.tensor(tokens, dtype=torch.int64), 0
    for start in range(0, len(tokens), stride):
        end = min(start + length, len(tokens))
        own = end - scored  # with the first token of the text, which nothing is known of
        sequence = ids[start:end]
        sequences.append(ScoredSequence(sequence, max(1, len(sequence) - own), own - 1, len(sequences)))
        scored = end
        if end == len(tokens):
            break
    return _by_tokens([sequence for sequence in sequences if sequence.weight > 0])


def rolling(tokens: Sequence[int], before: int, length: int, unit: int) -> list[ScoredSequence]:
    """Sequences of a document in which every token is scored, the first given the token `before`."""
    ids, scored = torch.tensor([before, *tokens], dtype=torch.int64), 1
    sequences: list[ScoredSequence] = []
    while scored < len(ids):
        end = min(scored + length, len(ids))
        start = max(0, end - length - 1)
        sequences.append(ScoredSequence(ids[start:end], scored - start, end - scored, unit))
        scored = end
    return sequences


def _by_tokens(sequences: Sequence[ScoredSequence]) -> Cut:
    weights = torch.tensor([sequence.weight for sequence in sequences], dtype=torch.float64)
    return Cut(tuple(sequences), {TOKEN: weights})


# ------------------------------------------------------------------------------------------------------- the protocols


def gptq(length: int, bos: bool | None = False) -> Protocol:
    """GPTQ's protocol; with `bos` each sequence starts as the tokenizer starts a text (None: where it does so)."""

    def cut(data: str, tokenizer: TextTokenizer, emit: Emit) -> Cut:
        opening = opening_tokens(tokenizer, bos)
        ids = evaluation_sequences(data, length, tokenizer, opening=opening, emit=emit)
        return rows(ids, max(1, len(opening)))

    return Protocol(f"gptq-{length}", length, cut)


def llama_cpp(length: int) -> Protocol:
    """llama.cpp's protocol."""

    def cut(data: str, tokenizer: TextTokenizer, emit: Emit) -> Cut:
        texts = documents(data, "evaluation", emit=emit)
        texts = [*texts[:-1], texts[-1].removesuffix("\n")] if isinstance(texts[-1], str) else texts
        tokens = evaluation_tokens(texts, tokenizer, special=True)
        ids = torch.tensor(tokens[: len(tokens) // length * length], dtype=torch.int64).view(-1, length)
        _refuse_none(ids, data, len(tokens), length)
        opening = opening_tokens(tokenizer, None)
        if opening:
            ids = torch.cat([torch.full((len(ids), 1), opening[0]), ids[:, 1:]], dim=1)
        return rows(ids, length // 2 + 1)

    return Protocol(f"llamacpp-{length}", length, cut)


def strided(length: int, stride: int) -> Protocol:
    """The protocol of the documentation of transformers."""

    def cut(data: str, tokenizer: TextTokenizer, emit: Emit) -> Cut:
        tokens = evaluation_tokens(documents(data, "evaluation", emit=emit), tokenizer, special=True)
        found = sliding(tokens, length, stride)
        _refuse_none(found.sequences, data, len(tokens), length)
        return found

    return Protocol(f"strided-{length}/{stride}", length, cut)


def word(length: int) -> Protocol:
    """The protocol of lm-evaluation-harness; its units are documents."""

    def cut(data: str, tokenizer: TextTokenizer, emit: Emit) -> Cut:
        before = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if before is None:
            raise DataError("the model's tokenizer has neither BOS nor end-of-text token; choose another protocol")
        texts = [text for text in map(_plain, documents(data, "evaluation", emit=emit)) if text.strip()]
        sequences: list[ScoredSequence] = []
        for unit, text in enumerate(texts):
            sequences += rolling(tokenizer.encode(text, add_special_tokens=False), before, length, unit)
        words = [len(re.split(r"\s+", text)) for text in texts]
        sizes = [len(text.encode()) for text in texts]
        counts = {WORD: words, BYTE: sizes}
        return Cut(tuple(sequences), {name: torch.tensor(count, dtype=torch.float64) for name, count in counts.items()})

    return Protocol("word", length, cut, WORD)


def _plain(text: Document) -> str:
    if isinstance(text, Chat):
        raise DataError("a chat has no words that its template did not write; choose another protocol")
    return text


def _refuse_none(sequences: Sequence[object] | Tensor, data: str, tokens: int, length: int) -> None:
    if not len(sequences):
        raise DataError(f"{data} has {tokens} tokens, fewer than one sequence of {length}; choose another protocol")


PROTOCOLS: Mapping[str, Protocol] = {
    "gptq-2048": gptq(2048),
    "aqlm-4096": gptq(4096),
    "llama3-8192": gptq(8192),
    "llamacpp-512": llama_cpp(512),
    "strided-2048/512": strided(2048, 512),
    "word": word(2048),
}
"""Protocols by name."""
