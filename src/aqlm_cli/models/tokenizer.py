"""Text to tokens and back, without transformers if tokenizer.json is enough.

transformers imports its networks with its tokenizers, which takes a second.
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
"""Tokenizer classes of transformers that follow tokenizer.json."""

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
"""Settings of tokenizer_config.json that change the result."""


class Tokenizer(Protocol):
    """Encoding of a prompt, and decoding of its continuation."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...


def open_tokenizer(source: ModelSource) -> Tokenizer:
    """The model's tokenizer; ModelError if none can be loaded."""
    tokenizer = _from_file(source.directory)
    if tokenizer is not None:
        return _FileTokenizer(tokenizer)
    loaded: Any = load_tokenizer(source)
    by_transformers: Tokenizer = loaded
    return by_transformers


def refuse_unknown_tokens(source: ModelSource, ids: Tensor) -> None:
    """Raise ModelError if a token id has no embedding in the model."""
    config, largest = model_config(source), int(ids.max())
    vocab_size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    if isinstance(vocab_size, int) and largest >= vocab_size:
        raise ModelError(
            f"{source.name}: token id {largest} is outside vocab_size {vocab_size}; the tokenizer does not match the "
            "model, replace its files with those of this model"
        )


def _from_file(directory: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of tokenizer.json, if tokenizer_config.json changes nothing; else None: use transformers."""
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
