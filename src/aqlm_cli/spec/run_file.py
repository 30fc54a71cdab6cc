"""One complete run file out of several partial ones, and back into YAML.

What differs from the defaults of the sections comes in layers, the later ones winning key by key: a preset shipped with
the program, the user's run file, flags. The sum of all is checked once; an error names the layer with the wrong value.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from aqlm_cli.errors import ConfigError, UsageError, shortened
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.methods import METHODS
from aqlm_cli.spec.methods.aqlm import AqlmSettings
from aqlm_cli.spec.quantize import methods_used
from aqlm_cli.spec.section import Section

PRESETS = ("default", "fast", "paper")

FINETUNE_PRESETS = ("pv-tuning", "pv-tuning-bounded")
"""Recipes of PV-Tuning's authors."""

LARGEST_RUN_FILE = 100_000
"""Bytes, fifty times what a complete one has: YAML is read in Python, at a second for so many."""


# Where a run is computed, not what comes out: these may change within one run directory.
_NOT_COMPARED = ("threads", "device", "max_memory", "max_disk")


# What pydantic says in Python's words, in those of YAML.
_IN_YAML = {
    "tuple_type": "needs a list such as [first, second]",
    "model_type": "needs a section of keys and values, or {}",
    # What load_run_file lets through: a key with a dot in its name, or settings of a method that does not exist.
    "extra_forbidden": "is no setting and no method; remove it, or write a key of a section indented below it",
}


RENAMED: Mapping[str, str] = {
    "quantize.checkpoint": "quantize.import_from",
    "quantize.search": "quantize.aqlm",
    "quantize.search.recipe": "quantize.aqlm.algorithm",
    **{f"quantize.search.{name}": f"quantize.aqlm.{name}" for name in AqlmSettings.model_fields if name != "algorithm"},
    "quantize.fit.final_rate": "quantize.fit.min_lr_ratio",
    "finetune.windows_at_once": "finetune.micro_batch",
    "finetune.checkpointing": "finetune.gradient_checkpointing",
    "finetune.final_rate": "finetune.min_lr_ratio",
    "finetune.keep_every": "finetune.save_every",
}
"""Keys of earlier versions, and what they are called now."""

RENAMED_VALUES: Mapping[tuple[str, Any], str] = {("quantize.aqlm.algorithm", "published"): "reference"}
"""Values of earlier versions, by the present key, and what they are called now."""


def preset_path(name: str) -> Path:
    """The file of a preset: inside the installed package, or in `configs/` of a checkout."""
    names = (*PRESETS, *FINETUNE_PRESETS)
    if name not in names:
        raise UsageError(f"no preset is called {name!r}; choose {', '.join(names)}")
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs" / f"{name}.yaml"
    return installed if installed.exists() else package.parents[1] / "configs" / f"{name}.yaml"


class _StrictLoader(yaml.SafeLoader):
    """Refuses aliases: a few of aliases stand for more values than any memory holds, or for a value inside itself.

    Refuses also a key that comes twice: YAML forbids it, and PyYAML forgets the first, which may be a whole section.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not read; write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        names = [key.value for key in scalars]
        if twice := next((key for number, key in enumerate(scalars) if key.value in names[:number]), None):
            reason = f"the key {shortened(twice.value)} comes twice; write it once"
            raise yaml.constructor.ConstructorError(None, None, reason, twice.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def parse_yaml(text: str) -> Any:
    """Plain values only, no tag that names a Python object; yaml.YAMLError for all that cannot be read."""
    try:
        value = yaml.load(text, _StrictLoader)
        repr(value)  # an integer in base 16 may have more digits than Python writes, and no message could name it
        return value
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML lets through what Python says to an impossible date, or to nesting too deep
        raise yaml.YAMLError(f"a value cannot be read ({error})") from error


def load_run_file(path: Path) -> dict[str, Any]:
    """Read one file, checked for unknown keys only: its values are checked when all layers are merged."""
    settings = read_mapping(path)
    check_keys(settings, path)
    return settings


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a file in YAML; ConfigError where it has none."""
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
    return settings


def check_keys(settings: dict[str, Any], path: object) -> None:
    """Raise ConfigError for a key that no run file has; `path` names the file, or the part of one."""
    valid = tuple(_valid_keys(RunConfig))
    without_settings = _sections_without_settings(settings) - set(valid)
    found = [(shortened(key), value) for key, value in _leaves(settings)]
    if renamed := list(filter(None, (_earlier_name(key) for key, _ in found))):  # all at once: an old file has a dozen
        lines = "; ".join(f"`{old}` is now called `{RENAMED[old]}`" for old in _to_rename(renamed))
        raise ConfigError(f"{path}: {lines}; rename {'it' if len(renamed) == 1 else 'them'} there")
    for key, value in found:
        sections = list(_with_sections(key))
        if isinstance(value, str) and (key, value) in RENAMED_VALUES:
            new = RENAMED_VALUES[key, value]
            raise ConfigError(f"{path}: the value {value} of `{key}` is now called `{new}`; rename it there")
        if key not in valid and without_settings.isdisjoint(sections):
            raise ConfigError(f"{path}: unknown key `{key}`; nearest valid key is `{_nearest(key, valid)}`")


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


def build_config(
    preset: str | None, file: Path | None, flags: Mapping[str, Any], recipe: str | None = None
) -> RunConfig:
    """Flags over the run file over the preset over the defaults. A flag that is None was not given.

    `recipe` is a preset of which `finetune` counts alone, between the flags and the run file.
    """
    layers: dict[str, dict[str, Any]] = {}
    for path in (preset_path(preset) if preset else None, file):
        if path is not None:
            layers[str(path)] = load_run_file(path)
    if recipe is not None:
        path = preset_path(recipe)
        section = load_run_file(path).get("finetune")
        if section is None:
            raise UsageError(f"preset {recipe} has no settings for finetuning; choose {' or '.join(FINETUNE_PRESETS)}")
        layers[f"preset {path}"] = {"finetune": section}
    layers["flags"] = _given(flags)
    return config_of(layers)


def config_of(layers: Mapping[str, dict[str, Any]]) -> RunConfig:
    """The settings of partial run files by their names, the later ones winning key by key."""
    layers = _without_methods_replaced(layers)
    try:
        return RunConfig.model_validate(merge(*layers.values()))
    except ValidationError as error:
        raise _one_line(error, layers) from error


def _without_methods_replaced(layers: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The layers without settings of a method for which a later layer chooses another, and that nothing else uses."""
    kept: dict[str, dict[str, Any]] = {}
    chosen: Any = None
    merged = merge(*layers.values()).get("quantize")
    for origin, layer in reversed(list(layers.items())):
        section = layer.get("quantize")
        if isinstance(section, Mapping):
            used = methods_used(merged, chosen) if isinstance(merged, Mapping) and isinstance(chosen, str) else set()
            replaced = METHODS.keys() - used if chosen is not None else set()
            layer = {**layer, "quantize": {key: value for key, value in section.items() if key not in replaced}}
            chosen = section.get("method") if chosen is None else chosen
        kept[origin] = layer
    return dict(reversed(list(kept.items())))


def dump_yaml(config: RunConfig) -> str:
    """The complete run file; `load_run_file` reads it back to the same record."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(there: RunConfig, here: RunConfig, section: str) -> list[str]:
    """Each setting of one section in which two runs differ: "quantize.scheme: 2x8g8 there, 3x8g8 here".

    Section "" stands for the settings outside all sections. `threads` and `device` never count, nor do the settings of
    two methods, which have none in common.
    """
    earlier, later = dict(_leaves(there.model_dump())), dict(_leaves(here.model_dump()))
    return [
        f"{key}: {earlier[key]} there, {later[key]} here"
        for key in later
        if key.rpartition(".")[0].partition(".")[0] == section and key not in _NOT_COMPARED
        if key in earlier and earlier[key] != later[key]
    ]


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values: {"quantize": {"fit": {"batch": 4}}} gives ("quantize.fit.batch", 4)."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _valid_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all settings and of the sections themselves."""
    sections = section.sections()
    for name in {**section.model_fields, **sections}:
        yield prefix + name
        if name in sections:
            yield from _valid_keys(sections[name], f"{prefix}{name}.")


def _with_sections(key: str) -> Iterator[str]:
    """The dotted key itself, then the sections around it from the inside out."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def _earlier_name(key: str) -> str | None:
    """The innermost part of the path that had another name; None where none had."""
    return next((name for name in _with_sections(key) if name in RENAMED), None)


def _to_rename(keys: list[str]) -> list[str]:
    """The fewest renamings after which none of the keys has its earlier name: a section for all that moved with it."""

    def by_section(key: str) -> str:
        section, _, name = key.rpartition(".")
        return section if RENAMED[key] == f"{RENAMED.get(section)}.{name}" else key

    return keys if len(keys) == 1 else list(dict.fromkeys(map(by_section, keys)))


def _sections_without_settings(settings: Mapping[str, Any]) -> set[str]:
    """Sections named after methods, known or not: the record says more of them than that they are unknown."""
    section = settings.get("quantize")
    chosen = section.get("method") if isinstance(section, Mapping) else None
    return {f"quantize.{name}" for name in (*METHODS, chosen) if isinstance(name, str)}


def _nearest(key: str, valid: tuple[str, ...]) -> str:
    """The most similar key, by its last name first, so that a setting in the wrong section is sent to the right one."""

    def likeness(candidate: str) -> tuple[float, float]:
        name = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return name, difflib.SequenceMatcher(None, key, candidate).ratio()

    return max(valid, key=likeness)


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that are not None."""
    return {
        key: _given(value) if isinstance(value, Mapping) else value for key, value in flags.items() if value is not None
    }


def _one_line(error: ValidationError, layers: dict[str, dict[str, Any]]) -> ConfigError | UsageError:
    """The first of pydantic's complaints, with the layer that is to blame: the last one that says anything there."""
    first = error.errors()[0]
    if first["loc"] == ("model",) and first["type"] == "missing":
        files = [origin for origin in layers if origin != "flags" and not origin.startswith("preset ")]
        where = f"in {files[-1]}" if files else "in the run file"
        return UsageError(f"no model is named; give MODEL on the command line or `model:` {where}")
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
