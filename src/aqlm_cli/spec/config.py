"""The run file as frozen records, one section a stage. Every default is written here; run_file.py reads and merges."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from aqlm_cli.errors import UsageError
from aqlm_cli.spec.schemes import AdditiveScheme, parse_scheme
from aqlm_cli.spec.units import parse_bytes, parse_duration

DEFAULT_SEQUENCES = 192
"""Calibration windows where neither `calibrate.sequences` nor any source of `calibrate.data` has a count."""

Positive: TypeAlias = Annotated[int, Field(ge=1)]
Count: TypeAlias = Annotated[int, Field(ge=0)]
Beam: TypeAlias = Literal[2, 4, 8, 16, 32, 64, 128, 256]
# Not strict, as YAML 1.1 reads 1e-4 (without a dot) as a string; pydantic makes a number of it.
Rate: TypeAlias = Annotated[float, Field(strict=False, gt=0, allow_inf_nan=False)]
# Not strict, as YAML has lists and a frozen record has tuples.
Names: TypeAlias = Annotated[tuple[str, ...], Field(strict=False)]


def _understood(parse: Callable[[str], object], text: str) -> str:
    """`text` as it is, if it can be parsed; pydantic wants a ValueError where not."""
    try:
        parse(text)
    except UsageError as error:
        raise ValueError(str(error)) from error
    return text


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CalibrateConfig(Section):
    """Text to fit to, cut into windows of `sequence_length` tokens.

    `sequences` windows in all; None: the sum of the sources' own counts, or DEFAULT_SEQUENCES where none has one.
    `statistics_sequences` of them measure the second moments of every layer's inputs. `bos`: each window begins with
    the beginning-of-text token; None: where the tokenizer puts it before a text by itself.
    """

    data: str = "c4"
    sequences: Positive | None = None
    sequence_length: Annotated[int, Field(ge=2)] = 1024
    bos: bool | None = None
    statistics_sequences: Positive = 16


class SearchConfig(Section):
    """How codes and codebooks of one matrix are found.

    `ldlq` starts with error feedback, chooses pairs of codes jointly and solves for the codebooks by conjugate
    gradients; `published` is the recipe of AQLM's authors, which knows only the last three settings and k-means.
    """

    recipe: Literal["ldlq", "published"] = "ldlq"
    kmeans_iterations: Positive = 25
    rounds: Positive = 6
    ldlq_rounds: Count = 4
    cg_steps: Positive = 2
    final_cg_steps: Count = 4
    beam: Beam = 64
    final_beam: Beam = 256
    damping: Rate = 0.01
    factor_damping: Rate = 1e-4
    adam_steps: Positive = 100
    adam_learning_rate: Rate = 1e-4
    tolerance: Rate = 0.01


class FitConfig(Section):
    """Fitting codebooks, scales, norms and biases of a finished block to the original block's output.

    `error` per_token: each token's squared error as a share of its own output's square; total: all tokens' together.
    `learning_rate_unit` rms: each tensor's rate is `learning_rate` times its root mean square. After the warm-up the
    rate falls as half a cosine to `min_lr_ratio` of itself. `patience`: epochs without gain on the held-out windows
    before it stops; None: never before `epochs`.
    """

    error: Literal["per_token", "total"] = "per_token"
    epochs: Count = 2
    sequences: Positive = 64
    held_out: Positive = 8
    batch: Positive = 2
    learning_rate: Rate = 7e-3
    learning_rate_unit: Literal["rms", "absolute"] = "rms"
    warmup_steps: Count = 3
    min_lr_ratio: Annotated[float, Field(strict=False, gt=0, le=1)] = 0.05
    patience: Positive | None = None


class QuantizeConfig(Section):
    """`skip` and `only` are regular expressions, matched whole against module paths.

    `checkpoint` is an AQLM checkpoint of the model, made by anyone: its codes are then taken over, `scheme` is theirs,
    and which layers have codes was decided there. None: codes are searched for.
    """

    import_from: str | None = None
    method: Literal["aqlm", "rtn"] = "aqlm"
    scheme: str = "2x8g8"
    skip: Names = ("lm_head",)
    only: Names = ()
    statistics_sequences: Positive = 128
    batch: Positive = 8
    search: SearchConfig = SearchConfig()
    fit: FitConfig = FitConfig()

    @field_validator("scheme")
    @classmethod
    def _is_scheme(cls, text: str) -> str:
        try:
            parse_scheme(text)
        except UsageError as error:
            raise ValueError(str(error)) from error
        return text

    @model_validator(mode="after")
    def _method_knows_scheme(self) -> QuantizeConfig:
        if (self.method == "aqlm") != isinstance(parse_scheme(self.scheme), AdditiveScheme):
            wanted = "an additive scheme such as 2x8g8" if self.method == "aqlm" else "a uniform scheme such as int2g64"
            raise ValueError(f"method {self.method} takes {wanted}, not {self.scheme}")
        return self


class CodesConfig(Section):
    """Codes that learn, by the V steps of PV-Tuning (arXiv 2405.14852).

    At each step at most `share` of a matrix's groups get new codes (0: codes stay), after weights that run ahead of
    them at `learning_rate`, the furthest first until the matrix has changed by `trust_ratio` of its norm; None: no
    such bound. `beam` as in `quantize.search`. `state` is the type of the weights ahead, their gradients and moments:
    12 bytes a weight in float32, 6 in bfloat16.
    """

    share: Annotated[float, Field(strict=False, ge=0, le=1)] = 0.0
    learning_rate: Rate = 3e-3
    trust_ratio: Rate | None = 0.01
    beam: Beam = 8
    state: Literal["float32", "bfloat16"] = "float32"


class FinetuneConfig(Section):
    """Teaching the quantized model by the original: `steps` of `batch` windows of `sequence_length` tokens.

    `data`, `sequences` and `bos` are as in `calibrate`, with `self` for text sampled from the base model; None: its
    text, and `bos` as there. A `time_budget`, such as 2h, is turned into `steps` when a run begins. `micro_batch`
    sequences go through the model together: fewer need less memory; `gradient_checkpointing` recomputes each block in
    the backward pass, which needs less still. With `optimizer` adam, `learning_rate` is in units of the root mean
    square that each tensor has at first, with lamb in units of its present norm; it falls as half a cosine to
    `min_lr_ratio` of itself. `embeddings` trains them, and the head, too. `held_out` sequences are the validation
    set, evaluated every `evaluate_every` steps; training ends after `patience` evaluations without gain. The training
    state is written to the disk every `save_every` steps.
    """

    data: str | None = None
    sequences: Positive | None = None
    sequence_length: Annotated[int, Field(ge=2)] = 512
    bos: bool | None = None
    steps: Positive = 400
    time_budget: str | None = None
    batch: Positive = 4
    micro_batch: Positive = 4
    gradient_checkpointing: bool = False
    embeddings: bool = False
    optimizer: Literal["adam", "lamb"] = "adam"
    learning_rate: Rate = 2e-3
    warmup_steps: Count = 5
    min_lr_ratio: Annotated[float, Field(strict=False, gt=0, le=1)] = 0.05
    held_out: Positive = 16
    evaluate_every: Positive = 50
    patience: Positive | None = None
    save_every: Positive = 25
    codes: CodesConfig = CodesConfig()

    @field_validator("time_budget")
    @classmethod
    def _is_duration(cls, text: str | None) -> str | None:
        return text if text is None else _understood(parse_duration, text)


PackFormat: TypeAlias = Literal["transformers", "dense"]
"""Names of the exporters, which lie where torch may be imported: `export.EXPORTERS`."""


class PackConfig(Section):
    format: PackFormat = "transformers"


class EvalConfig(Section):
    """`bos` as in `calibrate`; false is what GPTQ does."""

    data: Names = ("wikitext2",)
    sequence_length: Annotated[int, Field(ge=2)] = 2048
    bos: bool | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


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


class RunConfig(Section):
    """A complete run file. `threads` None: as many as the machine has. `max_memory` and `max_disk`, such as 8GiB, bound
    what a quantization takes; None: nothing does."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    seed: Count = 0
    threads: Positive | None = None
    device: str = "cpu"
    max_memory: str | None = None
    max_disk: str | None = None
    calibrate: CalibrateConfig = CalibrateConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    pack: PackConfig = PackConfig()
    eval_ppl: EvalConfig = EvalConfig()
    bench: BenchConfig = BenchConfig()

    @field_validator("max_memory", "max_disk")
    @classmethod
    def _is_size(cls, text: str | None) -> str | None:
        return text if text is None else _understood(parse_bytes, text)

    @field_validator("device")
    @classmethod
    def _is_device(cls, name: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", name):  # torch takes cuda:128 for cuda:-128
            raise ValueError(f"there is no device {name!r}; choose cpu, cuda or cuda:NUMBER")
        return name
