"""The run file as frozen records, and how one complete run file comes out of several partial ones.

A run is described by YAML with one section a stage. Every default is written here. What differs from it comes in
layers, the later ones winning key by key: a preset shipped with the program, the user's run file, flags. The sum of
all is checked once; an error names the layer that holds the wrong value.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from aqlm_cli.errors import ConfigError, UsageError, shortened
from aqlm_cli.scheme import AdditiveScheme, parse_scheme
from aqlm_cli.units import parse_bytes, parse_duration

PRESETS = ("default", "fast", "paper")

DEFAULT_SEQUENCES = 192
"""Calibration windows where neither `calibrate.sequences` nor any source of `calibrate.data` has a count."""

LARGEST_RUN_FILE = 100_000
"""Bytes, fifty times what a complete one has: YAML is read in Python, at a second for so many."""

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
    `statistics_sequences` of them measure the second moments of every layer's inputs.
    """

    data: str = "c4"
    sequences: Positive | None = None
    sequence_length: Annotated[int, Field(ge=2)] = 1024
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
    rate falls as half a cosine to `final_rate` of itself. `patience`: epochs without gain on the held-out windows
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
    final_rate: Annotated[float, Field(strict=False, gt=0, le=1)] = 0.05
    patience: Positive | None = None


class QuantizeConfig(Section):
    """`skip` and `only` are regular expressions, matched whole against module paths."""

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


class FinetuneConfig(Section):
    """Teaching the quantized model by the original: `steps` of `batch` windows of `sequence_length` tokens.

    `data` and `sequences` are as in `calibrate`; None: its text. A `time_budget`, such as 2h, is turned into `steps`
    when a run is begun. `windows_at_once` go through the model together: fewer need less memory. `learning_rate` is
    in units of each tensor's root mean square; it falls as half a cosine to `final_rate` of itself. `held_out` windows
    judge, every `evaluate_every` steps; `patience` such judgements without gain end it. What was trained is kept on
    the disk every `keep_every` steps.
    """

    data: str | None = None
    sequences: Positive | None = None
    sequence_length: Annotated[int, Field(ge=2)] = 512
    steps: Positive = 400
    time_budget: str | None = None
    batch: Positive = 4
    windows_at_once: Positive = 4
    learning_rate: Rate = 2e-3
    warmup_steps: Count = 5
    final_rate: Annotated[float, Field(strict=False, gt=0, le=1)] = 0.05
    held_out: Positive = 16
    evaluate_every: Positive = 50
    patience: Positive | None = None
    keep_every: Positive = 25

    @field_validator("time_budget")
    @classmethod
    def _is_duration(cls, text: str | None) -> str | None:
        return text if text is None else _understood(parse_duration, text)


class PackConfig(Section):
    format: Literal["transformers", "dense"] = "transformers"


class EvalConfig(Section):
    data: Names = ("wikitext2",)
    sequence_length: Annotated[int, Field(ge=2)] = 2048
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


# Where a run is computed, not what comes out: these may change within one run directory.
_NOT_COMPARED = ("threads", "device", "max_memory", "max_disk")

# What pydantic says in Python's words, in those of YAML.
_IN_YAML = {
    "tuple_type": "needs a list such as [first, second]",
    "model_type": "needs a section of keys and values, or {}",
}


def preset_path(name: str) -> Path:
    """The file of a preset: inside the installed package, or in `configs/` of a checkout."""
    if name not in PRESETS:
        raise UsageError(f"no preset is called {name!r}; choose {', '.join(PRESETS)}")
    package = Path(__file__).resolve().parent
    installed = package / "configs" / f"{name}.yaml"
    return installed if installed.exists() else package.parents[1] / "configs" / f"{name}.yaml"


class _LoaderWithoutAliases(yaml.SafeLoader):
    """A few aliases of aliases stand for more values than any memory holds, or for a value inside itself."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not read; write the value out", mark)
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> Any:
    """Plain values only, no tag that names a Python object; yaml.YAMLError for all that cannot be read."""
    try:
        value = yaml.load(text, _LoaderWithoutAliases)
        repr(value)  # an integer in base 16 may have more digits than Python writes, and no message could name it
        return value
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML lets through what Python says to an impossible date, or to nesting too deep
        raise yaml.YAMLError(f"a value cannot be read ({error})") from error


def load_run_file(path: Path) -> dict[str, Any]:
    """What one file says, checked for unknown keys only: its values are checked when all layers are known."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_RUN_FILE + 1)
        if len(content) > LARGEST_RUN_FILE:
            raise ConfigError(f"{path} has more than {LARGEST_RUN_FILE} bytes, so it is no run file")
        settings = parse_yaml(content.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the run file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML: {reason}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold keys and values, such as `model: smollm2-135m`")
    valid = tuple(_valid_keys(RunConfig))
    for key in (shortened(key) for key, _ in _leaves(settings)):
        if key not in valid:
            raise ConfigError(f"{path}: unknown key `{key}`; nearest valid key is `{_nearest(key, valid)}`")
    return settings


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One layer that says what all of them say; where two disagree on a key, what the later one says."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            earlier = merged.get(key)
            if isinstance(value, Mapping):
                value = merge(earlier if isinstance(earlier, Mapping) else {}, value)
            merged[key] = value
    return merged


def build_config(preset: str | None, file: Path | None, flags: Mapping[str, Any]) -> RunConfig:
    """Flags over the run file over the preset over the defaults. A flag that is None was not given."""
    layers: dict[str, dict[str, Any]] = {}
    for path in (preset_path(preset) if preset else None, file):
        if path is not None:
            layers[str(path)] = load_run_file(path)
    layers["flags"] = _given(flags)
    try:
        return RunConfig.model_validate(merge(*layers.values()))
    except ValidationError as error:
        raise _one_line(error, layers) from error


def dump_yaml(config: RunConfig) -> str:
    """The complete run file; `load_run_file` reads it back to the same record."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(there: RunConfig, here: RunConfig, section: str) -> list[str]:
    """Each setting of one section in which two runs differ: "quantize.scheme: 2x8g8 there, 3x8g8 here".

    Section "" stands for the settings outside all sections. `threads` and `device` never count.
    """
    earlier, later = dict(_leaves(there.model_dump())), dict(_leaves(here.model_dump()))
    return [
        f"{key}: {earlier[key]} there, {later[key]} here"
        for key in later
        if key.rpartition(".")[0].partition(".")[0] == section and key not in _NOT_COMPARED
        if earlier[key] != later[key]
    ]


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values: {"quantize": {"fit": {"batch": 4}}} gives ("quantize.fit.batch", 4)."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _valid_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all settings and of the sections themselves."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _valid_keys(field.annotation, f"{prefix}{name}.")


def _nearest(key: str, valid: tuple[str, ...]) -> str:
    """By the last name first, so that a setting in the wrong section is sent to the right one."""

    def likeness(known: str) -> tuple[float, float]:
        name = difflib.SequenceMatcher(None, key.rpartition(".")[2], known.rpartition(".")[2]).ratio()
        return name, difflib.SequenceMatcher(None, key, known).ratio()

    return max(valid, key=likeness)


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _given(value) if isinstance(value, Mapping) else value for key, value in flags.items() if value is not None
    }


def _one_line(error: ValidationError, layers: dict[str, dict[str, Any]]) -> ConfigError | UsageError:
    """The first of pydantic's complaints, with the layer that is to blame: the last one that says anything there."""
    first = error.errors()[0]
    if first["loc"] == ("model",) and first["type"] == "missing":
        return UsageError("no model is named; give MODEL on the command line or `model:` in the run file")
    names = [str(name) for name in first["loc"]]
    blamed = next((origin for origin in reversed(layers) if _says(layers[origin], names)), "settings")
    reason = _IN_YAML.get(first["type"], first["msg"].removeprefix("Value error, "))
    value = "" if first["type"] == "value_error" else f", found {shortened(repr(first['input']))}"
    line = f"{blamed}: `{'.'.join(names)}`: {reason}{value}"
    return UsageError(line) if blamed == "flags" else ConfigError(line)


def _says(layer: Any, names: list[str]) -> bool:
    for name in names:
        if isinstance(layer, list | tuple):  # the rest of the path counts within a list
            return True
        if not isinstance(layer, Mapping) or name not in layer:
            return False
        layer = layer[name]
    return True
