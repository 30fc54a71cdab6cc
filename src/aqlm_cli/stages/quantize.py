"""`aqlm quantize`: block by block through the model, each on what the quantized blocks before it really put out.

For one block, with its inputs for all windows in a file:

1. the original block runs: its outputs are the targets, and x x^T of every linear layer's inputs gives H;
2. its matrices are compressed, side by side;
3. the compressed block is fitted to the targets, then rounded to the 16 bits in which it will be stored;
4. its outputs take the place of the inputs: the next block will see, and correct, the error made here.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from aqlm_cli.activations import activation_file, compute_dtype, run_block
from aqlm_cli.artifacts import Artifact, RunDirectory, open_run
from aqlm_cli.blocks import (
    BlockCall,
    count_parameters,
    describe_layers,
    find_blocks,
    first_inputs,
    linears,
    observe_inputs,
    record_calls,
    replace_module,
)
from aqlm_cli.config import RunConfig
from aqlm_cli.errors import ArtifactError, QuantizationError
from aqlm_cli.methods import METHODS
from aqlm_cli.methods.layers import Compressed, Task, compress_all
from aqlm_cli.methods.statistics import LayerStatistics, SecondMoment
from aqlm_cli.model import load_network, resolve
from aqlm_cli.plan import Plan, make_plan
from aqlm_cli.report import (
    Advanced,
    BlockQuantized,
    Emit,
    LayerQuantized,
    Noted,
    PlanReport,
    QuantizeReport,
    StageStarted,
)
from aqlm_cli.scheme import Scheme, parse_scheme
from aqlm_cli.seeds import generator
from aqlm_cli.storage import load_tensors, save_tensors
from aqlm_cli.tuning.block import BlockData, fit_block, tuned_parameters
from aqlm_kernels import AdditiveLinear, AdditiveMatrix

STAGE = "quantize"


def prepare(config: RunConfig) -> PlanReport:
    """What `quantize` would do, without doing it."""
    source = resolve(config.model, config.revision, config.trust_remote_code)
    network = load_network(source, torch.float16)
    return _plan_report(config, _plan(config, network))


def quantize(config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit) -> QuantizeReport:
    """Write `quantized/` from the run's calibration, or reuse one that was made from the same with the same settings."""
    source = resolve(config.model, config.revision, config.trust_remote_code)
    run = open_run(run_directory, config, overwrite)
    calibration = run.artifact("calibration")
    if calibration is None:
        raise ArtifactError(f"{run.path} holds no calibration yet; run `aqlm calibrate {config.model} --out {run.path}`")
    settings = {**config.quantize.model_dump(mode="json"), "seed": config.seed}
    parents = {"model": source.identity, "calibration": calibration.digest}
    quantized = run.reusable("quantized", settings, parents, overwrite)
    if quantized is not None:
        emit(Noted(f"{quantized.directory} is there already, made with the same settings"))
        return _report(quantized)
    network = load_network(source, torch.float32, config.device)
    plan = _plan(config, network)
    started = time.monotonic()
    with run.stage("quantized", "quantized", settings, parents) as stage:
        layers = _quantize_blocks(config, network, plan, calibration, stage.directory, emit)
        report = _plan_report(config, plan).as_json()
        del report["skipped"]
        errors = [layer["relative_error"] for layer in layers.values() if layer["relative_error"] > 0]
        report["mean_relative_error"] = math.exp(sum(map(math.log, errors)) / max(1, len(errors)))
        report["seconds"] = time.monotonic() - started
        report["peak_memory_bytes"] = peak_memory_bytes()
        model = {"name": source.name, "identity": source.identity}
        quantized = stage.publish({"plan": plan.to_json(), "layers": layers, "model": model, "report": report})
    return _report(quantized)


def peak_memory_bytes() -> int:
    """The most memory this process has ever had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
        skipped=tuple((target.path, target.reason) for target in plan.targets if target.reason is not None),
    )


def _report(quantized: Artifact) -> QuantizeReport:
    return QuantizeReport(directory=quantized.directory, **quantized.manifest.results["report"])


# ------------------------------------------------------------------------------------------------------ block by block


@dataclass(frozen=True, eq=False)
class _Pass:
    """What stays the same from block to block."""

    config: RunConfig
    schemes: Mapping[str, Scheme]  # of every layer to quantize, by path
    hidden: Tensor  # [windows, L, d], what enters the present block
    targets: Tensor  # [windows, L, d], what the original block makes of it
    dtype: torch.dtype
    threads: int
    directory: Path
    emit: Emit


def _quantize_blocks(
    config: RunConfig, network: nn.Module, plan: Plan, calibration: Artifact, directory: Path, emit: Emit
) -> dict[str, dict[str, float]]:
    """Write `block-NNN.safetensors` of every block that has something to quantize; return the layers' measurements."""
    ids = load_tensors(calibration.path("windows.safetensors"))["ids"].long()
    # Mixed once, so that any first part of the windows holds text of all sources.
    ids = ids[torch.randperm(len(ids), generator=generator(config.seed, "windows"))]
    blocks = find_blocks(network)
    schemes = {target.path: target.scheme for target in plan.targets if target.scheme is not None}
    batch = config.quantize.batch
    calls = record_calls(network, ids[:batch].to(config.device))
    first = first_inputs(network, ids[:1].to(config.device))
    shape = (len(ids), *first.shape[1:])
    work = _Pass(
        config=config,
        schemes=schemes,
        hidden=activation_file(directory / "hidden.activations", shape),
        targets=activation_file(directory / "targets.activations", shape),
        dtype=compute_dtype(torch.device(config.device)),
        threads=torch.get_num_threads(),
        directory=directory,
        emit=emit,
    )
    for chosen in torch.arange(len(ids)).split(batch):
        work.hidden[chosen] = first_inputs(network, ids[chosen].to(config.device)).float().cpu()
    wanted = [index for index, path in enumerate(blocks.paths) if any(one.startswith(path + ".") for one in schemes)]
    emit(StageStarted(STAGE, wanted[-1] + 1, "block"))
    layers: dict[str, dict[str, float]] = {}
    for index in range(wanted[-1] + 1):
        layers.update(_quantize_block(work, index, blocks.paths[index], blocks.modules[index], calls[index]))
        emit(Advanced(STAGE, index + 1))
    for path in directory.glob("*.activations"):
        path.unlink()
    return layers


def _quantize_block(
    work: _Pass, index: int, prefix: str, block: nn.Module, call: BlockCall
) -> dict[str, dict[str, float]]:
    """One block, start to end; on return `work.hidden` is what enters the next one."""
    started = time.monotonic()
    chosen = {path: layer for path, layer in linears(block, prefix).items() if path in work.schemes}
    section = work.config.quantize
    statistics = _run_original(work, prefix, block, call, set(chosen))
    tasks = [
        Task(path, layer.weight.detach(), statistics[path], work.schemes[path]) for path, layer in chosen.items()
    ]
    report = _reporter(work.emit)
    compressed = compress_all(tasks, METHODS[section.method], section.search, work.config.seed, work.threads, report)
    for path, layer in chosen.items():
        replace_module(block, path.removeprefix(prefix + "."), _compressed_linear(compressed[path], layer))
    data = BlockData(work.hidden, work.targets, call, work.dtype)
    windows = torch.arange(len(work.hidden))
    before = data.relative_error(block, windows[: section.fit.sequences], section.batch) if chosen else 0.0
    if section.fit.epochs and any(isinstance(module, AdditiveLinear) for module in block.modules()):
        held_out = windows[len(windows) - section.fit.held_out :]
        training = windows[: min(section.fit.sequences, len(windows) - len(held_out))]
        fit_block(block, data, training, held_out, section.fit, generator(work.config.seed, prefix))
    _round_to_16_bits(block)
    after = _propagate(work, block, call)
    if chosen:
        _save(work.directory / f"block-{index:03d}.safetensors", prefix, block, compressed)
        work.emit(BlockQuantized(index, len(work.schemes), before, after, time.monotonic() - started))
    return {
        path: {"relative_error": one.relative_error, "seconds": one.seconds} for path, one in sorted(compressed.items())
    }


def _run_original(
    work: _Pass, prefix: str, block: nn.Module, call: BlockCall, paths: set[str]
) -> dict[str, LayerStatistics]:
    """Fill `work.targets`; H of every layer in `paths`, one object where layers share their inputs."""
    moments: dict[tuple[str, ...], SecondMoment] = {}

    def collect(sharing: tuple[str, ...], x: Tensor) -> None:  # x [tokens, in]
        if any(f"{prefix}.{path}" in paths for path in sharing):
            moments.setdefault(sharing, SecondMoment(x.shape[1], x.device)).add(x.to(work.dtype))

    for batch in torch.arange(len(work.hidden)).split(work.config.quantize.batch):
        with observe_inputs(block, collect):
            work.targets[batch] = run_block(block, call, work.hidden[batch], work.dtype)
    return {f"{prefix}.{path}": moment.statistics() for sharing, moment in moments.items() for path in sharing}


def _propagate(work: _Pass, block: nn.Module, call: BlockCall) -> float:
    """Put the compressed block's outputs in the place of its inputs; their squared error relative to the targets."""
    error = energy = 0.0
    for batch in torch.arange(len(work.hidden)).split(work.config.quantize.batch):
        output = run_block(block, call, work.hidden[batch], work.dtype)
        error += float((output - work.targets[batch]).square().sum(dtype=torch.float64))
        energy += float(work.targets[batch].square().sum(dtype=torch.float64))
        work.hidden[batch] = output
    return error / energy if energy > 0 else 0.0


def _compressed_linear(compressed: Compressed, layer: nn.Linear) -> nn.Module:
    """A module that computes with the compressed weight: trainable where it is additive."""
    if isinstance(compressed.matrix, AdditiveMatrix):
        return AdditiveLinear(compressed.matrix, None if layer.bias is None else layer.bias.detach())
    replaced = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device=layer.weight.device)
    replaced.weight = nn.Parameter(compressed.matrix.dequantize().to(layer.weight.device), requires_grad=False)
    replaced.bias = layer.bias
    return replaced


@torch.no_grad()
def _round_to_16_bits(block: nn.Module) -> None:
    """What is tuned is stored as float16; the blocks that follow must see it as it will be."""
    for parameter in tuned_parameters(block).values():
        parameter.copy_(parameter.half().float())


def _save(path: Path, prefix: str, block: nn.Module, compressed: Mapping[str, Compressed]) -> None:
    """The block's compressed matrices, fitted, and every vector beside them."""
    tensors: dict[str, Tensor] = {}
    for name, one in compressed.items():
        module = block.get_submodule(name.removeprefix(prefix + "."))
        matrix = module.matrix if isinstance(module, AdditiveLinear) else one.matrix
        tensors.update({f"{name}.{key}": tensor.contiguous() for key, tensor in matrix.tensors().items()})
    vectors = {name: p.detach() for name, p in tuned_parameters(block, prefix).items() if name not in tensors}
    kinds = {name: one.matrix.kind for name, one in sorted(compressed.items())}
    save_tensors(path, {**tensors, **vectors}, {"kinds": json.dumps(kinds)})


def _reporter(emit: Emit) -> Callable[[Compressed], None]:
    def report(one: Compressed) -> None:
        bits = one.matrix.bits() / one.matrix.dequantize().numel()
        emit(LayerQuantized(one.path, one.relative_error, bits, one.seconds))

    return report
