"""Every kind of evaluation of a model, or of what a run has packed, with the settings of a run file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from aqlm_cli.errors import UsageError
from aqlm_cli.evaluation import (
    AttributionSettings,
    BenchReport,
    GateSettings,
    GenerationSettings,
    PerplexitySettings,
    ProbeReport,
    ProbeSettings,
    SpeedSettings,
    TasksSettings,
)
from aqlm_cli.evaluation.speed import measure_shape
from aqlm_cli.evaluation.tasks import open_task
from aqlm_cli.events import Emit
from aqlm_cli.models import ResolvedModel, Subject, find_subject
from aqlm_cli.pipeline import order
from aqlm_cli.pipeline.job import Job
from aqlm_cli.pipeline.overrides import refuse_lengths
from aqlm_cli.pipeline.stages.evaluate import evaluate
from aqlm_cli.records import Record
from aqlm_cli.runs.log import logged
from aqlm_cli.runs.stages import FINETUNE
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.schemes import parse_scheme


def evaluate_model(
    target: str, config: RunConfig, sequences: int | None, emit: Emit, base_model: ResolvedModel | None = None
) -> dict[str, Record]:
    """Every kind of evaluation that the settings name.

    Raises UsageError for a kind that there is none of.
    """
    settings = settings_of(config, sequences)  # refused before anything is measured
    subject = _subject(target, config, emit, base_model)
    reports: dict[str, Record] = {}
    with _logged_of(subject, "evaluate", emit) as both:
        for kind, named in settings.items():
            for name, one in named.items():
                key = f"{kind}: {name}" if name in reports else name
                reports[key] = evaluate(subject, kind, one, config.device, both)
    return reports


def settings_of(config: RunConfig, sequences: int | None) -> dict[str, Mapping[str, Any]]:
    """The settings of every kind of evaluation that is asked for, each by the name of its report.

    Raises UsageError for a kind that there is none of, and for settings that an evaluation does not take.
    """
    kinds = config.evaluate.kinds
    for unknown in set(kinds) - SETTINGS.keys():
        raise UsageError(f"there is no evaluation {unknown!r}; choose {', '.join(SETTINGS)}")
    return {kind: SETTINGS[kind](config, sequences) for kind in kinds}


def _perplexities(config: RunConfig, sequences: int | None) -> dict[str, PerplexitySettings]:
    section = config.eval_ppl
    return {
        text: PerplexitySettings(
            text,
            section.sequence_length,
            section.sequences if sequences is None else sequences,
            section.bos,
            section.dtype,
            section.protocol,
            section.divergence,
            section.formats,
        )
        for text in section.data
    }


def _gate(config: RunConfig, sequences: int | None) -> dict[str, GateSettings]:
    return {"gate": GateSettings(config.evaluate.gate)}


def _attribution(config: RunConfig, sequences: int | None) -> dict[str, AttributionSettings]:
    section = config.evaluate.attribution
    count = section.sequences if sequences is None else sequences
    return {
        "attribution": AttributionSettings(
            config.eval_ppl.data[0], section.way, section.unit, count, section.sequence_length, section.budget_minutes
        )
    }


def _probe(config: RunConfig, sequences: int | None) -> dict[str, ProbeSettings]:
    section = config.probe if sequences is None else config.probe.model_copy(update={"sequences": sequences})
    return {"probe": ProbeSettings(section, config.seed)}


def _tasks(config: RunConfig, questions: int | None) -> dict[str, TasksSettings]:
    """The settings of each task. Raises UsageError where none is named, and for files and names as `open_task` does."""
    names = config.evaluate.tasks
    if not names:
        raise UsageError("the kind tasks asks questions; name them with --tasks FILE_OR_NAME, or as evaluate.tasks")
    found = {name: TasksSettings(name, questions, config.eval_ppl.dtype) for name in names}
    for settings in found.values():
        open_task(settings)
    return found


SETTINGS: Mapping[str, Callable[[RunConfig, int | None], Mapping[str, Any]]] = {
    "ppl": _perplexities,
    "gate": _gate,
    "attribution": _attribution,
    "probe": _probe,
    "tasks": _tasks,
}
"""The settings of each evaluation that `evaluate` can do, by the name of its report, from those of a run file."""


def measure(
    target: str, config: RunConfig, sequences: int | None, emit: Emit, base_model: ResolvedModel | None = None
) -> dict[str, Record]:
    """Perplexity on every text of the settings."""
    subject = _subject(target, config, emit, base_model)
    with _logged_of(subject, "eval-ppl", emit) as both:
        found = _perplexities(config, sequences)
        return {name: evaluate(subject, "ppl", one, config.device, both) for name, one in found.items()}


def probe_model(target: str, config: RunConfig, emit: Emit) -> ProbeReport:
    """Perplexity and divergence of the target under perturbations of its weights."""
    subject = _subject(target, config, emit, None)
    with _logged_of(subject, "probe", emit) as both:
        report = evaluate(subject, "probe", _probe(config, None)["probe"], config.device, both)
    assert isinstance(report, ProbeReport)
    return report


def compare_speed(target: str, config: RunConfig, emit: Emit, base_model: ResolvedModel | None = None) -> BenchReport:
    """Speed of the target, beside its base model where it is a run."""
    subject = _subject(target, config, emit, base_model)
    with _logged_of(subject, "bench", emit) as both:
        report = evaluate(subject, "speed", SpeedSettings(config.bench, config.seed), "cpu", both)
    assert isinstance(report, BenchReport)
    return report


def compare_speed_of_shape(shape: str, config: RunConfig, emit: Emit) -> BenchReport:
    """Speed of a model of this shape with random weights and codes."""
    scheme, table = parse_scheme(config.quantize.scheme), config.quantize.selection.embeddings
    settings = SpeedSettings(config.bench, config.seed)
    return measure_shape(shape, scheme, settings, emit, None if table is None else table.scheme)


def continue_text(target: str, config: RunConfig, prompt: str, tokens: int, temperature: float, emit: Emit) -> Record:
    """Text that the target generates after the prompt."""
    subject, section = _subject(target, config, emit, None), config.bench
    settings = GenerationSettings(prompt, tokens, temperature, config.seed, section.backend, section.head)
    return evaluate(subject, "generation", settings, config.device, emit)


def run_all(job: Job) -> dict[str, Record]:
    """Every stage in order; `finetune` where the settings have a section of that name."""
    config, target = job.config, str(job.directory)
    refuse_lengths(config, job.source)
    reports = order.quantize_and_pack(job)
    if FINETUNE.name in config.model_fields_set:
        reports |= order.finetune_run(target, job)
    reports |= measure(target, config, None, job.emit, job.model)
    return {**reports, "bench": compare_speed(target, config, job.emit, job.model)}


def _subject(target: str, config: RunConfig, emit: Emit, base_model: ResolvedModel | None) -> Subject:
    """The model at `target`; where it is a run without a checkpoint, the missing stages run first."""
    base_model = order.pack_first(target, emit, base_model)
    return find_subject(target, config.revision, config.trust_remote_code, base_model)


def _logged_of(subject: Subject, stage: str, emit: Emit) -> AbstractContextManager[Emit]:
    """An `emit` that also writes the log of the run, where the subject is one."""
    return nullcontext(emit) if subject.run is None else logged(subject.run.path, stage, emit)
