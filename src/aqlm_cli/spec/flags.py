"""Flags of the commands, and keywords of the Python functions of the same names, as settings of the run file.

A flag that is None was not given: the run file, the preset or the default counts then. What is no setting, such as
`--out` or `--json`, is not in these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from aqlm_cli.errors import UsageError
from aqlm_cli.spec.quantize import parse_rule
from aqlm_cli.spec.schemes import scheme_for_bits
from aqlm_cli.spec.target import parse_target


def _section(name: str, *keys: str) -> dict[str, str]:
    return {key: f"{name}.{key}" for key in keys}


MODEL = {key: key for key in ("model", "revision", "trust_remote_code", "seed", "device", "threads")}
"""Flags of every command that reads a model; they belong to no section."""

QUANTIZE: Mapping[str, str] = MappingProxyType(
    {
        **MODEL,
        **{key: key for key in ("max_memory", "max_disk")},
        **_section("calibrate", "data", "sequences", "sequence_length", "bos"),
        **_section("quantize", "method", "scheme", "embeddings", "head", "skip", "only"),
        "layer": "quantize.layers",
        "target_size": "quantize.target.size",
        "target_bits": "quantize.target.bits",
        "target": "quantize.target.kl",
        "target_speed": "quantize.target.speed",
        "among": "quantize.target.among",
        **_section("pack", "format"),
    }
)
"""Flags of calibrate, quantize, plan and pack, and the key of each in the run file."""

TARGETS = ("target_size", "target_bits", "target", "target_speed")
"""Flags that choose the scheme of every layer; they exclude each other."""

FINETUNE: Mapping[str, str] = MappingProxyType(
    {
        **MODEL,
        **_section("finetune", "data", "sequences", "sequence_length", "bos", "steps", "time_budget", "batch"),
        **_section("finetune", "learning_rate", "embeddings"),
        "codes": "finetune.codes.share",
    }
)

EVAL_PPL: Mapping[str, str] = MappingProxyType(
    {
        **MODEL,
        **_section("eval_ppl", "data", "sequence_length", "bos", "dtype", "protocol", "divergence"),
        **_section("eval_ppl", "activations", "cache", "sort_keys"),
    }
)

EVALUATE: Mapping[str, str] = MappingProxyType(
    {
        **EVAL_PPL,
        **_section("evaluate", "kinds", "tasks"),
        **_section("evaluate.attribution", "way", "unit", "budget_minutes"),
    }
)

PROBE: Mapping[str, str] = MappingProxyType(
    {
        **MODEL,
        **_section("probe", "noise", "correlate", "strength", "clip"),
        **_section("probe", "data", "sequences", "sequence_length", "bos", "dtype"),
    }
)

BENCH: Mapping[str, str] = MappingProxyType(
    {
        **MODEL,
        **_section("quantize", "scheme", "embeddings"),
        **_section("bench", "tokens", "prompt", "repeats", "batch", "backend", "head", "llama_bench"),
        "llama_model": "bench.llama_models",
    }
)

GENERATE: Mapping[str, str] = MappingProxyType({**MODEL, **_section("bench", "backend", "head")})


def as_settings(flags: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    """The flags of the table as the nested settings that `build_config` takes; all others are left out.

    `bits` stands for the scheme of so many code bits, and every `layer` for a rule. UsageError where both bits and a
    scheme are given, or one of them with a target, and for a rule or target of another form.
    """
    flags = {**flags, "scheme": _scheme(flags.get("bits"), flags.get("scheme"))}
    targets = [name for name in TARGETS if table is QUANTIZE and flags.get(name) is not None]
    if targets and flags["scheme"] is not None:
        flag = targets[0].replace("_", "-")
        raise UsageError(f"--{flag} chooses the scheme of every layer; leave --bits and --scheme out, or use --among")
    if table is QUANTIZE and flags.get("target") is not None:
        flags["target"] = parse_target(flags["target"])
    if table is QUANTIZE and flags.get("among") is not None:
        flags["among"] = [word.strip() for word in flags["among"].split(",")]
    if flags.get("layer") is not None:
        flags["layer"] = [parse_rule(rule) for rule in flags["layer"]]
    settings: dict[str, Any] = {}
    for flag, key in table.items():
        if flags.get(flag) is not None:
            *sections, name = key.split(".")
            section = settings
            for part in sections:
                section = section.setdefault(part, {})
            section[name] = flags[flag]
    return settings


def _scheme(bits: float | None, scheme: str | None) -> str | None:
    if bits is not None and scheme is not None:
        raise UsageError("--bits and --scheme say the same thing; give one of them")
    return scheme if bits is None else str(scheme_for_bits(bits))
