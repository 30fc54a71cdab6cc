"""The settings that a command works with, flags over files, and the run directory that they mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aqlm_cli.config import RunConfig
from aqlm_cli.model import resolve
from aqlm_cli.run_file import build_config
from aqlm_cli.runs import is_run, read_run
from aqlm_cli.scheme import SCHEMES_BY_BITS, parse_scheme


def default_run_directory(config: RunConfig) -> Path:
    """runs/NAME-2bit where `--bits 2` means the scheme, runs/NAME-SCHEME elsewhere."""
    scheme = parse_scheme(config.quantize.scheme)
    bits = next((bits for bits, known in SCHEMES_BY_BITS.items() if known == scheme), None)
    label = str(scheme) if bits is None else f"{bits:g}bit"
    source = resolve(config.model, config.revision, config.trust_remote_code)
    return Path("runs") / f"{source.short_name}-{label}"


def settings_of_run(directory: Path, flags: Mapping[str, Any]) -> RunConfig:
    """The flags over the run's own file."""
    return build_config(None, read_run(directory).file, flags)


def settings_for(target: str, flags: Mapping[str, Any]) -> RunConfig:
    """The flags over the file of `target`, where that is a run, or over the defaults, where it is a model."""
    if is_run(Path(target)):
        return settings_of_run(Path(target), flags)
    return build_config(None, None, {**flags, "model": target})


def settings_to_finetune(run_directory: Path, flags: Mapping[str, Any], section: Mapping[str, Any]) -> RunConfig:
    """The flags over the run's own file; steps take the place of its time budget."""
    config = settings_of_run(run_directory, {**flags, "finetune": section})
    if section["steps"] is None:
        return config
    return config.model_copy(update={"finetune": config.finetune.model_copy(update={"time_budget": None})})
