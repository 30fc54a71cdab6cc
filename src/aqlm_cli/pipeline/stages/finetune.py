"""`aqlm finetune`: distillation of the base model into the whole quantized model.

Block-wise fitting never sees what an error does further on. Here the logits of the quantized model are brought towards
those of the base model on the same text (training/distill.py). Everything that is no matrix is trained, codes and
embeddings only on demand. The result has the layout of `quantized/` and replaces it for every later stage.

Under torchrun every process runs the same function, so that their collective calls cannot get out of step. Rank 0
alone decides, writes and reports.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
from aqlm_cli.quantization.student import Student, Text, load_student
from aqlm_cli.quantization.training.budget import steps_within
from aqlm_cli.quantization.training.distill import Training, train
from aqlm_cli.quantization.training.distributed import World
from aqlm_cli.runs.artifact import Artifact, Stage
from aqlm_cli.runs.directory import RunDirectory
from aqlm_cli.runs.files import disk_bytes, load_tensors, read_metadata, save_tensors
from aqlm_cli.runs.stages import FINETUNE, QUANTIZE, START, StageKey
from aqlm_cli.seeds import generator
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.finetune import FinetuneConfig
from aqlm_cli.spec.units import parse_duration

STATE = "training.safetensors"
"""File in `work/` from which an interrupted training resumes."""


def finetune(job: Job, world: World) -> FinetuneReport | None:
    """Write `finetuned/` from the run's `quantized/`, or reuse one that was made with the same settings.

    Every process of the world calls this; all but rank 0 return None.
    """
    config, emit = job.config, job.emit if world.is_rank_zero else silent
    inputs = _read_inputs(job) if world.is_rank_zero else None  # the others wait until they exist
    decision = world.from_rank_zero(lambda: _decide(inputs, world))
    inputs = inputs or _read_inputs(job)
    if decision["finished"]:
        return _reuse(inputs.run, emit) if world.is_rank_zero else None
    reset_peak_memory()
    section = inputs.config.finetune
    text = _read_text(inputs, emit)
    student = load_student(inputs.source, inputs.start, section, text, torch.device(config.device), world)
    training = student.begin(section)
    steps = decision["steps"]
    if steps is None:
        steps = steps_within(parse_duration(str(section.time_budget)), student.data, training, section, config.seed)
        emit(Noted(f"time budget {section.time_budget} = {steps} steps"))
    section = section.model_copy(update={"steps": steps})
    with _open_stage(inputs, section, world) as stage:
        if stage is not None:
            inputs.run.keep_section(FINETUNE.name, section)
        _train(student, training, section, config.seed, stage, emit)
        after = student.data.held_out_divergence(section.micro_batch)  # as it was rounded to be stored
        if stage is None:
            return None
        student.save(stage.directory)
        made = stage.publish(_results(inputs, section, student, training, after, world))
    return _report(inputs.run, made)


# --------------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Everything that the stage reads, the same in every process.

    `bos`: each sequence begins with a beginning-of-text token.
    """

    config: RunConfig
    run: RunDirectory
    source: ModelSource
    start: Artifact
    bos: bool
    overwrite: bool

    def key(self, section: FinetuneConfig, world: World) -> StageKey:
        """The inputs of the artifact."""
        parents = {key: digest for key, digest in self.start.manifest.parents.items() if key == "calibration"}
        if not parents and section.data is None:  # the codes were imported, and the text is that of calibration
            parents["calibration"] = self.run.current("calibration").digest
        settings = {**settings_of_text(section, self.bos), "seed": self.config.seed}
        parents = {**parents, "model": self.source.identity, START: self.start.digest}
        return StageKey(FINETUNE, settings, parents, self.machine(world), self.overwrite)

    def machine(self, world: World) -> dict[str, str]:
        return {**machine_of(self.config), **world.described()}


def _read_inputs(job: Job) -> _Inputs:
    run, section = job.run, job.config.finetune
    start, source = run.own(QUANTIZE), job.base_model(run)
    if start is None:
        raise ArtifactError(f"{run.path} has no complete quantized/; make it with `aqlm quantize`")
    run.refuse_outdated(start)
    if section.bos is not None:
        bos = section.bos
    elif section.data is None:
        bos = _calibration_has_bos(run)
    else:
        bos = bool(opening_tokens(load_tokenizer(source), None))
    return _Inputs(job.config, run, source, start, bos, job.overwrite)


def _calibration_has_bos(run: RunDirectory) -> bool:
    return bool(run.current("calibration").manifest.settings.get("bos"))


def _decide(inputs: _Inputs | None, world: World) -> dict[str, Any]:
    """Find a finished artifact, or the number of steps; None: the time budget has to be turned into one."""
    assert inputs is not None
    run, section = inputs.run, inputs.config.finetune
    if section.batch % world.size:
        raise UsageError(f"--batch {section.batch} is not the same for each of {world.size} processes")
    steps: int | None = section.steps
    if section.time_budget is not None:
        # Once begun, a run keeps the number that its time budget came to.
        begun_with = dict(run.known_settings(FINETUNE, inputs.overwrite))
        asked = {**settings_of_text(section, inputs.bos), "seed": inputs.config.seed}
        steps = begun_with.get("steps")
        steps = steps if isinstance(steps, int) and {**asked, "steps": steps} == begun_with else None
    if steps is not None:
        section = section.model_copy(update={"steps": steps})
    key = inputs.key(section, world)
    finished = run.reusable(key) is not None
    if not finished:
        run.resumes(key)  # refuses before anything is loaded
    return {"finished": finished, "steps": steps}


def _read_text(inputs: _Inputs, emit: Emit) -> Text:
    """Token ids to learn from and to validate with, shuffled so that both hold text of all sources."""
    config, run, source = inputs.config, inputs.run, inputs.source
    section, length = config.finetune, config.finetune.sequence_length
    if section.data is None and section.sequences is not None:
        raise UsageError("--sequences counts sequences of --data; give that, too")
    tokenizer = load_tokenizer(source)
    opening = opening_tokens(tokenizer, inputs.bos)
    if section.data is None:
        before = opening_tokens(tokenizer, _calibration_has_bos(run))
        ids = recut(_token_ids(run, "calibration"), length, before, opening)
    else:
        sampled = _token_ids(run, "text") if sampled_sequences(section.data, section.sequences) else None
        ids = calibration_sequences(
            section.data, section.sequences, length, config.seed, tokenizer, sampled, opening=opening, emit=emit
        ).ids
        refuse_unknown_tokens(source, ids)
    ids = ids[torch.randperm(len(ids), generator=generator(config.seed, FINETUNE.name))]
    if len(ids) <= section.held_out:
        raise DataError(f"the text has {len(ids)} sequences, and {section.held_out} are held out; add text")
    return Text(training=ids[section.held_out :], held_out=ids[: section.held_out])


def _token_ids(run: RunDirectory, kind: str) -> Tensor:
    """Token ids `[sequences, L]` of an artifact of the run."""
    with run.current(kind).reading("windows.safetensors") as file:
        return load_tensors(file)["ids"].long()


# ------------------------------------------------------------------------------------------------------------- training


def _open_stage(inputs: _Inputs, section: FinetuneConfig, world: World) -> AbstractContextManager[Stage | None]:
    """The directory to write, in rank 0; None in every other process."""
    return inputs.run.resumed_stage(inputs.key(section, world)) if world.is_rank_zero else nullcontext()


def _train(
    student: Student, training: Training, section: FinetuneConfig, seed: int, stage: Stage | None, emit: Emit
) -> None:
    """Train to the last step, from the state that an interruption left if there is one; then round to 16 bits."""
    world, state = student.data.world, None if stage is None else stage.work / STATE
    found = world.from_rank_zero(lambda: {"state": str(state) if state is not None and state.exists() else None})
    if found["state"] is not None:
        _restore(training, Path(found["state"]))
        emit(Noted(f"{Path(found['state']).parents[1]} holds {training.step} of {section.steps} steps; resuming"))
    emit(StageStarted(FINETUNE.name, section.steps, "step", done=training.step))

    def stepped(now: Training, kl: float) -> None:
        tokens = section.batch * section.sequence_length * now.step / now.seconds
        if state is not None and now.step % section.save_every == 0:
            save_tensors(state, now.tensors(), {"facts": json.dumps(now.facts())})
        emit(
            Advanced(
                FINETUNE.name, now.step, f"KL {kl:.4f}, held out {now.curve[-1]['held_out']:.4f}, {tokens:.0f} tokens/s"
            )
        )

    train(student.data, training, section, seed, stepped)
    student.round()


def _restore(training: Training, state: Path) -> None:
    try:
        training.restore(load_tensors(state), json.loads(read_metadata(state)["facts"]))
    except (ArtifactError, LookupError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{state} is damaged; remove it, and training starts again") from error


# -------------------------------------------------------------------------------------------------------------- results


def _results(
    inputs: _Inputs, section: FinetuneConfig, student: Student, training: Training, after: float, world: World
) -> dict[str, Any]:
    report = {
        "steps": training.step,
        "tokens": training.step * section.batch * section.sequence_length,
        "text_tokens": student.data.training.numel(),
        "before": training.curve[0]["held_out"],
        "after": after,
        "parameters": sum(parameter.numel() for parameter in training.parameters.values()),
        "changed": training.changed,
        "seconds": training.seconds,
        "memory_bytes": peak_memory_bytes(),
        "disk_bytes": disk_bytes(inputs.run.path),
    }
    inherited = {key: inputs.start.manifest.results.get(key) for key in ("plan", "model", "layers")}
    return {**inherited, "machine": inputs.machine(world), "report": report, "curve": training.curve}


def _reuse(run: RunDirectory, emit: Emit) -> FinetuneReport:
    finished = run.own(FINETUNE)
    assert finished is not None
    emit(Noted(f"{finished.directory} exists already, made with the same settings"))
    return _report(run, finished)


def _report(run: RunDirectory, made: Artifact) -> FinetuneReport:
    """The report; writes its files too, which an interruption may have prevented."""
    results = made.manifest.results
    run.write_report("finetune.json", {**results["report"], "curve": results["curve"]})
    for kind, picture in draw_curve(results["curve"]).items():
        run.write_report(f"finetune.{kind}", picture)
    return restored(FinetuneReport, made, results["report"])
