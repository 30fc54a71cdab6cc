"""The settings of a quantization: what is quantized, by which schemes and methods, and how blocks are fitted."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, create_model, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from aqlm_cli.errors import UsageError
from aqlm_cli.spec.methods import METHODS, known_methods
from aqlm_cli.spec.schemes import parse_scheme
from aqlm_cli.spec.section import Count, Names, Positive, Rate, Section, understood
from aqlm_cli.spec.selection import Rule, Selection
from aqlm_cli.spec.target import TargetConfig
from aqlm_cli.spec.treatment import Treatment, method_for, parse_treatment


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
            raise ValueError(f"there is no method {self.method!r}; choose {known_methods()}")
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

    `token_weights` attention: in the Hessians of keys and values a token counts by the attention that it receives
    (models/received_attention.py); none: all tokens count alike, as GPTQ and AQLM have it.

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
    token_weights: Literal["attention", "none"] = "attention"
    batch: Positive = 8
    fit: FitConfig = FitConfig()

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        methods = {name: method.settings for name, method in METHODS.items() if method.settings is not None}
        return {**super().sections(), **methods}

    @property
    def reads_text(self) -> bool:
        """Check that layers in the blocks are quantized by what text says about them, or fitted to it."""
        if self.import_from is not None:
            return False
        if self.target.question is not None or self.fitting.epochs:
            return True
        rules = [rule.treatment(self.default) for rule in self.layers]
        return any(METHODS[one.method].reads_text for one in (self.default, *rules) if one is not None)

    @property
    def settings(self) -> Section | None:
        """Settings of `method`; None where it has none."""
        return self.settings_of(self.method)

    def settings_of(self, method: str) -> Section | None:
        """Settings of a method that is used; None where it has none."""
        return (self.model_extra or {}).get(method)

    @property
    def weighs_tokens(self) -> bool:
        return self.token_weights == "attention"

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
            raise ValueError(f"there is no method {name!r}; choose {known_methods()}")
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
