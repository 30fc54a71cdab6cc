"""What a stage says while it runs (events) and what it returns at its end (records).

A stage never prints. It calls `emit(event)` for each thing worth telling, and the command line decides whether that
becomes a progress bar, a plain line or nothing. At its end it returns one frozen record, which knows two ways to be
shown: `as_json()` for programs and `table()` for people. No number in a record stands alone: a perplexity carries its
data, windows and standard error, a speed its spread and the error of what was computed.
"""

from __future__ import annotations

import abc
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rich.table import Table
from rich.text import Text

# ---------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True)
class StageStarted:
    """`total` steps of `unit` ("window", "block") lie ahead."""

    stage: str
    total: int
    unit: str


@dataclass(frozen=True)
class Advanced:
    """`done` of the stage's steps are finished, counted from its start."""

    stage: str
    done: int
    detail: str = ""


@dataclass(frozen=True)
class LayerQuantized:
    """`relative_error` is tr(dW H dW^T) / tr(W H W^T), over the undamped H."""

    path: str
    relative_error: float
    bits_per_weight: float
    seconds: float


@dataclass(frozen=True)
class BlockQuantized:
    """Relative squared errors of the block's output, before and after its codebooks were fitted; `index` from 0."""

    index: int
    blocks: int
    relative_error_before_fit: float
    relative_error: float
    seconds: float


@dataclass(frozen=True)
class Noted:
    """A fact the user should see: a stage that is reused, a file that is fetched."""

    message: str


@dataclass(frozen=True)
class Warned:
    """Something that may not be what the user wants, though the work goes on."""

    message: str


Event: TypeAlias = StageStarted | Advanced | LayerQuantized | BlockQuantized | Noted | Warned
Emit: TypeAlias = Callable[[Event], None]

# --------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Record(abc.ABC):
    """The result of one stage."""

    def as_json(self) -> dict[str, Any]:
        """The fields by name, in types that JSON knows."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @abc.abstractmethod
    def table(self) -> Table:
        """The same for a person to read."""


@dataclass(frozen=True)
class PlanReport(Record):
    """What `quantize` is about to do. Bits are per quantized weight, bytes those of the whole model.

    `skipped` pairs a module path with the reason why it keeps its 16 bits.
    """

    model: str
    method: str
    scheme: str
    layers: int
    code_bits: float
    stored_bits: float
    bytes_before: int
    bytes_after: int
    skipped: tuple[tuple[str, str], ...]

    def table(self) -> Table:
        by_reason: dict[str, list[str]] = defaultdict(list)
        for path, reason in self.skipped:
            by_reason[reason].append(path)
        return _facts(
            "plan",
            [
                ("model", self.model),
                ("layers", f"{self.layers}, {self.method} {self.scheme}"),
                ("bits per weight", _bits(self.code_bits, self.stored_bits)),
                ("model size", _shrinkage(self.bytes_before, self.bytes_after)),
                *((f"skipped {len(paths)}", f"{_some(paths)}: {reason}") for reason, paths in by_reason.items()),
            ],
        )


@dataclass(frozen=True)
class CalibrationReport(Record):
    """`loss` is the model's mean negative log likelihood on the windows, in nats a token; `sources` counts windows."""

    windows: int
    sequence_length: int
    tokens: int
    loss: float
    sources: Mapping[str, int]
    directory: Path
    seconds: float

    def table(self) -> Table:
        return _facts(
            "calibration",
            [
                ("windows", f"{self.windows} of {self.sequence_length} tokens ({self.tokens} tokens)"),
                ("from", ", ".join(f"{source} ({windows})" for source, windows in self.sources.items())),
                ("loss of the model", f"{self.loss:.4f} nats a token"),
                ("time", f"{self.seconds:.0f} s"),
                ("wrote", str(self.directory)),
            ],
        )


@dataclass(frozen=True)
class QuantizeReport(Record):
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
    seconds: float
    peak_memory_bytes: int
    directory: Path

    def table(self) -> Table:
        return _facts(
            "quantized",
            [
                ("model", self.model),
                ("layers", f"{self.layers}, {self.method} {self.scheme}"),
                ("bits per weight", _bits(self.code_bits, self.stored_bits)),
                ("model size", _shrinkage(self.bytes_before, self.bytes_after)),
                ("relative error", f"{self.mean_relative_error:.5f} (geometric mean over the layers)"),
                ("time", f"{self.seconds:.0f} s"),
                ("peak memory", readable_bytes(self.peak_memory_bytes)),
                ("wrote", str(self.directory)),
            ],
        )


@dataclass(frozen=True)
class PackReport(Record):
    """`nominal_bits` is what the scheme stands for, `stored_bits` what a quantized weight takes in these files.

    They differ where the format cannot hold the scheme: a uniform grid written as a 16-bit checkpoint stores 16 bits.
    `bytes` counts every tensor of the checkpoint, embeddings and head included.
    """

    directory: Path
    format: str
    scheme: str
    nominal_bits: float
    stored_bits: float
    bytes: int
    layers: int

    def table(self) -> Table:
        return _facts(
            "packed",
            [
                ("format", self.format),
                ("layers", f"{self.layers}, {self.scheme}"),
                ("bits per weight", f"{self.nominal_bits:.3f} nominal, {self.stored_bits:.3f} in these files"),
                ("size", readable_bytes(self.bytes)),
                ("wrote", str(self.directory)),
            ],
        )


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
                Text(self.data),
                f"{self.windows} x {self.sequence_length}",
                self.dtype,
                f"{found.perplexity:.3f} ± {found.stderr:.3f}",
                ratio,
            )
        return table


@dataclass(frozen=True)
class BenchRow:
    """Tokens per second: median, lowest and highest of the repeats. `relative_error` is that of the logits, as
    relative RMS against the same weights in float32; None where the row is that reference."""

    name: str
    decode_median: float
    decode_low: float
    decode_high: float
    prefill_median: float
    prefill_low: float
    prefill_high: float
    bytes: int
    relative_error: float | None


@dataclass(frozen=True)
class BenchReport(Record):
    """Speed of batch-1 decoding and of reading a prompt; `backend` is the product that the packed model ran through."""

    model: str
    threads: int
    backend: str
    prompt: int
    tokens: int
    repeats: int
    rows: tuple[BenchRow, ...]

    def table(self) -> Table:
        title = (
            f"{self.model}: tokens per second, median of {self.repeats} (lowest to highest); {self.threads} threads, "
            f"prompt of {self.prompt} tokens, then {self.tokens} one by one; backend {self.backend}"
        )
        table = Table("model", "decode", "prefill", "size", "logits' error", title=Text(title), title_justify="left")
        for row in self.rows:
            table.add_row(
                Text(row.name),
                f"{row.decode_median:.1f} ({row.decode_low:.1f}-{row.decode_high:.1f})",
                f"{row.prefill_median:.0f} ({row.prefill_low:.0f}-{row.prefill_high:.0f})",
                readable_bytes(row.bytes),
                "reference" if row.relative_error is None else f"{row.relative_error:.1e}",
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

    def table(self) -> Table:
        speed = f"{self.tokens} tokens in {self.seconds:.1f} s: {self.tokens_per_second:.1f} tokens/s"
        return _facts(self.model, [("prompt", self.prompt), ("text", self.text), ("speed", speed)])


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
        return _facts(
            "this machine",
            [
                ("processor", f"{self.processor}, {self.cores} cores, {self.threads} threads in use"),
                ("features", ", ".join(self.features) or "none that matter here"),
                ("accelerators", ", ".join(self.accelerators) or "none"),
                *((name, version or "not installed") for name, version in self.versions.items()),
                *(
                    (f"backend {row.name}", f"{row.scheme} on {row.device}: {row.refusal or 'ready'}")
                    for row in self.backends
                ),
            ],
        )


# -------------------------------------------------------------------------------------------------------- wording


def readable_bytes(count: int) -> str:
    """Decimal units, as disks and downloads are measured: 85123456 -> "85.1 MB"."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _bits(code_bits: float, stored_bits: float) -> str:
    return f"{code_bits:.3f} of codes, {stored_bits:.3f} stored (with codebooks and scales)"


def _shrinkage(before: int, after: int) -> str:
    times = f" ({before / after:.2f}x smaller)" if after else ""
    return f"{readable_bytes(before)} -> {readable_bytes(after)}, embeddings and head included{times}"


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _facts(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns without a heading. Values become `Text`, so that brackets in them are not read as rich's markup."""
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for name, fact in rows:
        table.add_row(Text(name), Text(fact))
    return table


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
