"""`aqlm quantize`: block by block through the model, each on what the quantized blocks before it really put out.

For one block, with its inputs for all windows in a file:

1. the original block runs: its outputs are the targets, and x x^T of every linear layer's inputs gives H;
2. its matrices are compressed, side by side;
3. the compressed block is fitted to the targets, then rounded to the 16 bits in which it will be stored;
4. its outputs take the place of the inputs: the next block will see, and correct, the error made here.

Finished blocks, and finished matrices of the present one, are on the disk (unfinished.py): after an interruption the
same command goes on from there, to the same bytes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_cli.activations import compute_dtype
from aqlm_cli.artifacts import Artifact, Stage
from aqlm_cli.blocks import (
    BlockCall,
    count_parameters,
    describe_layers,
    find_blocks,
    linears,
    record_calls,
    replace_module,
)
from aqlm_cli.config import RunConfig
from aqlm_cli.errors import ArtifactError, QuantizationError
from aqlm_cli.events import Advanced, BlockQuantized, Emit, LayerQuantized, Noted, StageStarted, Warned
from aqlm_cli.memory import give_back_memory, peak_memory_bytes
from aqlm_cli.methods import METHODS, CompressedMatrix
from aqlm_cli.methods.layers import Compressed, Task, compress_all
from aqlm_cli.model import ModelSource, load_block, load_outside, load_skeleton, resolve
from aqlm_cli.plan import Plan, make_plan
from aqlm_cli.propagation import Propagation, start_propagation
from aqlm_cli.report import PlanReport, QuantizeReport
from aqlm_cli.runs import open_run
from aqlm_cli.scheme import AdditiveScheme, Scheme, parse_scheme
from aqlm_cli.seeds import generator
from aqlm_cli.storage import load_tensors, save_tensors
from aqlm_cli.tuning.block import BlockData, fit_block, round_to_16_bits, tuned_parameters
from aqlm_cli.unfinished import Unfinished
from aqlm_kernels import AdditiveLinear, AdditiveMatrix, choose, smallest

STAGE = "quantize"


def prepare(config: RunConfig) -> PlanReport:
    """What `quantize` would do, without doing it."""
    source = resolve(config.model, config.revision, config.trust_remote_code)
    return _plan_report(config, _plan(config, load_skeleton(source)))


def quantize(config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit) -> QuantizeReport:
    """Write `quantized/` from the run's calibration, or reuse one that was made with the same settings."""
    source = resolve(config.model, config.revision, config.trust_remote_code)
    run = open_run(run_directory, config, overwrite)
    calibration = run.current("calibration")
    if calibration.manifest.parents["model"] != source.identity:
        raise ArtifactError(
            f"{calibration.directory} was made from another model than {source.name}; add --overwrite to redo it"
        )
    settings = {**config.quantize.model_dump(mode="json"), "seed": config.seed}
    parents = {"model": source.identity, "calibration": calibration.digest}
    quantized = run.reusable("quantized", settings, parents, overwrite)
    if quantized is not None:
        emit(Noted(f"{quantized.directory} is there already, made with the same settings"))
        return _report(quantized)
    plan = _plan(config, load_skeleton(source))
    with run.resumed_stage("quantized", "quantized", settings, parents, _machine(config), overwrite) as stage:
        found = _quantize_blocks(config, source, plan, calibration, stage, emit)
        layers = {path: measured for block in found for path, measured in block["layers"].items()}
        report = _plan_report(config, plan).as_json()
        del report["skipped"], report["kernel"]
        errors = [layer["relative_error"] for layer in layers.values() if layer["relative_error"] > 0]
        report["mean_relative_error"] = math.exp(sum(map(math.log, errors)) / len(errors)) if errors else 0.0
        report["seconds"] = sum(block["seconds"] for block in found)
        report["peak_memory_bytes"] = max(block["peak_memory_bytes"] for block in found)
        model = {"name": source.name, "identity": source.identity}
        quantized = stage.publish({"plan": plan.to_json(), "layers": layers, "model": model, "report": report})
    return _report(quantized)


def _machine(config: RunConfig) -> dict[str, str]:
    """What decides the last bits beside settings: who computes, in which type, with which program."""
    device = torch.device(config.device)
    return {
        "device": device.type,
        "products": str(compute_dtype(device)).removeprefix("torch."),
        "version": metadata.version("aqlm-cli"),
    }


def _plan(config: RunConfig, network: nn.Module) -> Plan:
    section = config.quantize
    layers = describe_layers(network)
    return make_plan(layers, count_parameters(network), parse_scheme(section.scheme), section.skip, section.only)


def _plan_report(config: RunConfig, plan: Plan) -> PlanReport:
    return PlanReport(
        model=config.model,
        method=config.quantize.method,
        scheme=config.quantize.scheme,
        layers=len(plan.quantized),
        code_bits=plan.code_bits,
        stored_bits=plan.stored_bits,
        bytes_before=plan.bytes_before,
        bytes_after=plan.bytes_after,
        kernel=_kernel(parse_scheme(config.quantize.scheme), torch.device(config.device)),
        skipped=tuple((target.path, target.reason) for target in plan.targets if target.reason is not None),
    )


def _kernel(scheme: Scheme, device: torch.device) -> str | None:
    """What will multiply by the compressed layers on this machine, and whether that is slow; None: torch."""
    if not isinstance(scheme, AdditiveScheme):
        return None
    backend = choose(smallest(scheme.num_codebooks, scheme.codebook_size, scheme.group_size), device)
    if backend.fast:
        return backend.name
    return f"{backend.name}: no fast kernel for {scheme} on this machine; schemes of 8 bits a code have one"


def _report(quantized: Artifact) -> QuantizeReport:
    return QuantizeReport(directory=quantized.directory, **quantized.manifest.results["report"])


# ------------------------------------------------------------------------------------------------------ block by block


@dataclass(frozen=True, eq=False)
class _Work:
    """What stays the same from block to block."""

    config: RunConfig
    schemes: Mapping[str, Scheme]  # of every layer to quantize, by path
    stage: Stage
    unfinished: Unfinished
    emit: Emit


def _quantize_blocks(
    config: RunConfig, source: ModelSource, plan: Plan, calibration: Artifact, stage: Stage, emit: Emit
) -> list[dict[str, Any]]:
    """Write `block-NNN.safetensors` of every block that has something to quantize; return what was measured of each."""
    started = time.monotonic()
    ids, measured = _windows(config, calibration)
    if config.quantize.fit.epochs and measured == len(ids):
        emit(Warned("there is one window of text only, so none can be held out and blocks are not fitted; add text"))
    device = torch.device(config.device)
    network = load_outside(source, torch.float32, device)
    paths = find_blocks(network).paths
    schemes = {target.path: target.scheme for target in plan.targets if target.scheme is not None}
    last = max(index for index, path in enumerate(paths) if any(name.startswith(path + ".") for name in schemes))
    unfinished = Unfinished(stage.work)
    if unfinished.blocks:
        emit(Noted(f"{stage.directory} holds {unfinished.blocks} of {last + 1} blocks, going on after them"))
    emit(StageStarted(STAGE, last + 1, "block", done=unfinished.blocks))
    fitted = min(config.quantize.fit.sequences, measured)
    replace_module(network, paths[0], load_block(source, 0, torch.float32, device))
    calls = record_calls(network, ids[:1].to(device))
    states = start_propagation(network, ids, measured, fitted, config.quantize.batch, device, unfinished)
    del network  # its embeddings and head may be large
    work = _Work(config, schemes, stage, unfinished, emit)
    for index in range(states.index, last + 1):
        block = load_block(source, index, torch.float32, device)
        layers = _quantize_block(work, states, paths[index], block, calls[index])
        seconds = time.monotonic() - started
        unfinished.record(index, {"layers": layers, "seconds": seconds, "peak_memory_bytes": peak_memory_bytes()})
        states, started = states.next(), started + seconds
        unfinished.forget_matrices()
        emit(Advanced(STAGE, index + 1))
    return [unfinished.recorded(index) for index in range(last + 1)]


def _windows(config: RunConfig, calibration: Artifact) -> tuple[Tensor, int]:
    """Token ids `[windows, L]`, and how many of the windows are measured; the others, at the end, are held out.

    Mixed once, so that any part of them holds text of all sources.
    """
    with calibration.reading("windows.safetensors") as file:
        ids = load_tensors(file)["ids"].long()
    ids = ids[torch.randperm(len(ids), generator=generator(config.seed, "windows"))]
    section = config.quantize
    held_out = min(section.fit.held_out, max(1, len(ids) // 4), len(ids) - 1) if section.fit.epochs else 0
    measured = min(section.statistics_sequences, len(ids) - held_out)
    return ids[: measured + held_out], measured


def _quantize_block(
    work: _Work, states: Propagation, prefix: str, block: nn.Module, call: BlockCall
) -> dict[str, dict[str, float]]:
    """One block, start to end, and what was measured of its layers."""
    started = time.monotonic()
    compressed = _compress(work, states, prefix, block, call)
    give_back_memory()
    gain = _fit(work, states, prefix, block, call)
    give_back_memory()
    round_to_16_bits(block)
    error = states.advance(block, call)
    if compressed:
        _save(work.stage.directory / f"block-{states.index:03d}.safetensors", prefix, block, compressed)
        work.emit(BlockQuantized(states.index, error, gain, time.monotonic() - started))
    give_back_memory()
    return {
        path: {"relative_error": one.relative_error, "seconds": one.seconds} for path, one in sorted(compressed.items())
    }


def _compress(
    work: _Work, states: Propagation, prefix: str, block: nn.Module, call: BlockCall
) -> dict[str, Compressed]:
    """Put the compressed layers into the block; each of them by its path in the model."""
    section = work.config.quantize
    # Paths inside the block, as the block knows them.
    chosen = {path: layer for path, layer in linears(block, "").items() if f"{prefix}.{path}" in work.schemes}
    statistics = states.measure(block, call, chosen)
    give_back_memory()
    for path in chosen:
        if path not in statistics:
            raise QuantizationError(f"{prefix}.{path}: no text ever reaches it; add text, or leave it out with --skip")
    kept = {path: work.unfinished.kept(f"{prefix}.{path}") for path in chosen}
    tasks = [
        Task(f"{prefix}.{path}", layer.weight.detach(), statistics[path], work.schemes[f"{prefix}.{path}"])
        for path, layer in chosen.items()
        if kept[path] is None
    ]
    method, threads = METHODS[section.method], torch.get_num_threads()
    made = compress_all(tasks, method, section.search, work.config.seed, threads, _keeper(work))
    compressed = {**made, **{one.path: one for one in kept.values() if one is not None}}
    for path, layer in chosen.items():
        replace_module(block, path, _compressed_linear(compressed[f"{prefix}.{path}"].matrix, layer))
    return compressed


def _fit(work: _Work, states: Propagation, prefix: str, block: nn.Module, call: BlockCall) -> float:
    """Fit what is additive in the block; the share of its held-out error that this removed."""
    settings = work.config.quantize.fit
    if (
        not settings.epochs
        or states.measured == len(states.hidden)
        or not any(isinstance(module, AdditiveLinear) for module in block.modules())
    ):
        return 0.0
    data = BlockData(
        states.hidden, states.targets, call, states.dtype, states.device, per_token=settings.error == "per_token"
    )
    training, held_out = torch.arange(states.fitted), torch.arange(states.measured, len(states.hidden))
    before, after = fit_block(block, data, training, held_out, settings, generator(work.config.seed, prefix))
    return 1 - after / before if before > 0 else 0.0


def _compressed_linear(matrix: CompressedMatrix, layer: nn.Linear) -> nn.Module:
    """A module that computes with the compressed weight: trainable where it is additive."""
    if isinstance(matrix, AdditiveMatrix):
        return AdditiveLinear(matrix, None if layer.bias is None else layer.bias.detach()).requires_grad_(False)
    layer.weight = nn.Parameter(matrix.dequantize(), requires_grad=False)
    return layer


def _save(path: Path, prefix: str, block: nn.Module, compressed: Mapping[str, Compressed]) -> None:
    """The block's compressed matrices, fitted, and every vector beside them."""
    tensors: dict[str, Tensor] = {}
    for name, one in compressed.items():
        module = block.get_submodule(name.removeprefix(prefix + "."))
        matrix = module.matrix if isinstance(module, AdditiveLinear) else one.matrix
        tensors.update({f"{name}.{key}": tensor.contiguous() for key, tensor in matrix.tensors().items()})
    vectors = {name: values.detach() for name, values in tuned_parameters(block, prefix).items() if name not in tensors}
    kinds = {name: one.matrix.kind for name, one in sorted(compressed.items())}
    save_tensors(path, {**tensors, **vectors}, {"kinds": json.dumps(kinds)})


def _keeper(work: _Work) -> Callable[[Compressed], None]:
    def keep(one: Compressed) -> None:
        work.unfinished.keep(one)
        work.emit(LayerQuantized(one.path, one.relative_error, one.matrix.bits() / one.weights, one.seconds))

    return keep
