"""`aqlm report`: one HTML page about runs, from what their artifacts and reports hold; nothing is measured for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from aqlm_cli.errors import ArtifactError, UsageError
from aqlm_cli.evaluation.page import page
from aqlm_cli.evaluation.passport import PACKAGES, versions_of
from aqlm_cli.evaluation.sections import RunFacts
from aqlm_cli.formatting import facts, readable_bytes
from aqlm_cli.models import tensor_index
from aqlm_cli.records import Record
from aqlm_cli.runs.artifact import Artifact
from aqlm_cli.runs.directory import RunDirectory, read_run
from aqlm_cli.runs.files import write_file
from aqlm_cli.runs.stages import PACK, QUANTIZE, STAGES
from aqlm_cli.spec.run_file import dump_yaml

PAGE = "report.html"

PARTS: Mapping[str, str] = {
    "codes": "codes",
    "levels": "codes",
    "codebooks": "codebooks",
    "ranges": "codebooks",
    "scales": "scales",
    "zeros": "scales",
}
"""Part of the file by the last word of a tensor's name; any other is a weight in 16 bits."""


@dataclass(frozen=True)
class PageReport(Record):
    """The page that was written; `missing` names what the first run has no measurement of."""

    file: Path
    bytes: int
    runs: int
    missing: tuple[str, ...]

    def table(self) -> Table:
        rows = [("page", f"{self.file}, {readable_bytes(self.bytes)}"), ("runs", str(self.runs))]
        if self.missing:
            rows.append(("not measured", ", ".join(self.missing)))
        return facts("report", rows)


def report(directories: Sequence[Path], file: Path | None) -> PageReport:
    """Write the page about the first run, beside the others; `file` None: into `reports/` of the first.

    Raises ArtifactError for a run that has no quantized model, or no packed one.
    """
    if twice := next((one for n, one in enumerate(directories) if one.resolve() in _resolved(directories[:n])), None):
        raise UsageError(f"{twice} is named twice; name every run once")
    if file is not None and not file.name:
        raise UsageError(f"--out {str(file)!r} is no file; name one such as report.html")
    runs = [read_run(directory) for directory in directories]
    found = [_facts_of(run) for run in runs]
    try:
        content = page(found).encode()
    except (LookupError, TypeError, ValueError, AttributeError):
        for one in found:
            _refuse_foreign(one)
        raise
    path = runs[0].write_report(PAGE, content) if file is None else file
    if file is not None:
        write_file(file, content)
    first = found[0]
    measured = {
        "perplexity": first.perplexities,
        "texts": first.gate,
        "layers": first.attribution,
        "speed": first.bench,
    }
    return PageReport(path, len(content), len(runs), tuple(name for name, value in measured.items() if not value))


def _resolved(directories: Sequence[Path]) -> set[Path]:
    return {directory.resolve() for directory in directories}


def _refuse_foreign(run: RunFacts) -> None:
    """ArtifactError for a run with a report that says something else than those of this program."""
    try:
        page([run])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{run.name}/reports holds a file that is no report of this version ({type(error).__name__}: {error}); "
            "remove it, or measure again"
        ) from error


def _facts_of(run: RunDirectory) -> RunFacts:
    quantized, packed = run.own(QUANTIZE), run.own(PACK)
    if quantized is None or packed is None:
        raise ArtifactError(f"{run.path} has no complete quantized and packed model; make it with `aqlm quantize`")
    results = quantized.manifest.results
    made, plan = results["report"], results["plan"]
    parts = _parts(packed.directory, {one["path"] for one in plan["targets"] if one["kind"] in _OUTSIDE})
    current = {name: stored for name, stored in _reports(run).items() if _of(stored, packed)}
    return RunFacts(
        name=str(run.path),
        model=made["model"],
        scheme=made["scheme"],
        method=made["method"],
        stored_bits=made["stored_bits"],
        bytes=sum(parts.values()),
        base_bytes=made["bytes_before"],
        made_from=_made_from(run, quantized),
        parts=parts,
        layers={path: one["relative_error"] for path, one in results["layers"].items()},
        fitted={
            path: one["fitted_relative_error"]
            for path, one in results["layers"].items()
            if "fitted_relative_error" in one
        },
        blocks=results.get("blocks", {}),
        perplexities=[one for name, one in current.items() if name.startswith("eval-ppl-")],
        gate=current.get("eval-gate.json"),
        attribution=next((one for name, one in current.items() if name.startswith("eval-attribution-")), None),
        bench=next((one for name, one in current.items() if name.startswith("bench")), None),
        costs=_costs(run),
        run_file=dump_yaml(run.config),
        versions=versions_of(*PACKAGES),
    )


_OUTSIDE = ("embedding", "head", "table")


def _reports(run: RunDirectory) -> dict[str, dict[str, Any]]:
    return {path.name: run.read_report(path.name) for path in sorted(run.reports.glob("*.json"))}


def _of(stored: Mapping[str, Any], packed: Artifact) -> bool:
    """True for a report on the model that is packed now; those of the run itself name none."""
    return stored.get("quantized") in (None, packed.manifest.parents.get("quantized"))


def _made_from(run: RunDirectory, quantized: Artifact) -> dict[str, str]:
    config, results = run.config, quantized.manifest.results
    about = {"base model": f"{results['model']['name']}, {results['model']['identity']}"}
    if "calibration" in quantized.manifest.parents:
        about["calibration text"] = f"{config.calibrate.data}, sequences of {config.calibrate.sequence_length} tokens"
    about |= {f"digest of {kind}": digest for kind, digest in quantized.manifest.parents.items() if kind != "model"}
    about |= {"seed": str(config.seed)}
    return about | {name: str(value) for name, value in results.get("machine", {}).items()}


def _parts(directory: Path, tables: set[str]) -> dict[str, int]:
    """Bytes of the tensors of a checkpoint by part, and of what is beside them in the files."""
    parts: dict[str, int] = defaultdict(int)
    for name, tensor in tensor_index(directory).items():
        outside = any(name.startswith(f"{path}.") for path in tables) or "embed" in name or name.startswith("lm_head")
        parts["embeddings and head" if outside else _part(name)] += tensor.bytes
    files = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    parts["headers"] = files - sum(parts.values())
    return dict(parts)


def _part(name: str) -> str:
    last = name.rpartition(".")[2]
    return PARTS.get(last, "norms" if "norm" in name else "16 bits")


def _costs(run: RunDirectory) -> dict[str, dict[str, float | None]]:
    """Planned and actual cost of every stage that is complete."""
    costs: dict[str, dict[str, float | None]] = {}
    for stage in STAGES:
        made = run.own(stage)
        stored = {} if made is None else made.manifest.results.get("report", {})
        planned = stored.get("planned") or {}
        if stored.get("seconds") is not None:
            costs[stage.name] = {
                "seconds": stored["seconds"],
                "memory": stored.get("memory_bytes"),
                "planned_seconds": planned.get("seconds"),
                "planned_memory": planned.get("memory_bytes"),
            }
    return costs
