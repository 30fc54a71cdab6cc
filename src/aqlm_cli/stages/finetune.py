"""`aqlm finetune`: the quantized model as a whole, taught by the original.

Block-wise fitting never sees what an error does further on. Here the quantized model's logits are brought towards the
original's on the same text (tuning/distill.py); what can be trained in the blocks moves, the codes stay. The result has
the layout of `quantized/` and takes its place for everything that comes after.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
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
from aqlm_cli.errors import ArtifactError, DataError, ModelError, QuantizationError, UsageError
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted
from aqlm_cli.figures import draw_curve
from aqlm_cli.memory import peak_memory_bytes, reset_peak_memory
from aqlm_cli.mixture import sampled_windows
from aqlm_cli.model import ModelSource, load_network, load_tokenizer, original_of
from aqlm_cli.propagation import machine_of
from aqlm_cli.quantized import block_file, matrix_kinds, read_matrix, restore_block, save_block
from aqlm_cli.runs import START, RunDirectory, read_run
from aqlm_cli.seeds import generator
from aqlm_cli.stage_reports import FinetuneReport, restored
from aqlm_cli.storage import disk_bytes, load_tensors, read_metadata, save_tensors
from aqlm_cli.tuning.block import round_to_16_bits, tuned_parameters
from aqlm_cli.tuning.descent import put_back
from aqlm_cli.tuning.distill import Distillation, States, Training, begin, one_step, train
from aqlm_cli.units import parse_duration

STAGE = "finetune"

STATE = "training.safetensors"
"""In `work/`: everything that an interrupted training goes on from."""

TIMED_STEPS = 3


def finetune(config: RunConfig, run_directory: Path, overwrite: bool, emit: Emit) -> FinetuneReport:
    """Write `finetuned/` from the run's `quantized/`, or reuse one that was made with the same settings."""
    run, machine = read_run(run_directory), machine_of(config)
    start, source = run.own("quantized", "quantized"), original_of(run)
    if start is None:
        raise ArtifactError(f"{run_directory} has no complete quantized/; make it with `aqlm quantize`")
    run.refuse_outdated(start)
    config, timed = _with_known_steps(config, run.known_settings("finetuned", overwrite))
    found = run.reusable("finetuned", "quantized", *_made_with(config, source, start), overwrite)
    if found is not None:
        emit(Noted(f"{found.directory} is there already, made with the same settings"))
        return _reported(run, found)
    run.goes_on("finetuned", *_made_with(config, source, start), machine, overwrite)  # or is refused before it loads
    reset_peak_memory()
    pupil = _load(config, source, start, run)
    if not timed:
        config = _with_steps(config, pupil, emit)
    with run.resumed_stage("finetuned", "quantized", *_made_with(config, source, start), machine, overwrite) as stage:
        run.keep_finetune_settings(config.finetune)
        training = _train(config, pupil, stage, emit)
        pupil.save(stage.directory)
        report = {
            "steps": training.step,
            "tokens": training.step * config.finetune.batch * config.finetune.sequence_length,
            "text_tokens": pupil.data.training.numel(),
            "before": training.curve[0]["held_out"],
            "after": pupil.data.held_out_divergence(config.finetune.windows_at_once),  # as it was rounded to be stored
            "parameters": sum(parameter.numel() for parameter in training.parameters.values()),
            "seconds": training.seconds,
            "memory_bytes": peak_memory_bytes(),
            "disk_bytes": disk_bytes(run.path),
        }
        kept = {key: start.manifest.results.get(key) for key in ("plan", "model", "layers")}
        made = stage.publish({**kept, "machine": machine, "report": report, "curve": training.curve})
    return _reported(run, made)


def _made_with(config: RunConfig, source: ModelSource, start: Artifact) -> tuple[dict[str, object], dict[str, str]]:
    settings = {**config.finetune.model_dump(mode="json"), "seed": config.seed}
    parents = {kind: start.manifest.parents[kind] for kind in ("calibration",) if kind in start.manifest.parents}
    return settings, {**parents, "model": source.identity, START: start.digest}


def _reported(run: RunDirectory, made: Artifact) -> FinetuneReport:
    """The report; its files too, which an interruption may have come before."""
    results = made.manifest.results
    run.write_report("finetune.json", {**results["report"], "curve": results["curve"]})
    for kind, picture in draw_curve(results["curve"]).items():
        run.write_report(f"finetune.{kind}", picture)
    return restored(FinetuneReport, made.directory, results["report"])


# ------------------------------------------------------------------------------------------------------------- settings


def _with_known_steps(config: RunConfig, known: Mapping[str, Any]) -> tuple[RunConfig, bool]:
    """With the steps that the time budget came to when this was begun; whether no steps have to be timed for that."""
    section = config.finetune
    if section.time_budget is None:
        return config, True
    asked = {**section.model_dump(mode="json"), "seed": config.seed}
    steps = known.get("steps")
    if not isinstance(steps, int) or {**asked, "steps": steps} != dict(known):
        return config, False
    return config.model_copy(update={"finetune": section.model_copy(update={"steps": steps})}), True


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
    put_back(training.parameters, training.kept)
    steps = max(1, int(budget / (step + judged)))
    emit(Noted(f"a step takes {step:.2f} s, so {section.time_budget} are {steps} steps"))
    return config.model_copy(update={"finetune": section.model_copy(update={"steps": steps})})


# --------------------------------------------------------------------------------------------------- who learns of whom


@dataclass(frozen=True, eq=False)
class _Pupil:
    """The quantized network, and what it is taught with."""

    start: Artifact
    blocks: Mapping[str, tuple[str, nn.Module]]  # those in which anything is quantized, by the file of each
    data: Distillation

    def parameters(self) -> dict[str, nn.Parameter]:
        """Codebooks, scales, norms and biases of these blocks, by path."""
        found: dict[str, nn.Parameter] = {}
        for prefix, block in self.blocks.values():
            found |= tuned_parameters(block, prefix)
        if not found:
            raise QuantizationError("the model has no codebooks, norms or biases to be trained")
        return found

    def save(self, directory: Path) -> None:
        for name, (prefix, block) in self.blocks.items():
            round_to_16_bits(block)
            kinds = matrix_kinds(self.start, name)
            matrices = {path: read_matrix(self.start, name, path, kind) for path, kind in kinds.items()}
            save_block(directory / name, prefix, block, matrices)


def _load(config: RunConfig, source: ModelSource, start: Artifact, run: RunDirectory) -> _Pupil:
    device = torch.device(config.device)
    dtype = compute_dtype(device)
    text, held_out = _text(config, source, run)
    student, teacher = load_network(source, torch.float32, device), load_network(source, dtype, device)
    found, blocks = find_blocks(student), {}
    for index, (prefix, block) in enumerate(zip(found.paths, found.modules, strict=True)):
        if block_file(index) in start.manifest.files:
            restore_block(start, index, prefix, block)
            blocks[block_file(index)] = (prefix, block)
    head = _head(teacher, text[:1, :8].to(device))
    data = Distillation(_states(student), _states(teacher), head, text, held_out, dtype, device)
    return _Pupil(start, blocks, data)


def _text(config: RunConfig, source: ModelSource, run: RunDirectory) -> tuple[Tensor, Tensor]:
    """Token ids `[windows, L]` to learn from, and those to judge by, mixed so that both hold text of all sources."""
    section, length = config.finetune, config.finetune.sequence_length
    if section.data is None and section.sequences is not None:
        raise UsageError("--sequences counts windows of --data; give that, too")
    if section.data is None:
        tokens = _stored(run, "calibration").flatten()
        ids = tokens[: len(tokens) // length * length].view(-1, length)
    else:
        sampled = _stored(run, "text") if sampled_windows(section.data, section.sequences) else None
        tokenizer = load_tokenizer(source)
        ids = calibration_windows(section.data, section.sequences, length, config.seed, tokenizer, sampled).ids
    ids = ids[torch.randperm(len(ids), generator=generator(config.seed, STAGE))]
    if len(ids) <= section.held_out:
        raise DataError(f"there are {len(ids)} windows of text, and {section.held_out} are held out; add text")
    return ids[section.held_out :], ids[: section.held_out]


def _stored(run: RunDirectory, kind: str) -> Tensor:
    """Token ids `[windows, L]` of an artifact of the run."""
    with run.current(kind).reading("windows.safetensors") as file:
        return load_tensors(file)["ids"].long()


def _states(network: nn.Module) -> States:
    body: Any = network.base_model

    def enter_head(ids: Tensor) -> Tensor:
        found: Tensor = body(input_ids=ids, use_cache=False).last_hidden_state
        return found

    return enter_head


@torch.no_grad()
def _head(network: nn.Module, ids: Tensor) -> Tensor:
    """The weight `[vocabulary, d]` by which hidden states become logits.

    Raises ModelError where there is more to it: some families scale or bound their logits after the head.
    """
    model: Any = network
    head, seen = model.get_output_embeddings(), list[Tensor]()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ModelError("the model's head is no plain matrix, which finetune does not know yet")
    hook = head.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    logits = model(input_ids=ids, use_cache=False).logits
    hook.remove()
    if not (seen and torch.equal(logits, seen[1]) and torch.equal(_states(network)(ids), seen[0])):
        raise ModelError("the model's logits are not its head's product, which finetune does not know yet")
    return head.weight.detach()


def _train(config: RunConfig, pupil: _Pupil, stage: Stage, emit: Emit) -> Training:
    section, state = config.finetune, stage.work / STATE
    training = begin(pupil.parameters())
    if state.exists():
        try:
            training.restore(load_tensors(state), json.loads(read_metadata(state)["facts"]))
        except (ArtifactError, LookupError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"{state} is damaged; remove it, and training begins anew") from error
        emit(Noted(f"{stage.directory} holds {training.step} of {section.steps} steps, going on after them"))
    emit(StageStarted(STAGE, section.steps, "step", done=training.step))

    def stepped(now: Training, kl: float) -> None:
        tokens = section.batch * section.sequence_length * now.step / now.seconds
        detail = f"KL {kl:.4f}, held out {now.curve[-1]['held_out']:.4f}, {tokens:.0f} tokens/s"
        if now.step % section.keep_every == 0:
            save_tensors(state, now.tensors(), {"facts": json.dumps(now.facts())})
        emit(Advanced(STAGE, now.step, detail))

    train(pupil.data, training, section, config.seed, stepped)
    return training
