"""Target: the size, bits, divergence or speed that a whole model is to have, and the schemes to reach it with."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from aqlm_cli.errors import UsageError
from aqlm_cli.spec.section import Names, Positive, Rate, Section, understood
from aqlm_cli.spec.treatment import Treatment, parse_treatment
from aqlm_cli.spec.units import parse_bytes

Question: TypeAlias = Literal["size", "bits", "kl", "speed"]
WHOLE_MODELS = 0.5
"""Share of the sequences on which whole models are measured: all on the same, so that their differences need few."""

QUESTIONS: tuple[Question, ...] = ("size", "bits", "kl", "speed")


class TargetConfig(Section):
    """Choose at most one of the first four: an allocation then gives every layer that no rule names its scheme.

    `size`, such as 60MB, is that of all safetensors files, never exceeded; `bits` are the same per parameter of the
    model. `kl` is the divergence from the base model, in nats a token, at the least size. `speed` is of decoding, in
    tokens a second, as far as reading the weights bounds it on this machine.

    `among` are the schemes for layers in the blocks, and `tables` those for embeddings and head, each with its method
    before a colon if it is not the first that takes it. `sequences` of the calibration set measure the Hessians. On
    half of them `mixes` whole models, which differ in their schemes, tell what an error in each kind of layer does.
    """

    size: str | None = None
    bits: Rate | None = None
    kl: Rate | None = None
    speed: Rate | None = None
    among: Annotated[Names, Field(min_length=1)] = ("1x8g8", "2x8g8c8", "2x8g8", "3x8g8c8", "3x8g8", "4x8g8c8", "4x8g8")
    tables: Names = (
        "2x8g8",
        "2x8g8+int4g64r4096",
        "3x8g8",
        "3x8g8+int4g64r1024",
        "3x8g8+int4g64r4096",
        "4x8g8",
        "int4g64",
        "int5g64",
        "int6g64",
        "int8g64",
    )
    mixes: Positive = 4
    sequences: Positive = 16

    @property
    def question(self) -> Question | None:
        """The one of the four that is asked; None: no allocation is made."""
        return next((name for name in QUESTIONS if getattr(self, name) is not None), None)

    @property
    def label(self) -> str:
        """The target in a word, for the name of a directory."""
        forms = {"size": "{}", "bits": "{:g}bits", "kl": "kl{:g}", "speed": "{:g}tps"}
        assert self.question is not None
        text = forms[self.question].format(getattr(self, self.question))
        return re.sub(r"[^\w.]", "", text)

    def __str__(self) -> str:
        forms = {"size": "{}", "bits": "{:g} bits a parameter", "kl": "KL {:g}", "speed": "{:g} tokens/s"}
        assert self.question is not None
        return forms[self.question].format(getattr(self, self.question))

    def treatments(self, preferred: str) -> tuple[Treatment, ...]:
        """Treatments of `among`, by `preferred` where no method is named and it takes the scheme."""
        return tuple(parse_treatment(word, preferred) for word in self.among)

    def of_tables(self, preferred: str) -> tuple[Treatment, ...]:
        """Treatments of `tables`."""
        return tuple(parse_treatment(word, preferred) for word in self.tables)

    @field_validator("size")
    @classmethod
    def _is_size(cls, text: str | None) -> str | None:
        if text is not None:
            understood(parse_bytes, text)
        return text

    @field_validator("among", "tables")
    @classmethod
    def _are_treatments(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        for word in words:
            understood(parse_treatment, word)
        return words

    @model_validator(mode="after")
    def _asks_once(self) -> TargetConfig:
        if len(asked := [name for name in QUESTIONS if getattr(self, name) is not None]) > 1:
            raise ValueError(f"targets exclude each other, and {' and '.join(asked)} are given; keep one of them")
        return self


def parse_target(text: str) -> float:
    """The divergence of the flag `--target kl=0.1`. UsageError for another form."""
    name, _, value = text.partition("=")
    number = r"([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?"
    if name != "kl" or not re.fullmatch(number, value, flags=re.ASCII | re.IGNORECASE) or not float(value):
        raise UsageError(f"--target {text!r} is not understood; write kl=NUMBER such as kl=0.1, or give --target-size")
    return float(value)
