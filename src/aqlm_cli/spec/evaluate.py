"""The settings of evaluations and of `bench`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from aqlm_cli.errors import UsageError
from aqlm_cli.spec.formats import BlockFloat, Formats, parse_activations
from aqlm_cli.spec.section import LARGEST, Names, Positive, Section, understood

ProtocolName: TypeAlias = Literal["gptq-2048", "aqlm-4096", "llama3-8192", "llamacpp-512", "strided-2048/512", "word"]
"""Names of the protocols, which lie where torch may be imported: `evaluation.protocols.PROTOCOLS`."""


class EvalConfig(Section):
    """`sequences`: only the first so many; None: all. `bos` as in `calibrate`; false is what GPTQ does. A `protocol`
    has a length and a beginning of its own, which count instead. `divergence` from the base model is measured in the
    same pass. `activations`, `cache` and `sort_keys` are formats of the model that is evaluated, not of its base model
    (spec/formats.py)."""

    data: Annotated[Names, Field(min_length=1)] = ("wikitext2",)
    sequences: Annotated[int, Field(ge=2)] | None = None
    sequence_length: Annotated[int, Field(ge=2, le=LARGEST)] = 2048
    bos: bool | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    protocol: ProtocolName | None = None
    divergence: bool = True
    activations: str | None = None
    cache: str | None = None
    sort_keys: bool = False

    @property
    def formats(self) -> Formats:
        return Formats(self.activations, self.cache, self.sort_keys)

    @field_validator("activations")
    @classmethod
    def _is_format(cls, word: str | None) -> str | None:
        return word if word is None else understood(parse_activations, word)

    @field_validator("cache")
    @classmethod
    def _is_block_float(cls, word: str | None) -> str | None:
        return word if word is None else understood(BlockFloat.parse, word)

    @model_validator(mode="after")
    def _sorts_a_cache(self) -> EvalConfig:
        try:
            _ = self.formats
        except UsageError as error:
            raise ValueError(str(error)) from error
        return self


class GateConfig(Section):
    """Limits of a model that has not collapsed. `prompts` (none: the fixed ones) get up to `tokens` more tokens each.

    Limits are of means over the prompts: tokens before the first other than the base model's; the share of 3-grams
    that are new, below the base model's; and nats a token, by the base model, above those of its own text.
    """

    prompts: Names = ()
    tokens: Positive = 64
    least_agreement: Annotated[float, Field(strict=False, ge=0)] = 0.0
    most_repetition: Annotated[float, Field(strict=False, ge=0)] = 0.6
    most_surprise: Annotated[float, Field(strict=False, ge=0)] = 1.5


class AttributionConfig(Section):
    """Layers or blocks, swapped into the base model or out of the quantized one, on the first `sequences` of the text
    of `eval_ppl`. `budget_minutes`: about so long, with fewer and shorter sequences; None: no limit."""

    way: Literal["in", "out"] = "in"
    unit: Literal["layer", "block"] = "layer"
    sequences: Positive = 4
    sequence_length: Annotated[int, Field(ge=2, le=LARGEST)] = 512
    budget_minutes: Annotated[float, Field(strict=False, gt=0, allow_inf_nan=False)] | None = None


class EvaluateConfig(Section):
    """The measurements of `evaluate`: `kinds` are names of evaluations.

    `tasks` are files of questions, or names of tasks of lm-evaluation-harness, for the kind tasks, which computes in
    `eval_ppl.dtype`.
    """

    kinds: Annotated[Names, Field(min_length=1)] = ("ppl",)
    tasks: Names = ()
    gate: GateConfig = GateConfig()
    attribution: AttributionConfig = AttributionConfig()


Head = Literal["exact", "int8"]


class BenchConfig(Section):
    """Lengths in tokens; `batch` is the rows of x in a single product. `backend` None: the first that can; `head`
    int8: the output head in bytes. `llama_bench` is llama.cpp's program, `llama_models` are files that it runs."""

    tokens: Positive = 32
    prompt: Positive = 512
    repeats: Positive = 5
    batch: Positive = 1
    backend: str | None = None
    head: Head = "exact"
    llama_bench: str | None = None
    llama_models: Names = ()
