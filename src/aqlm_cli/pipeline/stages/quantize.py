"""`aqlm quantize`: block by block through the model, each on what the quantized blocks before it really put out.

For one block, with its inputs for all windows in a file:

1. the original block runs: its outputs are the targets, and x x^T of every linear layer's inputs gives H;
2. its matrices are compressed, side by side;
3. the compressed block is fitted to the targets, then rounded to the 16 bits in which it will be stored;
4. its outputs take the place of the inputs: the next block will see, and correct, the error made here.

Finished blocks, and finished matrices of the present one, are on the disk (resume_state.py): after an interruption the
same command goes on from there, to the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aqlm_cli.errors import ArtifactError, QuantizationError
from aqlm_cli.events import Advanced, BlockQuantized, Emit, LayerQuantized, Noted, StageStarted, Warned
from aqlm_cli.formatting import plain
from aqlm_cli.memory import give_back_memory, peak_memory_bytes, reset_peak_memory
from aqlm_cli.models.blocks import linears
from aqlm_cli.pipeline.preflight import Preflight, plan_report, planned_work, preflight, within_limits
from aqlm_cli.pipeline.stage_reports import QuantizeReport, restored
from aqlm_cli.quantization.block_files import block_file, put_matrix, save_block
from aqlm_cli.quantization.block_inputs import CalibrationPass, machine_of, mixed_sequences, start_calibration_pass
from aqlm_cli.quantization.methods import METHODS
from aqlm_cli.quantization.parallel import Compressed, Task, compress_all
from aqlm_cli.quantization.resume import ResumeState
from aqlm_cli.quantization.training.block import BlockData, fit_block, round_block
from aqlm_cli.runs.artifact import Artifact, Stage
from aqlm_cli.runs.directory import open_run
from aqlm_cli.runs.files import disk_bytes
from aqlm_cli.seeds import generator
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.cost import Cost
from aqlm_cli.spec.schemes import Scheme
from aqlm_kernels import quantized_layers

STAGE = "quantize"

UNREACHED = "no text reaches it"
"""The reason of a layer that stays as it is: an expert that no token was sent to, attention to an absent encoder."""


def quantize(
    config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit, planned: Cost | None = None
) -> QuantizeReport:
    """Write `quantized/` from the run's calibration, or reuse one that was made with the same settings.

    `planned` is what it was thought to take, to stand beside what it took. Raises PlanError where the settings' own
    limits cannot be kept.
    """
    known = preflight(config)
    config, source, plan = within_limits(config, known), known.source, known.plan
    run = open_run(run_directory, config, overwrite)
    calibration = run.current("calibration")
    if calibration.manifest.parents["model"] != source.identity:
        raise ArtifactError(
            f"{calibration.directory} was made from another model than {source.name}; add --overwrite to redo it"
        )
    settings = {**config.quantize.model_dump(mode="json"), "seed": config.seed}
    parents = {"model": source.identity, "calibration": calibration.digest}
    quantized = run.reusable("quantized", "quantized", settings, parents, overwrite)
    if quantized is not None:
        emit(Noted(f"{quantized.directory} is there already, made with the same settings"))
        return restored(QuantizeReport, quantized.directory, quantized.manifest.results["report"])
    reset_peak_memory()
    with run.resumed_stage("quantized", "quantized", settings, parents, machine_of(config), overwrite) as stage:
        found = _quantize_blocks(config, known, calibration, stage, emit)
        layers = {path: measured for block in found for path, measured in block["layers"].items()}
        if not layers:
            raise QuantizationError(f"nothing is quantized: {UNREACHED}; add text, or choose other layers")
        plan = plan.leaving(plan.schemes.keys() - layers.keys(), UNREACHED)
        report = plan_report(config, plan).as_json()
        del report["skipped"], report["kernel"], report["schemes"]
        errors = [layer["relative_error"] for layer in layers.values() if layer["relative_error"] > 0]
        report["mean_relative_error"] = math.exp(sum(map(math.log, errors)) / len(errors)) if errors else 0.0
        report["seconds"] = sum(block["seconds"] for block in found)
        report["memory_bytes"] = max(block["memory_bytes"] for block in found)
        report["disk_bytes"] = max(block["disk_bytes"] for block in found)
        report["planned"] = plain(planned)
        about = {"model": {"name": source.name, "identity": source.identity}, "machine": machine_of(config)}
        quantized = stage.publish({"plan": plan.to_json(), "layers": layers, **about, "report": report})
    return restored(QuantizeReport, quantized.directory, quantized.manifest.results["report"])


# ------------------------------------------------------------------------------------------------------ block by block


@dataclass(frozen=True, eq=False)
class _Work:
    """What stays the same from block to block."""

    config: RunConfig
    schemes: Mapping[str, Scheme]  # of every layer to quantize, by path
    workers: int  # matrices compressed at once
    stage: Stage
    resume_state: ResumeState
    emit: Emit


def _quantize_blocks(
    config: RunConfig, known: Preflight, calibration: Artifact, stage: Stage, emit: Emit
) -> list[dict[str, Any]]:
    """Write `block-NNN.safetensors` of every block that has something to quantize; return what was measured of each."""
    started = time.monotonic()
    ids, measured = mixed_sequences(config, calibration)
    if config.quantize.fitting.epochs and measured == len(ids):
        emit(Warned("there is one window of text only, so none can be held out and blocks are not fitted; add text"))
    source, schemes, resume_state = known.source, known.plan.schemes, ResumeState(stage.work)
    states = start_calibration_pass(source, ids, measured, config, resume_state, emit)
    last = states.walk.last(list(schemes))
    if resume_state.blocks:
        emit(Noted(f"{stage.directory} holds {resume_state.blocks} of {last + 1} blocks, going on after them"))
    emit(StageStarted(STAGE, last + 1, "block", done=resume_state.blocks))
    work = _Work(config, schemes, planned_work(config, known.shape).workers, stage, resume_state, emit)
    for index in range(states.index, last + 1):
        block = states.walk.load(index)
        layers = _quantize_block(work, states, block)
        seconds = time.monotonic() - started
        taken = {"memory_bytes": peak_memory_bytes(), "disk_bytes": disk_bytes(stage.directory.parent)}
        resume_state.record(index, {"layers": layers, "seconds": seconds, **taken})
        states, started = states.next(), started + seconds
        resume_state.forget_matrices()
        emit(Advanced(STAGE, index + 1))
    return [resume_state.recorded(index) for index in range(last + 1)]


def _quantize_block(work: _Work, states: CalibrationPass, block: nn.Module) -> dict[str, dict[str, float]]:
    """One block, start to end, and what was measured of its layers."""
    started = time.monotonic()
    compressed = _compress(work, states, block)
    give_back_memory()
    gain = _fit(work, states, block)
    give_back_memory()
    if compressed:  # what is stored is stored in 16 bits
        round_block(block, states.path)
    error = states.advance(block)
    if compressed:
        matrices = {path: one.matrix for path, one in compressed.items()}
        save_block(work.stage.directory / block_file(states.index), states.path, block, matrices)
        work.emit(BlockQuantized(states.index, error, gain, time.monotonic() - started))
    give_back_memory()
    return {
        path: {"relative_error": one.relative_error, "seconds": one.seconds} for path, one in sorted(compressed.items())
    }


def _compress(work: _Work, states: CalibrationPass, block: nn.Module) -> dict[str, Compressed]:
    """Put the compressed layers into the block; each of them by its path in the model."""
    section, prefix = work.config.quantize, states.path
    # Paths inside the block, as the block knows them.
    chosen = {path: layer for path, layer in linears(block, "").items() if f"{prefix}.{path}" in work.schemes}
    statistics = states.measure(block, chosen)
    give_back_memory()
    for path in chosen.keys() - statistics.keys():
        work.emit(Warned(f"{prefix}.{path} stays in 16 bits: {UNREACHED}; add text to quantize it"))
    chosen = {path: layer for path, layer in chosen.items() if path in statistics}
    kept = {path: work.resume_state.kept(f"{prefix}.{path}") for path in chosen}
    tasks = [
        Task(f"{prefix}.{path}", layer.weight.detach(), statistics[path], work.schemes[f"{prefix}.{path}"])
        for path, layer in chosen.items()
        if kept[path] is None
    ]
    method = METHODS[section.method]
    made = compress_all(tasks, method, section.settings, work.config.seed, work.workers, _keeper(work))
    compressed = {**made, **{one.path: one for one in kept.values() if one is not None}}
    for path in chosen:
        put_matrix(block, path, compressed[f"{prefix}.{path}"].matrix)
    return compressed


def _fit(work: _Work, states: CalibrationPass, block: nn.Module) -> float:
    """Fit the quantized layers of the block; the share of its held-out error that this removed."""
    settings = work.config.quantize.fitting
    if not settings.epochs or states.measured == len(states.hidden) or not quantized_layers(block):
        return 0.0
    data = BlockData(states.given, states.targets, states.dtype, states.device, per_token=settings.error == "per_token")
    training, held_out = torch.arange(states.fitted), torch.arange(states.measured, len(states.hidden))
    before, after = fit_block(block, data, training, held_out, settings, generator(work.config.seed, states.path))
    return 1 - after / before if before > 0 else 0.0


def _keeper(work: _Work) -> Callable[[Compressed], None]:
    def keep(one: Compressed) -> None:
        work.resume_state.keep(one)
        work.emit(LayerQuantized(one.path, one.relative_error, one.matrix.bits() / one.weights, one.seconds))

    return keep
