"""`aqlm quantize`: block by block through the model, each on the real output of the quantized blocks before it.

Embeddings and head come first, where they are quantized at all, so that every block sees the errors of the former. Then
for one block, with its inputs for all sequences in a file:

1. the block of the base model runs: its outputs are the targets, and x x^T of every linear layer's inputs gives H;
2. its matrices are quantized, side by side;
3. the quantized block is fitted to the targets, then rounded to the 16 bits in which it will be stored;
4. its outputs take the place of the inputs: the next block will see, and correct, the error made here.

Finished blocks, and finished matrices of the current one, are on the disk (quantization/resume.py): after an
interruption the same command resumes from there, to the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_cli.errors import QuantizationError
from aqlm_cli.events import Advanced, BlockQuantized, LayerQuantized, Noted, Warned
from aqlm_cli.formatting import plain
from aqlm_cli.memory import give_back_memory, peak_memory_bytes, reset_peak_memory
from aqlm_cli.models.tables import put_table
from aqlm_cli.models.walk import Walk
from aqlm_cli.pipeline.block_work import UNREACHED, BlockWork, compress_block, figures_of
from aqlm_cli.pipeline.job import Job
from aqlm_cli.pipeline.preflight import planned_work
from aqlm_cli.pipeline.stage_reports import QuantizeReport, restored
from aqlm_cli.pipeline.weights_alone import quantize_weights
from aqlm_cli.quantization.block_files import TABLES, block_file, save_block, save_tables
from aqlm_cli.quantization.block_inputs import CalibrationPass, machine_of, mixed_sequences, start_calibration_pass
from aqlm_cli.quantization.fitted_errors import StoredStatistics
from aqlm_cli.quantization.parallel import Compressed
from aqlm_cli.quantization.resume import ResumeState
from aqlm_cli.quantization.table_statistics import known_metric, table_of
from aqlm_cli.quantization.training.block import BlockData, fit_block, round_block
from aqlm_cli.runs.artifact import Artifact, Stage
from aqlm_cli.runs.files import disk_bytes
from aqlm_cli.runs.stages import ALLOCATE, QUANTIZE, StageKey
from aqlm_cli.seeds import generator
from aqlm_cli.spec.plan import Target
from aqlm_kernels import Matrix, quantized_layers


def quantize(job: Job) -> QuantizeReport:
    """Write `quantized/` from the run's calibration, or reuse one that was made with the same settings.

    Methods that look at the weights alone need no calibration: then no text is read, and no block is run.

    Raises PlanError where the settings' own limits cannot be kept.
    """
    job = job.within_limits()
    config, source = job.config, job.source
    run = job.open_run()
    calibration = job.calibration(run) if job.reads_text else None
    settings = {**config.quantize.model_dump(mode="json"), "seed": config.seed}
    parents = {"model": source.identity}
    if calibration is not None:
        parents["calibration"] = calibration.digest
    if config.quantize.target.question is not None:
        parents["allocation"] = run.current("allocation").digest
    key = StageKey(QUANTIZE, settings, parents, machine_of(config), job.overwrite)
    quantized = run.reusable(key)
    if quantized is not None:
        job.emit(Noted(f"{quantized.directory} exists already, made with the same settings"))
        return restored(QuantizeReport, quantized, quantized.result("report"))
    reset_peak_memory()
    with run.resumed_stage(key) as stage:
        if calibration is None:
            tables, blocks = dict[str, dict[str, float]](), quantize_weights(job, stage)
        else:
            tables, blocks = _quantize_all(job, calibration, stage)
        layers = tables | {path: measured for block in blocks for path, measured in block["layers"].items()}
        if not layers:
            raise QuantizationError(f"nothing is quantized: {UNREACHED}; add text, or choose other layers")
        known = job.preflight
        plan = known.plan.leaving(known.plan.schemes.keys() - layers.keys(), UNREACHED)
        layout = known.layout if plan == known.plan else known.facts.layout(config, plan)
        report = QuantizeReport(
            directory=stage.published,
            model=config.model,
            scheme=plan.scheme,
            method=plan.method,
            layers=len(plan.quantized),
            code_bits=plan.code_bits,
            stored_bits=plan.stored_bits,
            bytes_before=plan.bytes_before,
            bytes_after=layout.total_bytes,
            mean_relative_error=_geometric_mean([layer["relative_error"] for layer in layers.values()]),
            text=calibration is not None,
            seconds=sum(one["seconds"] for one in (*tables.values(), *blocks)),
            memory_bytes=max([peak_memory_bytes(), *(block["memory_bytes"] for block in blocks)]),
            disk_bytes=max([disk_bytes(stage.directory.parent), *(block["disk_bytes"] for block in blocks)]),
            planned=plain(job.planned.get(QUANTIZE.name)),
        )
        about = {"model": {"name": source.name, "identity": source.identity}, "machine": machine_of(config)}
        fitted = {one["path"]: {name: one[name] for name in ("error", "gain")} for one in blocks if "path" in one}
        stage.publish({"plan": plan.to_json(), "layers": layers, "blocks": fitted, **about, "report": report.results()})
    return report


def _geometric_mean(errors: Sequence[float]) -> float:
    """The geometric mean of those that are not zero; 0 where all are."""
    logarithms = [math.log(error) for error in errors if error > 0]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else 0.0


# ------------------------------------------------------------------------------------------------------ block by block


def _quantize_all(
    job: Job, calibration: Artifact, stage: Stage
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Write the matrices outside the blocks, then the file of every block that has something to quantize.

    Returns what was measured of the former, by path, and of each block.
    """
    started = time.monotonic()
    config, preflight, emit = job.config, job.preflight, job.emit
    ids, measured = mixed_sequences(config, calibration)
    if config.quantize.fitting.epochs and measured == len(ids):
        emit(Warned("the calibration set has one sequence, so none is held out and blocks are not fitted; add text"))
    treatments, resume_state = preflight.plan.treatments, ResumeState(stage.work)
    workers = planned_work(config, preflight.shape).workers
    work = BlockWork(config, treatments, workers, stage, resume_state, emit)
    tables: dict[str, dict[str, float]] = {}

    def outside(walk: Walk) -> None:
        known = known_metric(job.run.artifact(ALLOCATE.kind)) if config.quantize.target.question else None
        tables.update(_quantize_tables(work, walk, ids, preflight.plan.tables, calibration, known))

    states = start_calibration_pass(job.source, ids, measured, config, resume_state, emit, outside)
    inside = treatments.keys() - tables.keys()
    blocks = states.walk.last(sorted(inside)) + 1 if inside else 0
    work.begin(resume_state.blocks, blocks)
    started += sum(table["seconds"] for table in tables.values()) if not resume_state.blocks else 0
    for index in range(states.index, blocks):
        block = states.walk.load(index)
        seconds = work.record(index, _quantize_block(work, states, block), started)
        states, started = states.next(), started + seconds
        resume_state.forget_matrices()
        emit(Advanced(QUANTIZE.name, index + 1))
    return tables, [resume_state.recorded(index) for index in range(blocks)]


def _quantize_tables(
    work: BlockWork,
    walk: Walk,
    ids: Tensor,
    targets: Sequence[Target],
    calibration: Artifact,
    gradients: Tensor | None,
) -> dict[str, dict[str, float]]:
    """Quantize the embeddings and the head, put them into the network, and return what was measured of each.

    `ids` are the sequences `[n, L]` of the calibration, `gradients` the metric of the embeddings, where it is known.
    """
    directory = work.resume_state.directory
    measured: dict[str, dict[str, float]] = {}
    matrices: dict[str, Matrix] = {}
    for target in targets:
        one = work.resume_state.kept_table(target.path)
        if one is None:
            started = time.monotonic()
            made = table_of(target, walk, ids, calibration, work.config, directory, work.emit, gradients)
            seconds = time.monotonic() - started
            one = Compressed(target.path, target.weights, made.matrix.stored(), made.relative_error, seconds)
            work.resume_state.keep_table(one)
            bits = one.matrix.bits() / one.weights
            work.emit(LayerQuantized(one.path, one.relative_error, bits, one.seconds))
        matrices[target.path] = one.matrix
        measured[target.path] = {"relative_error": one.relative_error, "seconds": one.seconds}
        give_back_memory()
    for path, matrix in matrices.items():
        put_table(walk.network, path, matrix)
    if matrices:
        save_tables(work.stage.directory / TABLES, matrices)
    return measured


def _quantize_block(work: BlockWork, states: CalibrationPass, block: nn.Module) -> dict[str, Any]:
    """One block, start to end, and what was measured of it and of its layers."""
    started = time.monotonic()
    compressed, statistics = compress_block(work, states.path, block, lambda chosen: states.measure(block, chosen))
    held_out = states.measured < len(states.hidden)
    fits = bool(work.config.quantize.fitting.epochs) and held_out and bool(quantized_layers(block))
    stored = StoredStatistics.save(work.resume_state.statistics, statistics) if fits else None
    del statistics
    give_back_memory()
    gain = _fit(work, states, block) if fits else 0.0
    give_back_memory()
    if compressed:  # what is stored is stored in 16 bits
        round_block(block, states.path)
    error = states.advance(block)
    if compressed:
        matrices = {path: one.matrix for path, one in compressed.items()}
        save_block(work.stage.directory / block_file(states.index), states.path, block, matrices)
        work.emit(BlockQuantized(states.index, error, gain, time.monotonic() - started))
    give_back_memory()
    layers = figures_of(compressed)
    if stored is not None:
        for path, fitted in stored.errors(states.walk.load(states.index), block).items():
            layers[f"{states.path}.{path}"]["fitted_relative_error"] = fitted
        stored.remove()
        give_back_memory()
    return {"path": states.path, "layers": layers, "error": error, "gain": gain}


def _fit(work: BlockWork, states: CalibrationPass, block: nn.Module) -> float:
    """Fit the quantized layers of the block; the share of its held-out error that this removed."""
    settings = work.config.quantize.fitting
    data = BlockData(states.given, states.targets, states.dtype, states.device, per_token=settings.error == "per_token")
    training, held_out = torch.arange(states.fitted), torch.arange(states.measured, len(states.hidden))
    before, after = fit_block(block, data, training, held_out, settings, generator(work.config.seed, states.path))
    return 1 - after / before if before > 0 else 0.0
