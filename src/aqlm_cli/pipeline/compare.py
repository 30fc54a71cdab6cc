"""Comparison of the runs of a study: every cell is quantized and evaluated, in a run directory of its own.

    runs/STUDY/
        NAME/                  the run of a cell, with reports/compared.json: its row
        comparison.json, .md, .csv, .png, .svg

All cells share one calibration where their settings for it agree. What is complete is reused, so that a comparison that
was killed continues after its last cell.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aqlm_cli.data.sources import refuse_unknown
from aqlm_cli.errors import AqlmError, ArtifactError, ConfigError
from aqlm_cli.evaluation import PerplexityReport
from aqlm_cli.evaluation.comparison import ComparisonReport, Row, compared, draw, figure_of
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted
from aqlm_cli.formatting import plain
from aqlm_cli.models import refuse_longer_than_stated
from aqlm_cli.pipeline import evaluations, order
from aqlm_cli.pipeline.job import Job, make_job
from aqlm_cli.pipeline.stage_reports import ImportReport, QuantizeReport
from aqlm_cli.runs.directory import RunDirectory, find_artifact, is_run, read_run
from aqlm_cli.runs.files import digest_file, storage_errors, write_file
from aqlm_cli.runs.stages import CALIBRATE, FINETUNE, PACK
from aqlm_cli.spec.run_file import differences
from aqlm_cli.spec.study import Cell, Study

ROW = "compared.json"
STAGE = "compare"


def compare(study: Study, directory: Path, emit: Emit, overwrite: bool = False) -> ComparisonReport:
    """Run what is missing of a study, and write its table and picture to `directory`.

    Every cell is planned before the first is started, so that one that cannot be made is refused at once. Raises
    ConfigError where a cell has another model, or no evaluation of perplexity.
    """
    order.use_machine(study.cells[0].config)
    jobs = _jobs(study, directory, emit, overwrite)
    emit(StageStarted(STAGE, len(jobs), "cell"))
    # Those of an earlier comparison stand in the table until their turn comes.
    rows = {cell.name: row for cell, job in zip(study.cells, jobs, strict=True) if (row := _row_before(job))}
    for number, (cell, job) in enumerate(zip(study.cells, jobs, strict=True), 1):
        emit(Noted(f"cell {number} of {len(jobs)}: {cell.name}"))
        order.use_machine(cell.config)
        _share_calibration(job, [one.directory for one in jobs[: number - 1]])
        rows[cell.name] = _row(cell, job)
        report = compared(study.name, jobs[0].source.name, [rows[one.name] for one in study.cells if one.name in rows])
        _write(report, directory)
        emit(Advanced(STAGE, number, cell.name))
    return report


def _jobs(study: Study, directory: Path, emit: Emit, overwrite: bool) -> list[Job]:
    jobs: list[Job] = []
    for cell in study.cells:
        if "ppl" not in cell.config.evaluate.kinds:
            raise ConfigError(f"cell {cell.name} is not evaluated by ppl; add it to evaluate.kinds")
        _refuse_evaluation(cell)
        known = jobs[0].model if jobs else None
        job = make_job(cell.config, directory / cell.name, overwrite=overwrite, emit=emit, resolved=known)
        if jobs and job.source.identity != jobs[0].source.identity:
            raise ConfigError(f"cell {cell.name} has another model than the first; compare models in two studies")
        section = cell.config.eval_ppl
        if section.protocol is None:
            refuse_longer_than_stated(job.source, section.sequence_length, "eval_ppl.sequence_length")
        jobs.append(order.prepare(job)[0])
    return jobs


def _refuse_evaluation(cell: Cell) -> None:
    """Refuse, as ConfigError, a cell on a device that is not there, or whose evaluation could not start."""
    try:
        order.find_device(cell.config.device)
        evaluations.settings_of(cell.config, None)
        for text in cell.config.eval_ppl.data:
            refuse_unknown(text)
    except AqlmError as error:
        raise ConfigError(f"cell {cell.name}: {error}") from error


def _share_calibration(job: Job, others: Sequence[Path]) -> None:
    """Link the calibration of another cell into the run, if it has none and theirs has the same settings."""
    wanted = job.directory / CALIBRATE.directory
    if not job.reads_text or wanted.exists():
        return
    for other in others:
        found = find_artifact(other, CALIBRATE.kind)
        if found is not None and not any(
            differences(read_run(other).config, job.config, section) for section in CALIBRATE.sections
        ):
            job.open_run()
            partial = wanted.with_name(f"{wanted.name}.linked")
            with storage_errors(wanted):
                shutil.rmtree(partial, ignore_errors=True)  # what an interruption left
                shutil.copytree(found, partial, copy_function=_linked)
                partial.rename(wanted)
            return


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _row(cell: Cell, job: Job) -> Row:
    """The row of a cell, which is made and evaluated where that is missing."""
    reports = order.quantize_and_pack(job, forecasting=False)  # cells are many, and differ little
    if FINETUNE.name in job.config.model_fields_set:
        reports |= order.finetune_run(str(job.directory), job)
    quantized = reports["quantize"]
    assert isinstance(quantized, (QuantizeReport, ImportReport))
    run = read_run(job.directory)
    packed = run.current(PACK.kind)
    facts = {
        "packed": packed.digest,
        "eval_ppl": job.config.eval_ppl.model_dump(mode="json"),
        "evaluate": job.config.evaluate.model_dump(mode="json"),
        "texts": {text: _version_of(text) for text in (*job.config.eval_ppl.data, *job.config.evaluate.tasks)},
    }
    kept = _kept(run)
    before = _row_in(kept)
    if kept.get("facts") == facts and before is not None:
        job.emit(Noted(f"{job.directory} is evaluated already"))
        return before
    reports = evaluations.evaluate_model(str(job.directory), job.config, None, job.emit, job.model)
    measured = [reports[text] for text in job.config.eval_ppl.data]
    figures = tuple(figure_of(one) for one in measured if isinstance(one, PerplexityReport))
    row = Row(
        name=cell.name,
        method=quantized.method if isinstance(quantized, QuantizeReport) else "imported",
        scheme=quantized.scheme,
        stored_bits=quantized.stored_bits,
        bytes=sum(path.stat().st_size for path in packed.directory.glob("*.safetensors")),
        seconds=quantized.seconds or 0.0,
        memory_bytes=quantized.memory_bytes or 0,
        figures=figures,
    )
    run.write_report(ROW, {"facts": facts, "row": plain(row)})
    return row


def _kept(run: RunDirectory) -> dict[str, Any]:
    return run.read_report(ROW) if (run.reports / ROW).exists() else {}


def _row_before(job: Job) -> Row | None:
    """The row that an earlier comparison kept of a run, if it can be read as one."""
    if not is_run(job.directory):
        return None
    with contextlib.suppress(ArtifactError):
        return _row_in(_kept(job.run))
    return None


def _row_in(kept: Mapping[str, Any]) -> Row | None:
    with contextlib.suppress(LookupError, TypeError):
        row = Row.from_json(kept["row"])
        return row if row.figures else None
    return None


def _version_of(text: str) -> str:
    """The digest of a file of text or questions; else the version of Python, whose reference is `builtin`."""
    return digest_file(Path(text)) if Path(text).is_file() else platform.python_version()


def _write(report: ComparisonReport, directory: Path) -> None:
    write_file(directory / "comparison.json", json.dumps(report.as_json(), indent=1).encode())
    write_file(directory / "comparison.md", report.as_markdown().encode())
    write_file(directory / "comparison.csv", report.as_csv().encode())
    for kind, content in draw(report).items():
        write_file(directory / f"comparison.{kind}", content)
