"""A model in, numbers with their error out: one file a kind.

    model = LoadedModel("mine", network, tokenizer)
    report = EVALUATIONS["ppl"].run(model, None, PerplexitySettings("notes.txt", sequence_length=512), print)

A new kind is one file with an Evaluation and its record, and one row in EVALUATIONS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aqlm_cli.evaluation.attribution import AttributionEvaluation, AttributionSettings
from aqlm_cli.evaluation.estimates import Perplexity
from aqlm_cli.evaluation.evaluation import Evaluation
from aqlm_cli.evaluation.gate import GateEvaluation, GateReport, GateSettings
from aqlm_cli.evaluation.generation import GenerationEvaluation, GenerationReport, GenerationSettings
from aqlm_cli.evaluation.model import EvaluatedModel, LoadedModel, StoredModel
from aqlm_cli.evaluation.perplexity import PerplexityEvaluation, PerplexityReport, PerplexitySettings
from aqlm_cli.evaluation.probe import ProbeEvaluation, ProbeReport, ProbeSettings
from aqlm_cli.evaluation.speed import SpeedEvaluation, SpeedSettings
from aqlm_cli.evaluation.speed_report import BenchReport
from aqlm_cli.evaluation.tasks import TasksEvaluation, TasksReport, TasksSettings

__all__ = [
    "EVALUATIONS",
    "AttributionSettings",
    "BenchReport",
    "EvaluatedModel",
    "Evaluation",
    "GateReport",
    "GateSettings",
    "GenerationReport",
    "GenerationSettings",
    "LoadedModel",
    "Perplexity",
    "PerplexityReport",
    "PerplexitySettings",
    "ProbeReport",
    "ProbeSettings",
    "SpeedSettings",
    "StoredModel",
    "TasksReport",
    "TasksSettings",
]

EVALUATIONS: Mapping[str, Evaluation[Any]] = {
    "ppl": PerplexityEvaluation(),
    "gate": GateEvaluation(),
    "attribution": AttributionEvaluation(),
    "generation": GenerationEvaluation(),
    "speed": SpeedEvaluation(),
    "probe": ProbeEvaluation(),
    "tasks": TasksEvaluation(),
}
"""Evaluations by name of their kind."""
