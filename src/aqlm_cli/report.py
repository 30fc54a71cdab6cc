"""What a stage returns at its end: one frozen record, which knows two ways to be shown.

`as_json()` is for programs and `table()` for people. No number in a record stands alone: a perplexity carries its data,
windows and standard error, a speed its spread and the error of what was computed.
"""

from __future__ import annotations

import abc
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Group
from rich.table import Table
from rich.text import Text

from aqlm_cli.errors import ArtifactError
from aqlm_cli.wording import both_bits, clock, counted, facts, plain, readable_bytes, shrinkage, some, text_name


@dataclass(frozen=True)
class Record(abc.ABC):
    """The result of one stage."""

    def as_json(self) -> dict[str, Any]:
        """The fields by name, in types that JSON knows."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @abc.abstractmethod
    def table(self) -> Table | Group:
        """The same for a person to read."""


@dataclass(frozen=True, kw_only=True)
class StageReport(Record):
    """Of a stage that made the artifact in `directory`: what it took, and what it was `planned` to take, if it was.

    `memory_bytes` is what the process had resident at most, `disk_bytes` what the run had on the disk; None where the
    artifact was there already and does not tell.
    """

    directory: Path
    seconds: float | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    planned: Mapping[str, float] | None = None

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


def restored(kind: type[Report], directory: Path, results: Mapping[str, Any]) -> Report:
    """The report of a stage from its manifest. Raises ArtifactError where that was written in another form."""
    try:
        return kind(directory=directory, **results)
    except TypeError as error:
        raise ArtifactError(
            f"the manifest of {directory} holds other results than this aqlm writes; redo its stage with --overwrite"
        ) from error


@dataclass(frozen=True)
class PlanReport(Record):
    """What `quantize` is about to do. Bits are per quantized weight, bytes those of the whole model.

    `kernel` is what will multiply by the compressed layers on this machine, None where it is torch; `schemes` are those
    of the quantized layers by path, `skipped` pairs a path with the reason why it keeps its 16 bits.
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
                ("layers", f"{self.layers}, {self.method} {self.scheme}"),
                ("bits per weight", both_bits(self.code_bits, self.stored_bits)),
                ("model size", shrinkage(self.bytes_before, self.bytes_after)),
                *([("product kernel", self.kernel)] if self.kernel else []),
                *((f"skipped {len(paths)}", f"{some(paths)}: {reason}") for reason, paths in by_reason.items()),
            ],
        )


@dataclass(frozen=True, kw_only=True)
class CalibrationReport(StageReport):
    """`loss` is the model's mean negative log likelihood on the windows, in nats a token; `sources` counts windows."""

    windows: int
    sequence_length: int
    tokens: int
    loss: float
    sources: Mapping[str, int]

    def table(self) -> Table:
        return facts(
            "calibration",
            [
                ("windows", f"{self.windows} of {self.sequence_length} tokens ({self.tokens} tokens)"),
                ("from", ", ".join(f"{text_name(source)} ({windows})" for source, windows in self.sources.items())),
                ("loss of the model", f"{self.loss:.4f} nats a token"),
                *self.costs(),
                ("wrote", str(self.directory)),
            ],
        )


@dataclass(frozen=True, kw_only=True)
class QuantizeReport(StageReport):
    """`mean_relative_error` is the geometric mean over the layers of tr(dW H dW^T) / tr(W H W^T)."""

    model: str
    scheme: str
    method: str
    layers: int
    code_bits: float
    stored_bits: float
    bytes_before: int
    bytes_after: int
    mean_relative_error: float

    def table(self) -> Table:
        return facts(
            "quantized",
            [
                ("model", self.model),
                ("layers", f"{self.layers}, {self.method} {self.scheme}"),
                ("bits per weight", both_bits(self.code_bits, self.stored_bits)),
                ("model size", shrinkage(self.bytes_before, self.bytes_after)),
                ("relative error", f"{self.mean_relative_error:.3g} (geometric mean over the layers)"),
                *self.costs(),
                ("wrote", str(self.directory)),
            ],
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneReport(StageReport):
    """`before` and `after` are KL(original || quantized) in nats a token on windows that were not trained on; `tokens`
    counts those of all steps, `text_tokens` those of the text, which may have been gone through several times."""

    steps: int
    tokens: int
    text_tokens: int
    parameters: int
    before: float
    after: float

    def table(self) -> Table:
        return facts(
            "finetuned",
            [
                ("steps", f"{self.steps}, {self.tokens} tokens of a text of {self.text_tokens}"),
                ("trained", f"{self.parameters} numbers; the codes stay"),
                ("held-out KL", f"{self.before:.4f} -> {self.after:.4f} nats a token"),
                *self.costs(),
                ("wrote", str(self.directory)),
            ],
        )


@dataclass(frozen=True, kw_only=True)
class PackReport(StageReport):
    """`nominal_bits` is what the scheme stands for, `stored_bits` what a quantized weight takes in these files.

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


@dataclass(frozen=True)
class VerifyReport(Record):
    """All `files` of the run's artifacts are what their manifests say; `layer` was quantized again to the same codes.

    `layer` is None where nothing is quantized yet, or was so on another kind of machine.
    """

    directory: Path
    files: int
    bytes: int
    layer: str | None
    seconds: float

    def table(self) -> Table:
        again = "nothing here to quantize again" if self.layer is None else f"{self.layer}: the same codes"
        rows = [
            ("files", f"{self.files} are what their manifests say, {readable_bytes(self.bytes)}"),
            ("quantized again", again),
            ("time", clock(self.seconds)),
        ]
        return facts(f"{self.directory} is sound", rows)


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log likelihood), with the standard error that the spread over the windows gives it."""

    perplexity: float
    stderr: float


@dataclass(frozen=True)
class PerplexityReport(Record):
    """Perplexity of `model` on `data`; `ratio` is to the original's on the same windows, where there is an original."""

    model: str
    data: str
    perplexity: float
    stderr: float
    windows: int
    sequence_length: int
    dtype: str
    original: Perplexity | None
    ratio: float | None

    def table(self) -> Table:
        columns = ("model", "data", "windows x tokens", "type", "perplexity", "ratio")
        table = Table(*columns, title="perplexity", title_justify="left")
        ratio = "" if self.ratio is None else f"{self.ratio:.4f}"
        rows = [(self.model, Perplexity(self.perplexity, self.stderr), ratio)]
        if self.original is not None:
            rows.insert(0, ("original", self.original, "1"))
        for name, found, ratio in rows:
            table.add_row(
                Text(name),
                Text(text_name(self.data)),
                f"{self.windows} x {self.sequence_length}",
                self.dtype,
                f"{found.perplexity:.3f} ± {found.stderr:.3f}",
                ratio,
            )
        return table


@dataclass(frozen=True)
class GenerationReport(Record):
    """`text` is the continuation without the prompt; `tokens` counts it."""

    model: str
    prompt: str
    text: str
    tokens: int
    seconds: float
    tokens_per_second: float
    decoding: str

    def table(self) -> Table:
        speed = f"{self.tokens} tokens in {self.seconds:.1f} s: {self.tokens_per_second:.1f} tokens/s; {self.decoding}"
        return facts(self.model, [("prompt", self.prompt), ("text", self.text), ("speed", speed)])


@dataclass(frozen=True)
class StageStatus:
    """`state` in words; of a stage that has begun, `done` of `total` steps, and the seconds left as far as known."""

    stage: str
    state: str
    done: int | None = None
    total: int | None = None
    unit: str | None = None
    seconds_left: float | None = None


@dataclass(frozen=True)
class StatusReport(Record):
    """Where a run stands; `process` is at work in it, None if nobody is."""

    directory: Path
    model: str
    scheme: str
    process: str | None
    stages: tuple[StageStatus, ...]

    def table(self) -> Table:
        rows = [("model", f"{self.model}, {self.scheme}"), ("at work", self.process or "nobody")]
        for one in self.stages:
            steps = "" if one.total is None else f", {one.done} of {counted(one.total, one.unit or 'step')}"
            left = "" if one.seconds_left is None else f", {clock(one.seconds_left)} left"
            rows.append((one.stage, f"{one.state}{steps}{left}"))
        return facts(str(self.directory), rows)


@dataclass(frozen=True)
class BackendReport:
    """Whether a backend multiplies by matrices of a scheme here; `refusal` is its reason why not."""

    name: str
    scheme: str
    device: str
    refusal: str | None


@dataclass(frozen=True)
class MachineReport(Record):
    """What this machine has. `versions` of packages that are not installed are None."""

    processor: str
    features: tuple[str, ...]
    cores: int
    threads: int
    accelerators: tuple[str, ...]
    versions: Mapping[str, str | None]
    backends: tuple[BackendReport, ...]

    def table(self) -> Table:
        return facts(
            "this machine",
            [
                ("processor", f"{self.processor}, {counted(self.cores, 'core')}"),
                ("threads in use", str(self.threads)),
                ("features", ", ".join(self.features) or "none that matter here"),
                ("accelerators", ", ".join(self.accelerators) or "none"),
                *((name, version or "not installed") for name, version in self.versions.items()),
                *(
                    (f"backend {row.name}", f"{row.scheme} on {row.device}: {row.refusal or 'ready'}")
                    for row in self.backends
                ),
            ],
        )
