"""The run file as frozen records, one section a stage. Every default is written here; run_file.py reads and merges."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, ValidationError, create_model, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from aqlm_cli.errors import UsageError
from aqlm_cli.spec.formats import BlockFloat, Formats, parse_activations
from aqlm_cli.spec.methods import METHODS
from aqlm_cli.spec.probe import ProbeConfig
from aqlm_cli.spec.schemes import parse_scheme
from aqlm_cli.spec.section import LARGEST, Beam, Count, Names, Positive, Rate, Section, understood
from aqlm_cli.spec.selection import Rule, Selection
from aqlm_cli.spec.target import TargetConfig
from aqlm_cli.spec.treatment import Treatment, method_for, parse_treatment
from aqlm_cli.spec.units import parse_bytes, parse_duration

DEFAULT_SEQUENCES = 192
"""Calibration sequences where neither `calibrate.sequences` nor any source of `calibrate.data` has a count."""


class CalibrateConfig(Section):
    """The calibration set, cut into sequences of `sequence_length` tokens.

    `sequences` in all; None: the sum of the sources' own counts, or DEFAULT_SEQUENCES where none has one.
    `statistics_sequences` of them measure the diagonal of every layer's Hessian. `bos`: each sequence begins with
    the beginning-of-text token; None: where the tokenizer puts it before a text by itself.
    """

    data: str = "c4"
    sequences: Positive | None = None
    sequence_length: Annotated[int, Field(ge=2, le=LARGEST)] = 1024
    bos: bool | None = None
    statistics_sequences: Positive = 16


class FitConfig(Section):
    """Fitting codebooks, scales, norms and biases of a finished block to the output of the base model's block.

    `error` per_token: each token's squared error as a share of its own output's square; total: all tokens' together.
    `learning_rate_unit` rms: each tensor's rate is `learning_rate` times its root mean square. After the warm-up the
    rate falls as half a cosine to `min_lr_ratio` of itself. `patience`: epochs without gain on the validation set
    before it stops; None: never before `epochs`. `epochs` None: as many as the method is fitted for by default.
    """

    error: Literal["per_token", "total"] = "per_token"
    epochs: Count | None = None
    sequences: Positive = 64
    held_out: Positive = 8
    batch: Positive = 2
    learning_rate: Rate = 7e-3
    learning_rate_unit: Literal["rms", "absolute"] = "rms"
    warmup_steps: Count = 3
    min_lr_ratio: Annotated[float, Field(strict=False, gt=0, le=1)] = 0.05
    patience: Positive | None = None


class LayerRule(Section):
    """The treatment of the layers whose whole path `match` matches: a scheme, a method, both, or `keep` in 16 bits.

    A method alone takes the scheme of all other layers; a scheme alone is quantized by their method where that takes
    it, else by the first method that does.
    """

    match: str
    scheme: str | None = None
    method: str | None = None
    keep: bool = False

    @field_validator("scheme")
    @classmethod
    def _is_scheme(cls, text: str | None) -> str | None:
        return text if text is None else understood(parse_scheme, text)

    @model_validator(mode="after")
    def _says_one_thing(self) -> LayerRule:
        if self.keep == (self.scheme is not None or self.method is not None):
            raise ValueError(f"the rule for '{self.match}' needs a scheme, a method or keep: true")
        if self.method is not None and self.method not in METHODS:
            raise ValueError(f"there is no method {self.method!r}; choose {' or '.join(METHODS)}")
        return self

    def treatment(self, default: Treatment) -> Treatment | None:
        """The treatment, beside that of all other layers; None: 16 bits. UsageError where method and scheme differ."""
        if self.keep:
            return None
        scheme = default.scheme if self.scheme is None else parse_scheme(self.scheme)
        return Treatment(self.method or method_for(scheme, default.method), scheme)


def parse_rule(text: str) -> dict[str, Any]:
    """The rule of a flag, `REGEX=SCHEME`, `REGEX=METHOD:SCHEME` or `REGEX=keep`. UsageError for another form."""
    match, equals, choice = text.rpartition("=")
    if not equals or not match or not choice:
        raise UsageError(f"--layer {text!r} is not understood; write REGEX=SCHEME, REGEX=METHOD:SCHEME or REGEX=keep")
    if choice == "keep":
        return {"match": match, "keep": True}
    method, colon, scheme = choice.rpartition(":")
    return {"match": match, "scheme": scheme, **({"method": method} if colon else {})}


class QuantizeConfig(Section):
    """`skip` and `only` are regular expressions, matched whole against module paths.

    `embeddings` and `head` are the schemes of the matrices outside the blocks, each with its method before a colon if
    it is not the first that takes the scheme; None: 16 bits. In a model that ties the two, either is that of both.
    `layers` are rules for single layers, the first that matches counts, before all other settings. With a `target` of
    the whole model, an allocation takes the place of `scheme`, and of the 16 bits of embeddings and head.

    `import_from` is an AQLM checkpoint of the model, made by anyone: its codes are then imported, `scheme` is theirs,
    and which layers have codes was decided there. None: codes are searched for.

    The settings of a method stand in a section of its name (spec/methods), which exists for every method that has
    any. A section of a method that is not used is refused.
    """

    model_config = ConfigDict(extra="allow")  # for the method's section alone: _methods_section sees to that

    import_from: str | None = None
    method: str = "aqlm"
    scheme: str = "2x8g8"
    embeddings: str | None = None
    head: str | None = None
    layers: Annotated[tuple[LayerRule, ...], Field(strict=False)] = ()
    skip: Names = ("lm_head",)
    only: Names = ()
    target: TargetConfig = TargetConfig()
    statistics_sequences: Positive = 128
    batch: Positive = 8
    fit: FitConfig = FitConfig()

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        methods = {name: method.settings for name, method in METHODS.items() if method.settings is not None}
        return {**super().sections(), **methods}

    @property
    def settings(self) -> Section | None:
        """Settings of `method`; None where it has none."""
        return self.settings_of(self.method)

    def settings_of(self, method: str) -> Section | None:
        """Settings of a method that is used; None where it has none."""
        return (self.model_extra or {}).get(method)

    @property
    def default(self) -> Treatment:
        """The treatment of all layers in the blocks that no rule names."""
        return Treatment(self.method, parse_scheme(self.scheme))

    @property
    def selection(self) -> Selection:
        """All that decides which layers are quantized, and how."""
        default = self.default
        tables = [text and parse_treatment(text, self.method) for text in (self.embeddings, self.head)]
        return Selection(
            default,
            skip=self.skip,
            only=self.only,
            rules=tuple(Rule(rule.match, rule.treatment(default)) for rule in self.layers),
            embeddings=tables[0] or None,
            head=tables[1] or None,
        )

    @property
    def fitting(self) -> FitConfig:
        """`fit` with as many epochs as there will be."""
        if self.fit.epochs is not None:
            return self.fit
        return self.fit.model_copy(update={"epochs": METHODS[self.method].epochs})

    @model_validator(mode="before")
    @classmethod
    def _methods_section(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        main = given.get("method", cls.model_fields["method"].default)
        if not isinstance(main, str) or main not in METHODS:
            return given  # and the method is what is refused
        used = methods_used(given, main)
        others = given.keys() - cls.model_fields.keys() - used
        if foreign := sorted(others & METHODS.keys()):
            reason = f"settings of method {foreign[0]}, but quantize.method is {main}; remove them"
            raise _refusal(foreign[0], "value_error", given, reason)
        if others:
            raise _refusal(min(others), "extra_forbidden", given)
        checked = dict(given)
        for method in sorted(used):
            section = METHODS[method].settings
            if section is not None:
                named: Any = {method: (section, section())}
                own = create_model(method, **named)  # so that an error names the section
                found = own.model_validate({method: given[method]} if method in given else {})
                checked[method] = getattr(found, method)
            elif method in given:
                raise _refusal(method, "value_error", given, f"method {method} has no settings; remove the section")
        return checked

    @field_validator("method")
    @classmethod
    def _is_method(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"there is no method {name!r}; choose {' or '.join(METHODS)}")
        return name

    @field_validator("scheme")
    @classmethod
    def _is_scheme(cls, text: str) -> str:
        return understood(parse_scheme, text)

    @field_validator("embeddings", "head")
    @classmethod
    def _is_treatment(cls, text: str | None) -> str | None:
        return text if text is None else understood(parse_treatment, text)

    @model_validator(mode="after")
    def _methods_take_schemes(self) -> QuantizeConfig:
        try:
            _ = self.selection
        except UsageError as error:
            raise ValueError(str(error)) from error
        return self


def methods_used(given: Mapping[str, Any], main: str) -> set[str]:
    """The methods that these settings use. What is malformed is left to the validators of its own."""
    used = {main}
    for key in ("embeddings", "head"):
        with suppress(UsageError, AttributeError):
            used.add(parse_treatment(given[key], main).method) if given.get(key) else None
    with suppress(UsageError, ValueError, TypeError):
        target = given.get("target") or {}
        target = target if isinstance(target, TargetConfig) else TargetConfig.model_validate(target)
        if target.question is not None:
            used |= {one.method for one in (*target.treatments(main), *target.of_tables(main))}
    for rule in given.get("layers") or ():
        with suppress(UsageError, ValueError, AttributeError, TypeError):
            made = rule if isinstance(rule, LayerRule) else LayerRule.model_validate(rule)
            if made.method is not None:
                used.add(made.method)
            elif made.scheme is not None:
                used.add(method_for(parse_scheme(made.scheme), main))
    return used


def _refusal(key: str, kind: str, given: Mapping[str, Any], reason: str | None = None) -> ValidationError:
    """pydantic's complaint about one key."""
    error = kind if reason is None else PydanticCustomError("value_error", "{reason}", {"reason": reason})
    return ValidationError.from_exception_data(
        "quantize", [InitErrorDetails(type=error, loc=(key,), input=given.get(key))]
    )


class CodesConfig(Section):
    """Codes that learn, by the V steps of PV-Tuning (arXiv 2405.14852).

    At each step at most `share` of a matrix's groups get new codes (0: codes stay), after weights that run ahead of
    them at `learning_rate`, the furthest first until the matrix has changed by `trust_ratio` of its norm; None: no
    such bound. `beam` as in `quantize.aqlm`. `state` is the type of the weights ahead, their gradients and moments:
    12 bytes a weight in float32, 6 in bfloat16.
    """

    share: Annotated[float, Field(strict=False, ge=0, le=1)] = 0.0
    learning_rate: Rate = 3e-3
    trust_ratio: Rate | None = 0.01
    beam: Beam = 8
    state: Literal["float32", "bfloat16"] = "float32"


class FinetuneConfig(Section):
    """Distillation of the base model: `steps` of `batch` sequences of `sequence_length` tokens.

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
    sequence_length: Annotated[int, Field(ge=2, le=LARGEST)] = 512
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
        return text if text is None else understood(parse_duration, text)


PackFormat: TypeAlias = Literal["auto", "transformers", "native", "dense"]
"""Names of the exporters, which lie where torch may be imported: `export.EXPORTERS`."""


class PackConfig(Section):
    """`format` auto: transformers where that holds every matrix at the bits of its scheme, else native."""

    format: PackFormat = "auto"


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
    most_repetition: Annotated[float, Field(strict=False, ge=0)] = 0.3
    most_surprise: Annotated[float, Field(strict=False, ge=0)] = 1.5


class AttributionConfig(Section):
    """Layers or blocks, swapped into the base model or out of the quantized one, on the first `sequences` of the text
    of `eval_ppl`. `budget_minutes`: about so long, with fewer and shorter sequences; None: no limit."""

    way: Literal["in", "out"] = "in"
    unit: Literal["layer", "block"] = "layer"
    sequences: Positive = 4
    sequence_length: Annotated[int, Field(ge=2, le=LARGEST)] = 512
    budget_minutes: Annotated[float, Field(strict=False, gt=0)] | None = None


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
    evaluate: EvaluateConfig = EvaluateConfig()
    probe: ProbeConfig = ProbeConfig()
    bench: BenchConfig = BenchConfig()

    @field_validator("max_memory", "max_disk")
    @classmethod
    def _is_size(cls, text: str | None) -> str | None:
        return text if text is None else understood(parse_bytes, text)

    @field_validator("device")
    @classmethod
    def _is_device(cls, name: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", name):  # torch takes cuda:128 for cuda:-128
            raise ValueError(f"there is no device {name!r}; choose cpu, cuda or cuda:NUMBER")
        return name
