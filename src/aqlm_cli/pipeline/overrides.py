"""The settings that a command works with, flags over files, and the run directory that they mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aqlm_cli.errors import ArtifactError, UsageError
from aqlm_cli.models import ModelSource, refuse_longer_than_stated, refuse_too_long
from aqlm_cli.runs.directory import is_run, read_run
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.quantize import QuantizeConfig
from aqlm_cli.spec.run_file import build_config
from aqlm_cli.spec.schemes import SCHEMES_BY_BITS, parse_scheme


def default_run_directory(config: RunConfig, source: ModelSource) -> Path:
    """runs/NAME-60MB for a target, runs/NAME-2bit where `--bits 2` means the scheme, runs/NAME-SCHEME elsewhere."""
    if config.quantize.target.question is not None:
        return Path("runs") / f"{source.short_name}-{config.quantize.target.label}"
    scheme = parse_scheme(config.quantize.scheme)
    bits = next((bits for bits, known in SCHEMES_BY_BITS.items() if known == scheme), None)
    label = str(scheme) if bits is None else f"{bits:g}bit"
    return Path("runs") / f"{source.short_name}-{label}"


def refuse_lengths(config: RunConfig, source: ModelSource) -> None:
    """ModelError for sequences that the last stages of a run file would find longer than the model reads."""
    if "finetune" in config.model_fields_set:
        refuse_too_long(source, config.finetune.sequence_length, "finetune.sequence_length")
    refuse_longer_than_stated(source, config.eval_ppl.sequence_length, "eval_ppl.sequence_length")
    refuse_longer_than_stated(source, config.bench.prompt + config.bench.tokens, "bench.prompt or bench.tokens")


def settings_of_run(directory: Path, flags: Mapping[str, Any]) -> RunConfig:
    """The flags over the run's own file."""
    return build_config(None, read_run(directory).file, flags)


def settings_for(target: str, flags: Mapping[str, Any]) -> RunConfig:
    """The flags over the file of `target`, where that is a run, or over the defaults, where it is a model."""
    if is_run(Path(target)):
        return settings_of_run(Path(target), flags)
    return build_config(None, None, {**flags, "model": target})


def settings_to_bench(target: str | None, shape: str | None, flags: Mapping[str, Any]) -> RunConfig:
    """The settings to measure the model or run at `target`, or a model of this shape with random weights."""
    if (target is None) == (shape is None):
        raise UsageError("give a model, a run or --shape, one of them")
    if shape is None and "quantize" in flags:
        raise UsageError("--scheme and --embeddings go with --shape; a run has schemes of its own")
    if shape is not None and not flags.keys().isdisjoint({"revision", "trust_remote_code"}):
        raise UsageError("--revision and --trust-remote-code belong to a model; --shape has neither, leave them out")
    return settings_for(target or str(shape), flags)


def settings_to_finetune(
    target: str,
    teacher: str | None,
    out: Path | None,
    flags: Mapping[str, Any],
    preset: str | None,
) -> tuple[RunConfig, Path]:
    """The settings and directory of the run at `target`; with `teacher` or `out`, of a new run that imports its codes.

    The flags beat the preset, which beats the run file; steps take the place of its time budget. Raises
    ArtifactError where nothing says what the base model is.
    """
    if teacher is None and not is_run(Path(target)):
        raise ArtifactError(
            f"{target} is not a run directory; if it is an AQLM checkpoint, name its base model with --teacher"
        )
    asked = flags.get("finetune", {})
    if "steps" in asked and "time_budget" in asked:
        raise UsageError("--steps and --time-budget exclude each other; give one of them")
    if teacher is None and out is None:
        config, directory = build_config(None, read_run(Path(target)).file, flags, preset), Path(target)
    else:
        config, directory = _settings_to_import(target, teacher, out, flags, preset)
    if "steps" not in asked:
        return config, directory
    tuned = config.finetune.model_copy(update={"time_budget": None})
    return config.model_copy(update={"finetune": tuned}), directory


def _settings_to_import(
    target: str, teacher: str | None, out: Path | None, flags: Mapping[str, Any], preset: str | None
) -> tuple[RunConfig, Path]:
    """The flags over the file of the new run, if it exists, or else of the run at `target`, if it is one."""
    place = Path(target).resolve()
    directory = out or Path("runs") / f"{place.name}-finetuned"
    if directory.resolve() == place:
        raise UsageError(f"--out {out} is {target} itself; choose another directory")
    runs = [read_run(path) for path in (directory, Path(target)) if is_run(path)]
    model = teacher or read_run(Path(target)).config.model
    config = build_config(None, runs[0].file if runs else None, {**flags, "model": model}, preset)
    section = QuantizeConfig(import_from=target)  # how a run at `target` got its codes does not matter any more
    # These two belong to one model, and there is no flag for them.
    known = next((run.config for run in reversed(runs) if run.config.model == model), None)
    revision, trust = (None, False) if known is None else (known.revision, known.trust_remote_code)
    return config.model_copy(update={"revision": revision, "trust_remote_code": trust, "quantize": section}), directory
