"""`aqlm finetune`: the quantized model as a whole, taught by the original.

Block-wise fitting never sees what an error does further on. Here the quantized model's logits are brought towards the
original's on the same text (tuning/distill.py); what can be trained in the blocks moves, the codes stay. The result has
the layout of `quantized/` and takes its place for everything that comes after.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aqlm_cli.activations import compute_dtype
from aqlm_cli.artifacts import Artifact, Stage
from aqlm_cli.blocks import find_blocks
from aqlm_cli.config import RunConfig
from aqlm_cli.data import calibration_windows
from aqlm_cli.errors import ArtifactError, DataError, ModelError
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted
from aqlm_cli.figures import draw_curve
from aqlm_cli.memory import peak_memory_bytes, reset_peak_memory
from aqlm_cli.model import ModelSource, load_network, load_tokenizer, original_of
from aqlm_cli.propagation import machine_of
from aqlm_cli.quantized import block_file, block_files, matrix_kinds, read_matrix, restore_block, save_block
from aqlm_cli.report import FinetuneReport, restored
from aqlm_cli.runs import START, RunDirectory, open_run, read_run
from aqlm_cli.seeds import generator
from aqlm_cli.storage import disk_bytes, load_tensors, read_metadata, save_tensors
from aqlm_cli.tuning.block import round_to_16_bits, tuned_parameters
from aqlm_cli.tuning.distill import Distillation, States, Training, begin, one_step, train
from aqlm_cli.units import parse_duration

STAGE = "finetune"

STATE = "training.safetensors"
"""In `work/`: everything that an interrupted training goes on from."""

TIMED_STEPS = 3


def finetune(config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit) -> FinetuneReport:
    """Write `finetuned/` from the run's `quantized/`, or reuse one that was made with the same settings."""
    earlier = read_run(run_directory)
    source, start = original_of(earlier), earlier.own("quantized", "quantized")
    if start is None:
        raise ArtifactError(f"{run_directory} has no complete quantized/; make it with `aqlm quantize`")
    timed = config.finetune.time_budget is None or _begun_with(earlier, config, overwrite)
    if config.finetune.time_budget is not None and timed:
        config = config.model_copy(update={"finetune": earlier.config.finetune})
    found = earlier.reusable("finetuned", "quantized", *_made_with(config, source, start), overwrite)
    if found is not None:
        emit(Noted(f"{found.directory} is there already, made with the same settings"))
        return restored(FinetuneReport, found.directory, found.manifest.results["report"])
    reset_peak_memory()
    pupil = _load(config, source, start, earlier.current("calibration"))
    if not timed:
        config = _with_steps(config, pupil, emit)
    run = open_run(run_directory, config, overwrite)
    made_with, machine = _made_with(config, source, start), machine_of(config)
    with run.resumed_stage("finetuned", "quantized", *made_with, machine, overwrite) as stage:
        training = _train(config, pupil, stage, emit)
        pupil.save(start, stage.directory)
        report = {
            "steps": training.step,
            "tokens": training.step * config.finetune.batch * config.finetune.sequence_length,
            "text_tokens": pupil.data.training.numel(),
            "before": training.curve[0]["held_out"],
            "after": training.best,
            "parameters": sum(parameter.numel() for parameter in training.parameters.values()),
            "seconds": training.seconds,
            "memory_bytes": peak_memory_bytes(),
            "disk_bytes": disk_bytes(run.path),
        }
        kept = {key: start.manifest.results[key] for key in ("plan", "model", "layers")}
        made = stage.publish({**kept, "machine": machine, "report": report})
    run.write_report("finetune.json", {**report, "curve": training.curve})
    for kind, picture in draw_curve(training.curve).items():
        run.write_report(f"finetune.{kind}", picture)
    return restored(FinetuneReport, made.directory, made.manifest.results["report"])


def _made_with(config: RunConfig, source: ModelSource, start: Artifact) -> tuple[dict[str, object], dict[str, str]]:
    settings = {**config.finetune.model_dump(mode="json"), "seed": config.seed}
    return settings, {"model": source.identity, START: start.digest}


# ------------------------------------------------------------------------------------------------------------- settings


def _begun_with(earlier: RunDirectory, config: RunConfig, overwrite: bool) -> bool:
    """Whether the run has begun with this time budget, so that its run file knows how many steps that is."""
    kept = earlier.config.finetune.model_copy(update={"steps": config.finetune.steps})
    there = any((earlier.path / name).exists() for name in ("finetuned", "finetuned.partial"))
    return there and not overwrite and kept == config.finetune


def _with_steps(config: RunConfig, pupil: _Pupil, emit: Emit) -> RunConfig:
    """As many as fit in the time budget, by timing a few whose effect is undone."""
    section = config.finetune
    assert section.time_budget is not None
    budget = parse_duration(section.time_budget)
    trial = section.model_copy(update={"steps": TIMED_STEPS})
    training = begin(pupil.parameters())
    one_step(pupil.data, training, trial, config.seed)  # whatever has to be compiled
    clock = time.monotonic()
    for _ in range(TIMED_STEPS - 1):
        one_step(pupil.data, training, trial, config.seed)
    step = (time.monotonic() - clock) / (TIMED_STEPS - 1)
    clock = time.monotonic()
    pupil.data.held_out_divergence(section.windows_at_once)
    judged = (time.monotonic() - clock) / section.evaluate_every
    with torch.no_grad():
        for name, parameter in training.parameters.items():
            parameter.copy_(training.kept[name])
    steps = max(1, int(budget / (step + judged)))
    emit(Noted(f"a step takes {step:.2f} s, so {section.time_budget} are {steps} steps"))
    return config.model_copy(update={"finetune": section.model_copy(update={"steps": steps})})


# --------------------------------------------------------------------------------------------------- who learns of whom


@dataclass(frozen=True, eq=False)
class _Pupil:
    """The quantized network, and what it is taught with."""

    network: nn.Module
    data: Distillation

    def parameters(self) -> dict[str, nn.Parameter]:
        """Codebooks, scales, norms and biases of the blocks, by path."""
        blocks = find_blocks(self.network)
        return {
            name: parameter
            for prefix, block in zip(blocks.paths, blocks.modules, strict=True)
            for name, parameter in tuned_parameters(block, prefix).items()
        }

    def save(self, start: Artifact, directory: Path) -> None:
        """A file for each that `start` has."""
        blocks = find_blocks(self.network)
        for index, (prefix, block) in enumerate(zip(blocks.paths, blocks.modules, strict=True)):
            name = block_file(index)
            if name not in block_files(start):
                continue
            round_to_16_bits(block)
            kinds = matrix_kinds(start, name)
            save_block(
                directory / name,
                prefix,
                block,
                {path: read_matrix(start, name, path, kind) for path, kind in kinds.items()},
            )


def _load(config: RunConfig, source: ModelSource, start: Artifact, calibration: Artifact) -> _Pupil:
    device = torch.device(config.device)
    dtype = compute_dtype(device)
    text, held_out = _text(config, source, calibration)
    student, teacher = load_network(source, torch.float32, device), load_network(source, dtype, device)
    blocks = find_blocks(student)
    for index, (prefix, block) in enumerate(zip(blocks.paths, blocks.modules, strict=True)):
        restore_block(start, index, prefix, block)
    head = teacher.get_output_embeddings()
    assert isinstance(head, nn.Linear)  # or it would not be a causal language model
    _refuse_other_heads(teacher, head.weight, text[:1, :8].to(device))
    data = Distillation(_states(student), _states(teacher), head.weight.detach(), text, held_out, dtype, device)
    return _Pupil(student, data)


def _text(config: RunConfig, source: ModelSource, calibration: Artifact) -> tuple[Tensor, Tensor]:
    """Token ids `[windows, L]` to learn from, and those to judge by, mixed so that both hold text of all sources."""
    section, length = config.finetune, config.finetune.sequence_length
    if section.data is None:
        with calibration.reading("windows.safetensors") as file:
            tokens = load_tensors(file)["ids"].long().flatten()
        ids = tokens[: len(tokens) // length * length].view(-1, length)
    else:
        ids = calibration_windows(section.data, section.sequences, length, config.seed, load_tokenizer(source)).ids
    ids = ids[torch.randperm(len(ids), generator=generator(config.seed, STAGE))]
    if len(ids) <= section.held_out:
        raise DataError(f"there are {len(ids)} windows of text, and {section.held_out} are held out; add text")
    return ids[section.held_out :], ids[: section.held_out]


def _states(network: nn.Module) -> States:
    body: Any = network.base_model

    def enter_head(ids: Tensor) -> Tensor:
        found: Tensor = body(input_ids=ids, use_cache=False).last_hidden_state
        return found

    return enter_head


@torch.no_grad()
def _refuse_other_heads(network: nn.Module, head: Tensor, ids: Tensor) -> None:
    """Some families scale or bound their logits after the head."""
    logits, product = network(input_ids=ids, use_cache=False).logits, _states(network)(ids) @ head.T
    if not torch.allclose(logits.float(), product.float(), rtol=0.02, atol=0.02 * float(logits.abs().max())):
        raise ModelError("the model's logits are not its head's product, which finetune does not know yet")


def _train(config: RunConfig, pupil: _Pupil, stage: Stage, emit: Emit) -> Training:
    section, state = config.finetune, stage.work / STATE
    training = begin(pupil.parameters())
    if state.exists():
        training.restore(load_tensors(state), json.loads(read_metadata(state)["facts"]))
        emit(Noted(f"{stage.directory} holds {training.step} of {section.steps} steps, going on after them"))
    emit(StageStarted(STAGE, section.steps, "step", done=training.step))
    clock = time.monotonic()

    def stepped(now: Training, kl: float) -> None:
        nonlocal clock
        now.seconds, clock = now.seconds + time.monotonic() - clock, time.monotonic()
        tokens = section.batch * section.sequence_length * now.step / now.seconds
        detail = f"KL {kl:.4f}, held out {now.curve[-1]['held_out']:.4f}, {tokens:.0f} tokens/s"
        if now.step % section.keep_every == 0:
            save_tensors(state, now.tensors(), {"facts": json.dumps(now.facts())})
        emit(Advanced(STAGE, now.step, detail))

    train(pupil.data, training, section, config.seed, stepped)
    return training
