"""Evaluation of a model, or of what a run has packed beside its base model; a run keeps the reports."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from aqlm_cli.evaluation import EVALUATIONS, StoredModel
from aqlm_cli.evaluation.evaluation import Remember, compute_again
from aqlm_cli.events import Emit, Noted, Warned
from aqlm_cli.formatting import plain
from aqlm_cli.models import Subject
from aqlm_cli.records import Record
from aqlm_cli.runs.directory import RunDirectory

NEXT_STEP = dict.fromkeys(("ppl", "gate", "speed"), "; `aqlm pack {run} --overwrite` puts it on the model card")
"""The use of a report, by kind of evaluation; ends the message that names its file."""


def evaluate(subject: Subject, kind: str, settings: Any, device: str, emit: Emit) -> Record:
    """One evaluation of EVALUATIONS, with its settings. Its files go to `reports/` of the run, if there is one."""
    evaluation, source, run = EVALUATIONS[kind], subject.source, subject.run
    emit(Noted(f"evaluating {source.directory}"))
    quantized = None if run is None else run.artifact("quantized")
    if quantized is not None:
        emit(Noted(f"{source.directory} is made from {quantized.directory.name}/"))
    base = subject.base() if evaluation.beside_base else None
    report = evaluation.run(
        StoredModel(source, device),
        None if base is None else StoredModel(base, device),
        settings,
        emit,
        compute_again if run is None else _in_reports(run, emit),
    )
    if run is not None:
        # Names the quantized model that was measured; a model card takes reports on its own model alone.
        digest = run.current("packed").manifest.parents.get("quantized")
        for name, content in evaluation.files(report).items():
            path = run.write_report(name, content if isinstance(content, bytes) else {**content, "quantized": digest})
            hint = NEXT_STEP.get(kind, "") if path.suffix == ".json" else ""  # and not for each of its pictures
            emit(Noted(f"wrote {path}" + hint.format(run=run.path)))
    return report


def _in_reports(run: RunDirectory, emit: Emit) -> Remember:
    """Keep figures of the base model in `reports/`, under a digest of all that they depend on."""

    def remember(facts: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        kept = run.reports / f"base-model-{digest[:16]}.json"
        if kept.exists():
            stored = run.read_report(kept.name)
            if stored.keys() > facts.keys() and all(stored[name] == plain(value) for name, value in facts.items()):
                return stored
            emit(Warned(f"{kept} is not about the base model on this text; it is measured again"))
        figures = compute()
        run.write_report(kept.name, {**facts, **figures})
        return figures

    return remember
