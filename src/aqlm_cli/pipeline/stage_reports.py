"""Records of the stages that make an artifact: its properties, and its cost beside the planned cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from aqlm_cli.errors import ArtifactError
from aqlm_cli.formatting import both_bits, clock, facts, readable_bytes, shrinkage, some, text_name
from aqlm_cli.records import Record
from aqlm_cli.runs.artifact import Artifact, rebuild_command


def _layers(count: int, method: str, scheme: str) -> str:
    """The layers by scheme: "210, aqlm 2x8g8", or "211: 2x8g8 (210), int4g64 (1)"."""
    return f"{count}: {scheme}" if " " in scheme else f"{count}, {method} {scheme}"


@dataclass(frozen=True, kw_only=True)
class StageReport(Record):
    """The cost of the stage that made the artifact in `directory`, beside what was `planned`, if anything was.

    `memory_bytes` is the peak resident memory of the process, `disk_bytes` the peak size of the run on the disk; None
    where an existing artifact does not tell.
    """

    directory: Path
    seconds: float | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    planned: Mapping[str, float] | None = None

    def results(self) -> dict[str, Any]:
        """The fields as a manifest keeps them; `restored` is the inverse. The directory is where the manifest lies."""
        return {name: value for name, value in self.as_json().items() if name != "directory"}

    def costs(self) -> list[tuple[str, str]]:
        """Rows of a table."""
        rows: dict[str, tuple[str, Callable[[Any], str]]] = {
            "seconds": ("time", clock),
            "memory_bytes": ("peak memory", readable_bytes),
            "disk_bytes": ("peak disk", readable_bytes),
        }
        planned = self.planned or {}
        return [
            (name, words(getattr(self, key)) + (f" (planned {words(planned[key])})" if key in planned else ""))
            for key, (name, words) in rows.items()
            if getattr(self, key) is not None
        ]


Report = TypeVar("Report", bound=StageReport)


def restored(kind: type[Report], artifact: Artifact, results: Mapping[str, Any]) -> Report:
    """The report of a stage from its manifest. Raises ArtifactError where that was written in another form."""
    try:
        return kind(directory=artifact.directory, **results)
    except TypeError as error:
        way_out = rebuild_command(artifact.directory, artifact.manifest.kind)
        raise ArtifactError(
            f"the manifest of {artifact.directory} holds other results than this aqlm writes; {way_out}"
        ) from error


@dataclass(frozen=True)
class PlanReport(Record):
    """The plan of `quantize`. Bits are per quantized weight, bytes those of the whole model.

    `kernel` is the backend that will multiply by the quantized layers on this machine, None where it is torch;
    `schemes` are those of the quantized layers by path, `skipped` pairs a path with the reason why it stays in 16 bits.
    """

    model: str
    method: str
    scheme: str
    layers: int
    code_bits: float
    stored_bits: float
    bytes_before: int
    bytes_after: int
    kernel: str | None
    schemes: Mapping[str, str]
    skipped: tuple[tuple[str, str], ...]

    def table(self) -> Table:
        by_reason: dict[str, list[str]] = defaultdict(list)
        for path, reason in self.skipped:
            by_reason[reason].append(path)
        return facts(
            "plan",
            [
                ("model", self.model),
                ("layers", _layers(self.layers, self.method, self.scheme)),
                ("bits per weight", both_bits(self.code_bits, self.stored_bits)),
                ("model size", shrinkage(self.bytes_before, self.bytes_after)),
                *([("matmul kernel", self.kernel)] if self.kernel else []),
                *((f"skipped {len(paths)}", f"{some(paths)}: {reason}") for reason, paths in by_reason.items()),
            ],
        )


@dataclass(frozen=True, kw_only=True)
class CalibrationReport(StageReport):
    """`loss` is the base model's mean negative log likelihood, in nats a token; `sources` counts sequences, and `bos`
    says that each begins with a BOS token."""

    sequences: int
    sequence_length: int
    tokens: int
    loss: float
    sources: Mapping[str, int]
    bos: bool = False

    def table(self) -> Table:
        return facts(
            "calibration",
            [
                (
                    "sequences",
                    f"{self.sequences} of {self.sequence_length} tokens ({self.tokens} tokens)"
                    + (", each with a BOS token" if self.bos else ""),
                ),
                ("from", ", ".join(f"{text_name(source)} ({count})" for source, count in self.sources.items())),
                ("loss of the base model", f"{self.loss:.4f} nats a token"),
                *self.costs(),
                ("wrote", str(self.directory)),
            ],
        )


@dataclass(frozen=True, kw_only=True)
class QuantizeReport(StageReport):
    """`mean_relative_error` is the geometric mean over the layers of tr(dW H dW^T) / tr(W H W^T), in 16 bits and before
    blocks are fitted. `text`: whether text was read; without, H is the identity."""

    model: str
    scheme: str
    method: str
    layers: int
    code_bits: float
    stored_bits: float
    bytes_before: int
    bytes_after: int
    mean_relative_error: float
    text: bool = True

    def table(self) -> Table:
        told = "geometric mean" if self.text else "of the weights alone, as no text is read; geometric mean"
        return facts(
            "quantized",
            [
                ("model", self.model),
                ("layers", _layers(self.layers, self.method, self.scheme)),
                ("bits per weight", both_bits(self.code_bits, self.stored_bits)),
                ("model size", shrinkage(self.bytes_before, self.bytes_after)),
                ("relative error", f"{self.mean_relative_error:.3g} ({told} over the layers)"),
                *self.costs(),
                ("wrote", str(self.directory)),
            ],
        )


@dataclass(frozen=True, kw_only=True)
class ImportReport(StageReport):
    """The imported codes of a `checkpoint`; bits and bytes as in QuantizeReport."""

    checkpoint: str
    model: str
    scheme: str
    layers: int
    code_bits: float
    stored_bits: float
    bytes_before: int
    bytes_after: int

    def table(self) -> Table:
        return facts(
            "imported",
            [
                ("checkpoint", self.checkpoint),
                ("model", self.model),
                ("layers", f"{self.layers}, {self.scheme}"),
                ("bits per weight", both_bits(self.code_bits, self.stored_bits)),
                ("model size", shrinkage(self.bytes_before, self.bytes_after)),
                *self.costs(),
                ("wrote", str(self.directory)),
            ],
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneReport(StageReport):
    """`before` and `after` are KL(teacher || student) in nats a token on the validation set; `tokens`
    counts those of all steps, `text_tokens` those of the text, which may be read several times;
    `changed` counts groups of weights that got other codes."""

    steps: int
    tokens: int
    text_tokens: int
    parameters: int
    changed: int
    before: float
    after: float

    def table(self) -> Table:
        moved = f"groups got other codes {self.changed} times" if self.changed else "codes unchanged"
        return facts(
            "finetuned",
            [
                ("steps", f"{self.steps}; {self.tokens} tokens seen, the text has {self.text_tokens}"),
                ("trained", f"{self.parameters} parameters; {moved}"),
                ("held-out KL", f"{self.before:.4f} -> {self.after:.4f} nats a token"),
                *self.costs(),
                ("wrote", str(self.directory)),
            ],
        )


@dataclass(frozen=True, kw_only=True)
class PackReport(StageReport):
    """`nominal_bits` are those of the scheme, `stored_bits` those of a quantized weight in these files.

    They differ where the format cannot hold the scheme: a uniform grid written as a 16-bit checkpoint stores 16 bits.
    `bytes` counts every tensor of the checkpoint, embeddings and head included.
    """

    format: str
    scheme: str
    nominal_bits: float
    stored_bits: float
    bytes: int
    layers: int

    def table(self) -> Table:
        return facts(
            "packed",
            [
                ("format", self.format),
                ("layers", f"{self.layers}, {self.scheme}"),
                ("bits per weight", f"{self.nominal_bits:.3f} nominal, {self.stored_bits:.3f} in these files"),
                ("size", readable_bytes(self.bytes)),
                *self.costs(),
                ("wrote", str(self.directory)),
            ],
        )
