"""`aqlm finetune`: the quantized model as a whole, taught by the original.

Block-wise fitting never sees what an error does further on. Here the quantized model's logits are brought towards the
original's on the same text (tuning/distill.py); whatever is no matrix moves, and codes and embeddings do if
they are asked to. The result has the layout of `quantized/` and takes its place for everything that comes after.

Under torchrun every process runs this (distributed.py): rank 0 decides, writes and reports, the others `follow`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aqlm_cli.data.sequences import calibration_sequences, opening_tokens, recut, settings_of_text
from aqlm_cli.data.spec import sampled_sequences
from aqlm_cli.errors import ArtifactError, DataError, UsageError
from aqlm_cli.evaluation.plots import draw_curve
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted, silent
from aqlm_cli.memory import peak_memory_bytes, reset_peak_memory
from aqlm_cli.models import ModelSource, load_tokenizer, refuse_unknown_tokens
from aqlm_cli.pipeline.job import Job
from aqlm_cli.pipeline.stage_reports import FinetuneReport, restored
from aqlm_cli.quantization.block_inputs import machine_of
from aqlm_cli.quantization.student import Student, load_student
from aqlm_cli.quantization.training.distill import Training, one_step, train
from aqlm_cli.quantization.training.distributed import World
from aqlm_cli.runs.artifact import Artifact, Stage
from aqlm_cli.runs.directory import RunDirectory, read_run
from aqlm_cli.runs.files import disk_bytes, load_tensors, read_metadata, save_tensors
from aqlm_cli.runs.stages import FINETUNE, QUANTIZE, START, StageKey
from aqlm_cli.seeds import generator
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.units import parse_duration

STATE = "training.safetensors"
"""In `work/`: everything that an interrupted training goes on from."""

TIMED_STEPS = 3


def finetune(job: Job, world: World) -> FinetuneReport:
    """Write `finetuned/` from the run's `quantized/`, or reuse one that was made with the same settings."""
    config, emit, run, overwrite = job.config, job.emit, job.run, job.overwrite
    machine = {**machine_of(config), **world.described()}
    start, source = run.own(QUANTIZE), job.original(run)
    if start is None:
        raise ArtifactError(f"{run.path} has no complete quantized/; make it with `aqlm quantize`")
    run.refuse_outdated(start)
    if config.finetune.batch % world.size:
        raise UsageError(f"--batch {config.finetune.batch} is not the same for each of {world.size} processes")
    bos = _begins(config, source, run)
    config, timed = _with_known_steps(config, bos, run.known_settings(FINETUNE, overwrite))
    found = run.reusable(_key(config, bos, source, start, machine, overwrite))
    if found is not None:
        world.broadcast({"goes_on": False})
        emit(Noted(f"{found.directory} exists already, made with the same settings"))
        return _reported(run, found)
    run.resumes(_key(config, bos, source, start, machine, overwrite))  # or is refused before it loads
    world.broadcast({"goes_on": True, "timed": timed, "steps": config.finetune.steps})
    reset_peak_memory()
    student = _load(config, source, start, run, world, emit)
    training = student.begin(config.finetune)
    if not timed:
        config = _with_steps(config, student, training)
        emit(Noted(f"{config.finetune.time_budget} are {config.finetune.steps} steps"))
    with run.resumed_stage(_key(config, bos, source, start, machine, overwrite)) as stage:
        run.keep_section("finetune", config.finetune)
        _train(config, student, training, stage, emit)
        student.save(stage.directory)
        report = {
            "steps": training.step,
            "tokens": training.step * config.finetune.batch * config.finetune.sequence_length,
            "text_tokens": student.data.training.numel(),
            "before": training.curve[0]["held_out"],
            "after": student.data.held_out_divergence(config.finetune.micro_batch),  # as it was rounded to be stored
            "parameters": sum(parameter.numel() for parameter in training.parameters.values()),
            "changed": training.changed,
            "seconds": training.seconds,
            "memory_bytes": peak_memory_bytes(),
            "disk_bytes": disk_bytes(run.path),
        }
        kept = {key: start.manifest.results.get(key) for key in ("plan", "model", "layers")}
        made = stage.publish({**kept, "machine": machine, "report": report, "curve": training.curve})
    return _reported(run, made)


def follow(job: Job, world: World) -> None:
    """`finetune` in any process but the first: the same steps on windows of its own."""
    begun = world.broadcast(None)
    if not begun["goes_on"]:
        return
    run = job.run
    start = run.own(QUANTIZE)
    assert start is not None
    config = _of_steps(job.config, begun["steps"])
    student = _load(config, job.original(run), start, run, world, silent)
    training = student.begin(config.finetune)
    if not begun["timed"]:
        config = _with_steps(config, student, training)
    state = world.broadcast(None)["state"]
    if state is not None:
        _restore(training, Path(state))
    train(student.data, training, config.finetune, config.seed, lambda *_: None)
    student.round()
    student.data.held_out_divergence(config.finetune.micro_batch)


def _key(
    config: RunConfig, bos: bool, source: ModelSource, start: Artifact, machine: Mapping[str, str], overwrite: bool
) -> StageKey:
    settings = {**settings_of_text(config.finetune, bos), "seed": config.seed}
    parents = {kind: start.manifest.parents[kind] for kind in ("calibration",) if kind in start.manifest.parents}
    if not parents and config.finetune.data is None:  # the codes were found elsewhere, but this text is learnt from
        parents["calibration"] = read_run(start.directory.parent).current("calibration").digest
    return StageKey(FINETUNE, settings, {**parents, "model": source.identity, START: start.digest}, machine, overwrite)


def _reported(run: RunDirectory, made: Artifact) -> FinetuneReport:
    """The report; its files too, which an interruption may have come before."""
    results = made.manifest.results
    run.write_report("finetune.json", {**results["report"], "curve": results["curve"]})
    for kind, picture in draw_curve(results["curve"]).items():
        run.write_report(f"finetune.{kind}", picture)
    return restored(FinetuneReport, made.directory, results["report"])


# ------------------------------------------------------------------------------------------------------------- settings


def _begins(config: RunConfig, source: ModelSource, run: RunDirectory) -> bool:
    """Whether the windows begin with a beginning token; those of calibration go on as they are."""
    section = config.finetune
    if section.bos is not None:
        return section.bos
    if section.data is None:
        return _bos_of(run.current("calibration"))
    return bool(opening_tokens(load_tokenizer(source), None))


def _bos_of(calibration: Artifact) -> bool:
    return bool(calibration.manifest.settings.get("bos"))


def _with_known_steps(config: RunConfig, bos: bool, known: Mapping[str, Any]) -> tuple[RunConfig, bool]:
    """With the steps that the time budget came to when this was begun; whether no steps have to be timed for that."""
    section = config.finetune
    if section.time_budget is None:
        return config, True
    asked = {**settings_of_text(section, bos), "seed": config.seed}
    steps = known.get("steps")
    if not isinstance(steps, int) or {**asked, "steps": steps} != dict(known):
        return config, False
    return _of_steps(config, steps), True


def _with_steps(config: RunConfig, student: Student, training: Training) -> RunConfig:
    """As many as fit in the time budget, by timing a few whose effect is undone."""
    section = config.finetune
    assert section.time_budget is not None
    budget = parse_duration(section.time_budget)
    trial = section.model_copy(update={"steps": TIMED_STEPS})
    one_step(student.data, training, trial, config.seed)  # whatever has to be compiled
    clock = time.monotonic()
    for _ in range(TIMED_STEPS - 1):
        one_step(student.data, training, trial, config.seed)
    step = (time.monotonic() - clock) / (TIMED_STEPS - 1)
    clock = time.monotonic()
    student.data.held_out_divergence(section.micro_batch)
    judged = (time.monotonic() - clock) / section.evaluate_every
    training.undo()
    world, fitting = student.data.world, {"steps": max(1, int(budget / (step + judged)))}
    return _of_steps(config, world.broadcast(fitting if world.is_rank_zero else None)["steps"])


def _of_steps(config: RunConfig, steps: int) -> RunConfig:
    return config.model_copy(update={"finetune": config.finetune.model_copy(update={"steps": steps})})


# ------------------------------------------------------------------------------------------------------------- training


def _load(
    config: RunConfig, source: ModelSource, start: Artifact, run: RunDirectory, world: World, emit: Emit
) -> Student:
    text, held_out = _text(config, source, run, emit)
    return load_student(source, start, config.finetune, text, held_out, torch.device(config.device), world)


def _text(config: RunConfig, source: ModelSource, run: RunDirectory, emit: Emit) -> tuple[Tensor, Tensor]:
    """Token ids `[windows, L]` to learn from, and those to judge by, mixed so that both hold text of all sources."""
    section, length = config.finetune, config.finetune.sequence_length
    if section.data is None and section.sequences is not None:
        raise UsageError("--sequences counts windows of --data; give that, too")
    tokenizer = load_tokenizer(source)
    opening = opening_tokens(tokenizer, _begins(config, source, run))
    if section.data is None:
        before = opening_tokens(tokenizer, _bos_of(run.current("calibration")))
        ids = recut(_stored(run, "calibration"), length, before, opening)
    else:
        sampled = _stored(run, "text") if sampled_sequences(section.data, section.sequences) else None
        ids = calibration_sequences(
            section.data, section.sequences, length, config.seed, tokenizer, sampled, opening=opening, emit=emit
        ).ids
        refuse_unknown_tokens(source, ids)
    ids = ids[torch.randperm(len(ids), generator=generator(config.seed, FINETUNE.name))]
    if len(ids) <= section.held_out:
        raise DataError(f"there are {len(ids)} windows of text, and {section.held_out} are held out; add text")
    return ids[section.held_out :], ids[: section.held_out]


def _stored(run: RunDirectory, kind: str) -> Tensor:
    """Token ids `[windows, L]` of an artifact of the run."""
    with run.current(kind).reading("windows.safetensors") as file:
        return load_tensors(file)["ids"].long()


def _train(config: RunConfig, student: Student, training: Training, stage: Stage, emit: Emit) -> None:
    section, state = config.finetune, stage.work / STATE
    student.data.world.broadcast({"state": str(state) if state.exists() else None})
    if state.exists():
        _restore(training, state)
        emit(Noted(f"{stage.directory} holds {training.step} of {section.steps} steps, going on after them"))
    emit(StageStarted(FINETUNE.name, section.steps, "step", done=training.step))

    def stepped(now: Training, kl: float) -> None:
        tokens = section.batch * section.sequence_length * now.step / now.seconds
        detail = f"KL {kl:.4f}, held out {now.curve[-1]['held_out']:.4f}, {tokens:.0f} tokens/s"
        if now.step % section.save_every == 0:
            save_tensors(state, now.tensors(), {"facts": json.dumps(now.facts())})
        emit(Advanced(FINETUNE.name, now.step, detail))

    train(student.data, training, section, config.seed, stepped)
    student.round()


def _restore(training: Training, state: Path) -> None:
    try:
        training.restore(load_tensors(state), json.loads(read_metadata(state)["facts"]))
    except (ArtifactError, LookupError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{state} is damaged; remove it, and training begins anew") from error
