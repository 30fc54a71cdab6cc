"""`aqlm calibrate`: the text that quantization fits to, and what the original model says of it.

`windows.safetensors` holds the token ids. A part of the windows goes through the original model once: the second moment
of every input feature of every linear layer shows which features are dead and which are outliers, and the model's own
loss shows at a glance whether the text suits it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aqlm_cli.activations import autocast, compute_dtype
from aqlm_cli.artifacts import Artifact
from aqlm_cli.blocks import find_blocks, linears
from aqlm_cli.config import RunConfig
from aqlm_cli.data import calibration_windows
from aqlm_cli.errors import QuantizationError
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted
from aqlm_cli.model import ModelSource, load_network, load_tokenizer, resolve
from aqlm_cli.report import CalibrationReport
from aqlm_cli.runs import RunDirectory, open_run
from aqlm_cli.storage import save_tensors

STAGE = "calibrate"


def calibrate(config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit) -> CalibrationReport:
    """Write `calibration/`, or reuse one that was made from the same model, text and seed."""
    source = resolve(config.model, config.revision, config.trust_remote_code)
    run = open_run(run_directory, config, overwrite)
    settings = {**config.calibrate.model_dump(mode="json"), "seed": config.seed}
    parents = {"model": source.identity}
    calibration = run.reusable("calibration", settings, parents, overwrite)
    if calibration is None:
        with run.stage("calibration", "calibration", settings, parents) as stage:
            results = _measure(config, source, stage.directory, emit)
            calibration = stage.publish(results)
    else:
        emit(Noted(f"{calibration.directory} is there already, made from the same model and text"))
    return _report(run, calibration)


def _report(run: RunDirectory, calibration: Artifact) -> CalibrationReport:
    return CalibrationReport(directory=calibration.directory, **calibration.manifest.results)


def _measure(config: RunConfig, source: ModelSource, directory: Path, emit: Emit) -> dict[str, object]:
    """Write the windows and the moments; return the fields of the report."""
    started = time.monotonic()
    section = config.calibrate
    windows = calibration_windows(
        section.data, section.sequences, section.sequence_length, config.seed, load_tokenizer(source)
    )
    save_tensors(directory / "windows.safetensors", {"ids": windows.ids.to(torch.int32)})
    device = torch.device(config.device)
    network = load_network(source, torch.float32, device)
    # Evenly spread, so that every source takes part.
    chosen = torch.linspace(0, len(windows.ids) - 1, min(section.statistics_sequences, len(windows.ids))).long()
    moments, loss = _teacher_statistics(network, windows.ids[chosen].to(device), emit)
    save_tensors(directory / "second_moments.safetensors", moments)
    return {
        "windows": len(windows.ids),
        "sequence_length": section.sequence_length,
        "tokens": windows.ids.numel(),
        "loss": loss,
        "sources": dict(Counter(windows.sources)),
        "seconds": time.monotonic() - started,
    }


@torch.no_grad()
def _teacher_statistics(network: nn.Module, ids: Tensor, emit: Emit) -> tuple[dict[str, Tensor], float]:
    """The mean square of every input feature of every linear layer in the blocks `[in]`, and the mean loss in nats."""
    blocks = find_blocks(network)
    sums: dict[str, Tensor] = {}

    def watch(path: str, layer: nn.Linear) -> torch.utils.hooks.RemovableHandle:
        sums[path] = torch.zeros(layer.in_features, dtype=torch.float64, device=ids.device)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[path] += inputs[0].float().square().flatten(0, -2).sum(0)

        return layer.register_forward_pre_hook(hook)

    layers = {
        path: layer
        for prefix, block in zip(blocks.paths, blocks.modules, strict=True)
        for path, layer in linears(block, prefix).items()
    }
    hooks = [watch(path, layer) for path, layer in layers.items()]
    emit(StageStarted(STAGE, len(ids), "window"))
    total = 0.0
    for number, window in enumerate(ids, start=1):
        with autocast(ids.device, compute_dtype(ids.device)):
            logits = network(input_ids=window[None], use_cache=False).logits[0]
        total += float(F.cross_entropy(logits[:-1].float(), window[1:]))
        emit(Advanced(STAGE, number))
    for hook in hooks:
        hook.remove()
    moments = {path: (entries / ids.numel()).float().cpu() for path, entries in sums.items()}
    for path, entries in moments.items():
        if not bool(entries.isfinite().all()):
            raise QuantizationError(
                f"{path}: its inputs hold NaN or infinite values; the model is damaged or overflows"
            )
    if not math.isfinite(total):
        raise QuantizationError(_why_not_finite(network))
    return moments, total / len(ids)


def _why_not_finite(network: nn.Module) -> str:
    """Of a loss that is not: the first weight that is at fault, if one is."""
    for name, parameter in network.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"{name.removesuffix('.weight')}: the weight holds NaN or infinite values; the model is damaged"
    return "the loss of the original model is not finite; its activations overflow"
