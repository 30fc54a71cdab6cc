"""`aqlm pack`: from quantized layers and the original model to a checkpoint that others load.

`packed/` is an ordinary Hugging Face directory with a manifest beside it. It is meant to be given away, so nothing in
it tells a time, a host or a path of this machine; the same quantized model always gives the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aqlm_cli.errors import ArtifactError
from aqlm_cli.events import Noted, Warned
from aqlm_cli.export.formats import QuantizedLayer, narrowing_losses, packed_checkpoint, quantized_layers
from aqlm_cli.export.layout import WITH_CODES, Layout
from aqlm_cli.export.model_card import CardFacts, model_card
from aqlm_cli.export.writer import Entry, total_bytes, write_checkpoint
from aqlm_cli.formatting import plain, text_name
from aqlm_cli.memory import peak_memory_bytes, reset_peak_memory
from aqlm_cli.models import ModelSource, model_config, save_support_files
from aqlm_cli.pipeline.job import Job
from aqlm_cli.pipeline.stage_reports import PackReport, restored
from aqlm_cli.runs.artifact import Artifact, rebuild_command
from aqlm_cli.runs.directory import RunDirectory
from aqlm_cli.runs.files import disk_bytes, write_file
from aqlm_cli.runs.stages import PACK, StageKey
from aqlm_cli.spec.cost import Cost
from aqlm_cli.spec.plan import Plan


def pack(job: Job) -> PackReport:
    """Write `packed/` of an existing run in the format that the settings name; read it back, load it, compare.

    Raises ArtifactError where there is nothing to pack or the model is no longer the one that was quantized, and
    PlanError where the format cannot hold it.
    """
    started = time.monotonic()
    run, emit, format = job.run, job.emit, job.config.pack.format
    quantized = run.current("quantized")
    key = StageKey(PACK, {"format": format}, {"quantized": quantized.digest}, overwrite=job.overwrite)
    packed = run.reusable(key)
    if packed is not None:
        emit(Noted(f"{packed.directory} is there already, made from the same quantized model"))
        return restored(PackReport, packed.directory, packed.manifest.results)
    emit(Noted(f"packing {quantized.directory}"))
    reset_peak_memory()
    contents = _collect(job.original(run), quantized, format)
    config = contents.config(quantized)
    if losses := narrowing_losses(contents.layers, contents.layout):
        path, loss = max(losses.items(), key=lambda entry: entry[1])
        emit(
            Warned(
                f"{path} has rows so small that float16 loses {loss:.2g} of one's energy, beside the error of its"
                f" codes ({len(losses)} such layers); use a bfloat16 copy of the model"
            )
        )
    with run.stage(key) as stage:
        write_checkpoint(stage.directory, contents.entries)
        save_support_files(contents.source, stage.directory)
        write_file(stage.directory / "config.json", json.dumps(config, indent=2, sort_keys=True).encode())
        _refuse_what_does_not_load(contents, stage.directory, format)
        write_file(stage.directory / "README.md", model_card(_card_facts(run, quantized, contents)).encode())
        packed = stage.publish(contents.results())
    # Told, and not kept: the same quantized model gives the same manifest, too.
    taken = Cost(time.monotonic() - started, peak_memory_bytes(), disk_bytes(run.path))
    planned = plain(job.planned.get(PACK.name))
    return restored(PackReport, packed.directory, {**packed.manifest.results, **plain(taken), "planned": planned})


@dataclass(frozen=True)
class Contents:
    """All that goes into a checkpoint, known before any of it is written."""

    source: ModelSource
    plan: Plan
    layers: Sequence[QuantizedLayer]
    layout: Layout
    entries: Mapping[str, Entry]

    def scheme(self) -> str:
        return ", ".join(sorted({str(target.scheme) for target in self.plan.quantized}))

    def stored_bits(self) -> float:
        """Bits in these files of one weight of a quantized layer."""
        replaced = {layer.path for layer in self.layers}
        slots = [(slot.layout.bytes, (slot.parameter or "").rpartition(".")) for slot in self.layout.slots.values()]
        bytes = sum(size for size, (path, _, last) in slots if path in replaced and last != "bias")
        return 8 * bytes / sum(target.weights for target in self.plan.quantized)

    def results(self) -> dict[str, Any]:
        return {
            "format": "dense" if self.layout.quantization is None else WITH_CODES,
            "scheme": self.scheme(),
            "nominal_bits": self.plan.stored_bits,
            "stored_bits": self.stored_bits(),
            "bytes": total_bytes(self.entries),
            "layers": len(self.layers),
        }

    def config(self, quantized: Artifact) -> dict[str, Any]:
        """config.json of the original, in 16 bits, with the description of the codes and a key of our own."""
        # transformers 4 wrote down where the original lay.
        config = {key: value for key, value in model_config(self.source).items() if key != "_name_or_path"}
        for key in ("dtype", "torch_dtype"):  # transformers 5 and 4
            if config.get(key) == "float32":
                config[key] = "float16"
        config["aqlm_cli"] = {
            "model": self.source.identity,
            "quantized": quantized.digest,
            "bits": {
                target.path: target.scheme.bits_per_weight(target.out_features, target.in_features)
                for target in self.plan.quantized
                if target.scheme is not None
            },
        }
        if self.layout.quantization is not None:
            config["quantization_config"] = self.layout.quantization
        return config


def _collect(source: ModelSource, quantized: Artifact, format: str) -> Contents:
    layers = quantized_layers(quantized, format)
    plan = Plan.from_json(quantized.manifest.results["plan"])
    if {layer.path for layer in layers} != {target.path for target in plan.quantized}:
        way_out = rebuild_command(quantized.directory, "quantized")
        raise ArtifactError(f"{quantized.directory} is damaged (its files hold other layers than its plan); {way_out}")
    layout, entries = packed_checkpoint(source, quantized, layers, plan.schemes, format)
    return Contents(source, plan, layers, layout, entries)


def _refuse_what_does_not_load(contents: Contents, directory: Path, format: str) -> None:
    from aqlm_cli.models.trial import disagreement  # takes seconds to import, as a network does

    reason = disagreement(replace(contents.source, name=str(directory), directory=directory, cached_identity=None))
    if reason is not None:
        way_out = "use --format dense" if contents.layout.quantization else "the model cannot be packed"
        raise ArtifactError(f"{directory} is not published in the format {format}: {reason}; {way_out}")


def _card_facts(run: RunDirectory, quantized: Artifact, contents: Contents) -> CardFacts:
    results = contents.results()
    return CardFacts(
        short_name=contents.source.short_name,
        base_model=contents.source.base_model,
        licence=contents.source.licence,
        method=run.config.quantize.method,
        scheme=results["scheme"],
        nominal_bits=results["nominal_bits"],
        stored_bits=results["stored_bits"],
        bytes=results["bytes"],
        layers=results["layers"],
        data=_calibration_text(run),
        needs_package=contents.layout.quantization is not None,
        perplexities=_perplexities(run, quantized),
    )


def _calibration_text(run: RunDirectory) -> str:
    if run.config.quantize.import_from is not None:
        return "not known: the codes are those of another checkpoint"
    return ", ".join(text_name(source) for source in run.config.calibrate.data.split(","))


def _perplexities(run: RunDirectory, quantized: Artifact) -> list[dict[str, Any]]:
    """Reports of `eval-ppl` on this quantized model; those on an earlier one of the run are left out."""
    reports = [run.read_report(path.name) for path in sorted(run.reports.glob("eval-ppl-*.json"))]
    return [report for report in reports if report["quantized"] == quantized.digest]
