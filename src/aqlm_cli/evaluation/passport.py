"""Passport: everything that a figure depends on. Figures compare where their passports agree in all but the model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from aqlm_cli.evaluation.model import EvaluatedModel
from aqlm_cli.evaluation.protocols import Cut

PACKAGES = ("aqlm-cli", "torch", "transformers")
"""The distributions whose versions a passport names."""


@dataclass(frozen=True)
class Passport:
    """`text` and `tokenizer` are digests, `model` the identity of the model. `scored` counts tokens, `sequences` what
    was read at once. `formats` are those of activations and cache, empty where both are in `dtype`."""

    protocol: str
    text: str
    tokenizer: str
    model: str
    sequences: int
    scored: int
    dtype: str
    versions: dict[str, str]
    formats: str = ""

    @property
    def column(self) -> tuple[str, ...]:
        """Equal for two figures that compare: all of the passport but model and versions."""
        names = [field.name for field in fields(self) if field.name not in ("model", "versions")]
        return tuple(str(getattr(self, name)) for name in names)


def passport_of(protocol: str, cut: Cut, model: EvaluatedModel, dtype: str, formats: str = "") -> Passport:
    """The passport of a figure of this model on this cut."""
    digest = hashlib.sha256()
    for sequence in cut.sequences:
        digest.update(f"{sequence.first} of {len(sequence.ids)};".encode() + _bytes(sequence.ids))
    return Passport(
        protocol=protocol,
        text=digest.hexdigest()[:16],
        tokenizer=tokenizer_digest(model.tokenizer()),
        model=model.identity,
        sequences=len(cut.sequences),
        scored=cut.scored,
        dtype=dtype,
        versions=versions_of(*PACKAGES),
        formats=formats,
    )


def versions_of(*names: str) -> dict[str, str]:
    """The versions of these distributions."""
    return {name: version(name) for name in names}


def tokenizer_digest(tokenizer: Any) -> str:
    """The same for tokenizers that make the same tokens of a text: of its file without the limits of a batch, or of
    its vocabulary where it has no file."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        stored: dict[str, Any] = dict(tokenizer.get_vocab())
    else:
        stored = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()[:16]


def _bytes(ids: Tensor) -> bytes:
    return ids.to(torch.int64).numpy().tobytes()
