"""`aqlm pack`: from quantized layers and the base model to a checkpoint that others load.

`packed/` is an ordinary Hugging Face directory with a manifest beside it. It is meant to be given away, so nothing in
it tells a time, a host or a path of this machine; the same quantized model always gives the same bytes.
"""

from __future__ import annotations

import time
from typing import Any

from aqlm_cli.events import Noted, Warned
from aqlm_cli.export import Origin, exporter_for, plan_export, read_model
from aqlm_cli.formatting import plain, text_name
from aqlm_cli.memory import peak_memory_bytes, reset_peak_memory
from aqlm_cli.pipeline.job import Job
from aqlm_cli.pipeline.stage_reports import PackReport, restored
from aqlm_cli.quantization.block_files import plan_of
from aqlm_cli.runs.artifact import Artifact
from aqlm_cli.runs.directory import RunDirectory
from aqlm_cli.runs.files import disk_bytes
from aqlm_cli.runs.stages import PACK, StageKey
from aqlm_cli.spec.cost import Cost


def pack(job: Job) -> PackReport:
    """Write `packed/` of an existing run in the format that the settings name; read it back, load it, compare.

    Raises ArtifactError where there is nothing to pack or the model is no longer the one that was quantized, and
    PlanError where the format cannot hold it.
    """
    started = time.monotonic()
    run, emit = job.run, job.emit
    quantized = run.current("quantized")
    exporter = exporter_for(job.config.pack.format, plan_of(quantized))
    key = StageKey(PACK, {"format": exporter.name}, {"quantized": quantized.digest}, overwrite=job.overwrite)
    packed = run.reusable(key)
    if packed is not None:
        emit(Noted(f"{packed.directory} exists already, made from the same quantized model"))
        return restored(PackReport, packed, packed.manifest.results)
    emit(Noted(f"packing {quantized.directory}"))
    reset_peak_memory()
    export = plan_export(read_model(job.base_model(run), quantized), exporter)
    for warning in export.warnings():
        emit(Warned(warning))
    with run.stage(key) as stage:
        export.write(stage.directory, _origin(run, quantized))
        packed = stage.publish(plain(export.facts()))
    # Told, and not kept: the same quantized model gives the same manifest, too.
    taken = Cost(time.monotonic() - started, peak_memory_bytes(), disk_bytes(run.path))
    planned = plain(job.planned.get(PACK.name))
    return restored(PackReport, packed, {**packed.manifest.results, **plain(taken), "planned": planned})


def _origin(run: RunDirectory, quantized: Artifact) -> Origin:
    section = run.config.quantize
    data = ", ".join(text_name(source) for source in run.config.calibrate.data.split(","))
    if section.import_from is not None:
        data = "not known: the codes are those of another checkpoint"
    elif not section.reads_text and "calibration" not in quantized.manifest.parents:
        data = "no text: the weights alone are looked at"
    return Origin(
        method=section.method,
        data=data,
        perplexities=_reports(run, quantized, "eval-ppl-*"),
        gate=next(iter(_reports(run, quantized, "eval-gate")), None),
        speed=next(iter(_reports(run, quantized, "bench")), None),
    )


def _reports(run: RunDirectory, quantized: Artifact, name: str) -> list[dict[str, Any]]:
    """Reports of this name on this quantized model; those on an earlier one of the run are left out."""
    reports = [run.read_report(path.name) for path in sorted(run.reports.glob(f"{name}.json"))]
    return [report for report in reports if report.get("quantized") == quantized.digest]
