"""Text to tokens and back, without transformers where the tokenizer's file says it all.

transformers imports its networks with its tokenizers, a second before a short text begins.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from torch import Tensor

from aqlm_cli.errors import ModelError
from aqlm_cli.models.loading import load_tokenizer
from aqlm_cli.models.source import ModelSource, model_config

PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes of transformers that do what tokenizer.json says."""

CHANGES = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "added_tokens_decoder",
    "additional_special_tokens",
    "clean_up_tokenization_spaces",
    "extra_special_tokens",
    "split_special_tokens",
)
"""Settings of tokenizer_config.json by which they would do something else."""


class Tokenizer(Protocol):
    """What a prompt and its continuation need."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...


def open_tokenizer(source: ModelSource) -> Tokenizer:
    """The model's tokenizer; ModelError where there is none that can be loaded."""
    tokenizer = _from_file(source.directory)
    if tokenizer is not None:
        return _FileTokenizer(tokenizer)
    loaded: Any = load_tokenizer(source)
    by_transformers: Tokenizer = loaded
    return by_transformers


def refuse_unknown_tokens(source: ModelSource, ids: Tensor) -> None:
    """ModelError where a text has become a token that the model has no embedding of."""
    config, largest = model_config(source), int(ids.max())
    known = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    if isinstance(known, int) and largest >= known:
        raise ModelError(
            f"{source.name} knows {known} tokens, and its tokenizer made of the text one that is number {largest}; "
            f"put the tokenizer there that belongs to it"
        )


def _from_file(directory: Path) -> tokenizers.Tokenizer | None:
    """What tokenizer.json says, where tokenizer_config.json adds nothing; whatever is odd is transformers' task."""
    try:
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") not in PLAIN or any(settings.get(name) for name in CHANGES):
            return None
        tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception:  # tokenizers raises no narrower one; a broken file is named when transformers reads it
        return None
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    named = [value for key, value in settings.items() if key.endswith("_token") and value]
    return tokenizer if all(isinstance(value, str) and value in special for value in named) else None


class _FileTokenizer:
    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
