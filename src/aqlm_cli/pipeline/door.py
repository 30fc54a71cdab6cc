"""The Python functions of the package: `quantize`, `open_run`, `load`, and the `Run` that they give.

    import aqlm_cli

    run = aqlm_cli.quantize("smollm2-135m", bits=2, data="builtin:80")
    print(run.evaluate().ratio)
    model, tokenizer = aqlm_cli.load(run.path)

Keywords are the flags of the commands of the same names; None means that a flag was not given. The commands call the
same stages, so both write the same bytes. Errors are `AqlmError`, with the line that the command would print.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aqlm_cli.arguments import checked
from aqlm_cli.errors import UsageError, shortened
from aqlm_cli.evaluation import PerplexityReport
from aqlm_cli.events import Emit, silent
from aqlm_cli.models import Network, load_network, load_tokenizer, resolve
from aqlm_cli.models.hidden_states import compute_dtype
from aqlm_cli.pipeline import evaluations, order
from aqlm_cli.records import Record
from aqlm_cli.runs.directory import read_run
from aqlm_cli.spec import flags as tables
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.flags import as_settings
from aqlm_cli.spec.run_file import build_config

Tokenizer = Any
"""A tokenizer of transformers."""


@dataclass(frozen=True)
class Run:
    """A run directory: one base model, quantized. `quantize` and `open_run` make it."""

    path: Path

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path):
            raise UsageError(f"Run: `path` takes str | Path, not {shortened(repr(self.path))}")
        object.__setattr__(self, "path", Path(self.path))

    @property
    def config(self) -> RunConfig:
        """The complete settings of the run, from its run.yaml."""
        return read_run(self.path).config

    @checked
    def evaluate(
        self,
        data: str | None = None,
        *,
        sequence_length: int | None = None,
        bos: bool | None = None,
        sequences: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        emit: Emit | None = None,
    ) -> PerplexityReport:
        """Perplexity on a text, beside the base model's on the same sequences. `ratio` compares the two.

        `data` None: the first text of the run file. A run that is not packed is packed first. Raises DataError for a
        text that is missing or too short.
        """
        flags = dict(locals())
        settings = order.settings_of_run(
            self.path, as_settings({**flags, "data": None if data is None else [data]}, tables.EVAL_PPL)
        )
        section = settings.eval_ppl.model_copy(update={"data": settings.eval_ppl.data[:1]})
        order.use_machine(settings)
        reports = evaluations.measure(
            str(self.path), settings.model_copy(update={"eval_ppl": section}), sequences, emit or silent
        )
        (report,) = reports.values()
        assert isinstance(report, PerplexityReport)
        return report

    @checked
    def finetune(
        self,
        *,
        out: str | Path | None = None,
        data: str | None = None,
        sequences: int | None = None,
        sequence_length: int | None = None,
        bos: bool | None = None,
        steps: int | None = None,
        time_budget: str | None = None,
        batch: int | None = None,
        learning_rate: float | None = None,
        codes: float | None = None,
        embeddings: bool | None = None,
        preset: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        overwrite: bool = False,
        emit: Emit | None = None,
    ) -> Run:
        """Train the quantized model on the logits of its base model, and pack it again; the size stays the same.

        With `out` a new run begins with the codes of this one, which stays as it is. Returns the run that was trained.
        Raises UsageError where both `steps` and `time_budget` are given, and DataError for too little text.
        """
        asked = as_settings(dict(locals()), tables.FINETUNE)
        place = None if out is None else Path(out)
        settings, directory = order.settings_to_finetune(str(self.path), None, place, asked, preset)
        order.use_machine(settings)
        job = order.make_job(settings, directory, overwrite=overwrite, emit=emit or silent)
        order.finetune_run(str(self.path), job)
        return Run(directory)

    @checked
    def pack(self, format: str | None = None, *, overwrite: bool = False, emit: Emit | None = None) -> Record:
        """Write `packed/`, a checkpoint for others; `directory` of the record returned is where.

        `format` None: the one of the run file. Raises ArtifactError where another format is packed already and
        `overwrite` is not given, and PlanError where the format cannot hold the model.
        """
        settings = order.settings_of_run(self.path, as_settings({"format": format}, tables.QUANTIZE))
        return order.pack_run(order.make_job(settings, self.path, overwrite=overwrite, emit=emit or silent))


@checked
def quantize(
    model: str | Path | None = None,
    *,
    bits: float | None = None,
    scheme: str | None = None,
    method: str | None = None,
    embeddings: str | None = None,
    head: str | None = None,
    layer: list[str] | tuple[str, ...] | None = None,
    target_size: str | None = None,
    target_bits: float | None = None,
    target: str | None = None,
    target_speed: float | None = None,
    among: str | None = None,
    skip: list[str] | tuple[str, ...] | None = None,
    only: list[str] | tuple[str, ...] | None = None,
    format: str | None = None,
    data: str | None = None,
    sequences: int | None = None,
    sequence_length: int | None = None,
    bos: bool | None = None,
    seed: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
    device: str | None = None,
    threads: int | None = None,
    max_memory: str | None = None,
    max_disk: str | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    emit: Emit | None = None,
) -> Run:
    """Quantize the linear layers of a model and pack the result, as `aqlm quantize` does.

    `model` is a hub id, a directory, a .gguf file or `smollm2-135m`; it may stand in the run file `config` instead.
    `out` None: runs/NAME-BITS. Finished work with the same settings is reused, interrupted work resumes. `emit` is
    called with every event; None: nothing is told.

    Raises UsageError and ConfigError for settings that cannot be used, ModelError for a model that is missing or
    damaged, PlanError where nothing is left to quantize or a limit cannot be kept, and ArtifactError where the run
    exists with other settings and `overwrite` is not given.
    """
    flags = as_settings({**locals(), "model": None if model is None else str(model)}, tables.QUANTIZE)
    settings = build_config(preset, None if config is None else Path(config), flags)
    order.use_machine(settings)
    place = None if out is None else Path(out)
    job, _ = order.prepare(order.make_job(settings, place, overwrite=overwrite, emit=emit or silent))
    order.quantize_and_pack(job)
    return Run(job.directory)


@checked
def open_run(path: str | Path) -> Run:
    """The existing run in this directory. ArtifactError where there is none."""
    return Run(read_run(Path(path)).path)


@checked
def load(
    path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
) -> tuple[Network, Tokenizer]:
    """The network and the tokenizer of a model, ready for `model.generate`; a run stands for what it has packed.

    `path` is a run, a hub id, a directory, a .gguf file, or an AQLM checkpoint made by anyone. Quantized layers stay
    quantized. `dtype` None: bfloat16 where the device multiplies in it, else float32. The network is in evaluation
    mode, without gradients. Raises UsageError for a device that this machine does not have, ModelError for a model that
    is missing or damaged, ArtifactError for a run that is not packed.
    """
    place = order.find_device(build_config(None, None, {"model": str(path), "device": device}).device)
    source = resolve(str(path), revision, trust_remote_code)
    return load_network(source, _dtype(dtype, place), place), load_tokenizer(source)


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    dtype = compute_dtype(device) if name is None else getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"dtype {name!r} is no floating-point type of torch; choose float32, bfloat16 or float16")
    return dtype
