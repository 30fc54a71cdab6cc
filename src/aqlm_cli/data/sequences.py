"""Token sequences, cut from documents: the only way from text to token ids.

- for calibration, documents shuffled by the seed and joined by the end-of-text token, cut one after another;
- for evaluation as in GPTQ (github.com/IST-DASLab/gptq, datautils.py), so that perplexities compare with published
  ones.

With an opening b of p tokens, usually the BOS token alone, each sequence of L tokens is b and the next L - p tokens of
the text. If these start with b themselves, it is not repeated. A chat becomes the tokens of the tokenizer's chat
template, which marks start and end by itself.

Shapes: n sequences, L tokens of a sequence.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from aqlm_cli.data.chats import Chat, ChatTokenizer, chat_ids
from aqlm_cli.data.files import Document
from aqlm_cli.data.sources import documents
from aqlm_cli.data.spec import SELF, share_sequences
from aqlm_cli.errors import DataError
from aqlm_cli.events import Emit, Noted, silent
from aqlm_cli.spec.config import CalibrateConfig
from aqlm_cli.spec.finetune import FinetuneConfig

# Far above the 3 to 5 of English text, so that a shuffle has a choice and there are enough tokens.
CHARACTERS_PER_TOKEN = 10

GPTQ_C4_SEQUENCES = 256


class TextTokenizer(ChatTokenizer, Protocol):
    """The part of a transformers tokenizer that is needed here."""

    @property
    def bos_token_id(self) -> Any: ...

    @property
    def eos_token_id(self) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class TokenSequences:
    """Token sequences for calibration, and the name of the source of each."""

    ids: Tensor  # [n, L], int64
    sources: tuple[str, ...]


# ------------------------------------------------------------------------------------------------------- beginnings


def opening_tokens(tokenizer: TextTokenizer, wanted: bool | None) -> tuple[int, ...]:
    """Token ids that start each sequence: those that the tokenizer puts before a text, or its BOS token.

    `wanted` None: only if the tokenizer puts some there. Empty: none. DataError if an opening is wanted and the
    tokenizer has no BOS token.
    """
    bare, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    own = tuple(whole[: next(starts, 0)])
    if wanted is False or (wanted is None and not own):
        return ()
    if not own and tokenizer.bos_token_id is None:
        raise DataError("the model's tokenizer has no BOS token; choose --no-bos, or `bos: false`")
    return own or (tokenizer.bos_token_id,)


def settings_of_text(section: CalibrateConfig | FinetuneConfig, bos: bool) -> dict[str, object]:
    """The settings of a section as an artifact stores them: `bos` as it was resolved, and only if it is on.

    An artifact from before this setting existed lacks it, and keeps the same digest.
    """
    return {**section.model_dump(mode="json", exclude={"bos"}), **({"bos": True} if bos else {})}


def recut(ids: Tensor, length: int, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Sequences `[n, length]` with opening `after`, from the text of sequences `[N, L]` with opening `before`."""
    if (ids.shape[1], *before) == (length, *after):
        return ids
    return _cut(ids[:, len(before) :].flatten().tolist(), length, after)


def _cut(tokens: list[int], length: int, opening: Sequence[int]) -> Tensor:
    """All complete sequences `[n, length]` of a text, in order and without overlap."""
    rows: list[list[int]] = []
    start, given, step = 0, list(opening), length - len(opening)
    if step < 1:
        raise DataError(f"sequences of {length} tokens leave no room for text; raise --sequence-length")
    while True:
        if given and tokens[start : start + len(given)] == given:
            start += len(given)
        if start + step > len(tokens):
            return torch.tensor(rows, dtype=torch.int64).view(-1, length)
        rows.append([*given, *tokens[start : start + step]])
        start += step


# ------------------------------------------------------------------------------------------------------ calibration


def calibration_sequences(
    spec: str,
    sequences: int | None,
    sequence_length: int,
    seed: int,
    tokenizer: TextTokenizer,
    sampled: Tensor | None = None,
    *,
    opening: Sequence[int] = (),
    emit: Emit = silent,
) -> TokenSequences:
    """Sequences of every source in the order of `spec`, each with the `opening` in front; see `parse_sources`.

    `sequences` is the total: not needed if every source has a count, shared equally by those that have none.
    `sampled` `[n, sequence_length]` are those of `self`; DataError if it is named and they are missing.
    """
    shares = share_sequences(spec, sequences)
    if sampled is None and SELF in dict(shares):
        raise DataError(f"{SELF}: only `aqlm finetune` samples text from the model; choose another source or file")
    if tokenizer.eos_token_id is None:
        between = "its BOS token" if tokenizer.bos_token_id is not None else "nothing"
        emit(Noted(f"the model's tokenizer has no end-of-text token; {between} separates documents"))
    rows, names = [], []
    for name, count in shares:
        if name == SELF and sampled is not None:
            rows.append(sampled[:count])
            sampled = sampled[count:]  # each once, if `self` is named again
        else:
            texts = documents(name, "calibration", count * sequence_length * CHARACTERS_PER_TOKEN, emit)
            rows.append(_drawn(name, texts, count, sequence_length, seed, tokenizer, opening))
        names += [name] * count
    return TokenSequences(torch.cat(rows), tuple(names))


def _drawn(
    name: str,
    texts: Iterable[Document],
    count: int,
    length: int,
    seed: int,
    tokenizer: TextTokenizer,
    opening: Sequence[int],
) -> Tensor:  # [count, length]
    shuffled = [text for text in texts if isinstance(text, Chat) or text.strip()]
    random.Random(f"{seed}/documents").shuffle(shuffled)
    # No sequence takes more than `length` tokens from the text, so this is enough.
    ids = _cut(_joined(shuffled, count * length, tokenizer), length, opening)[:count]
    if len(ids) < count:
        raise DataError(
            f"{name} has {len(ids)} sequences of {length} tokens, {count} are needed; "
            f"lower --sequences or --sequence-length, or add another source"
        )
    return ids


def _joined(texts: Iterable[Document], enough: int, tokenizer: TextTokenizer) -> list[int]:
    """Tokens of the documents until there are `enough`, separated by the end-of-text token.

    If the tokenizer has none, its BOS token separates them, or else nothing. It is not repeated if the template of a
    chat has written it.
    """
    between = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    tokens: list[int] = []
    marked = False
    for text in texts:
        ids = _tokens(text, tokenizer)
        if tokens and not (marked or between is None or (isinstance(text, Chat) and ids[:1] == [between])):
            tokens.append(between)
        tokens += ids
        marked = isinstance(text, Chat) and tokenizer.eos_token_id in ids
        if len(tokens) >= enough:
            break
    return tokens


def _tokens(text: Document, tokenizer: TextTokenizer, special: bool = False) -> list[int]:
    if isinstance(text, Chat):
        return chat_ids(text, tokenizer)
    return tokenizer.encode(text, add_special_tokens=special)


# ------------------------------------------------------------------------------------------------------- evaluation


def evaluation_sequences(
    name: str, sequence_length: int, tokenizer: TextTokenizer, *, opening: Sequence[int] = (), emit: Emit = silent
) -> Tensor:  # [windows, length]
    """GPTQ's protocol: documents joined by two newlines, tokenized once with the tokenizer's defaults, cut into
    sequences without overlap, the rest dropped. Hub c4 has its other protocol: 256 random cuts of long documents.

    With an opening, which GPTQ has in the first sequence at most, the text is tokenized without special tokens. Chats
    follow each other as the template writes them.
    """
    texts = documents(name, "evaluation", emit=emit)
    if name == "c4":
        return _cuts_of_long_documents(name, texts, sequence_length, tokenizer, opening)
    tokens = evaluation_tokens(texts, tokenizer, special=not opening)
    ids = _cut(tokens, sequence_length, opening)
    if not len(ids):
        raise DataError(
            f"{name} has {len(tokens)} tokens, fewer than one sequence of {sequence_length}; lower --sequence-length"
        )
    return ids


def evaluation_tokens(texts: Sequence[Document], tokenizer: TextTokenizer, special: bool) -> list[int]:
    """Tokens of all documents, joined by two newlines; special tokens, if any, once for the whole text."""
    if any(isinstance(text, Chat) for text in texts):
        texts = [text for text in texts if text != ""]
    tokens: list[int] = []
    for _, run in itertools.groupby(texts, lambda text: isinstance(text, Chat)):
        group = list(run)
        joined = "\n\n".join(text for text in group if isinstance(text, str))
        for part in [joined] if joined else group:
            tokens += _tokens(part, tokenizer, special and not tokens)
    return tokens


def _cuts_of_long_documents(
    name: str, texts: Sequence[Document], length: int, tokenizer: TextTokenizer, opening: Sequence[int]
) -> Tensor:  # [GPTQ_C4_SEQUENCES, length]
    """Draw documents until one is longer than a sequence, draw a start in it, 256 times; Python's generator, seed 0."""
    draw, step = random.Random(0), length - len(opening)
    too_short: set[int] = set()
    rows: list[list[int]] = []
    while len(rows) < GPTQ_C4_SEQUENCES:
        if len(too_short) == len(texts):
            raise DataError(f"no document of {name} is longer than {length} tokens; lower --sequence-length")
        number = draw.randint(0, len(texts) - 1)
        if number in too_short:
            continue
        tokens = _tokens(texts[number], tokenizer, special=not opening)
        if len(tokens) <= step:
            too_short.add(number)
            continue
        start = draw.randint(0, len(tokens) - step - 1)
        rows.append([*opening, *tokens[start : start + step]])
    return torch.tensor(rows)
