"""Measured divergences of mixes: each is kept in a file of its own, so that an interrupted allocation has it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aqlm_cli.errors import ArtifactError, QuantizationError
from aqlm_cli.events import Advanced, Emit, StageStarted
from aqlm_cli.quantization.mixed_model import MixedModel
from aqlm_cli.quantization.resume import ResumeState
from aqlm_cli.runs.files import write_file
from aqlm_cli.runs.stages import ALLOCATE
from aqlm_cli.spec.choices import OpenLayer
from aqlm_cli.spec.scores import SIXTEEN_BITS
from aqlm_kernels import Matrix

STAGE = f"{ALLOCATE.name}: tables"


def file_name(path: str, word: str) -> str:
    """Name, without its end, of the file that keeps the matrix of a layer in a treatment."""
    return f"{path}@{word.replace(':', '-')}"


@dataclass(frozen=True, eq=False)
class MeasuredMixes:
    """Mixes of the matrices in `state`; `layers` are those that may be replaced, by path."""

    state: ResumeState
    model: MixedModel
    layers: Mapping[str, OpenLayer]

    def of(self, choices: Mapping[str, str]) -> float:
        """The divergence of the base model with these choices, in nats a token.

        Raises ArtifactError where a matrix is missing, and QuantizationError where the divergence is not finite.
        """
        text = json.dumps(dict(sorted(choices.items()))).encode()
        file = self.state.directory / f"mix-{hashlib.sha256(text).hexdigest()[:20]}.json"
        if (kept := _kept(file)) is not None:
            return kept
        found = {path: self._matrix(path, word) for path, word in choices.items() if word != SIXTEEN_BITS}
        tables = {path: matrix for path, matrix in found.items() if self.layers[path].outside}
        inside = {path: matrix for path, matrix in found.items() if path not in tables}
        divergence = self.model.divergence(inside, tables)
        if not math.isfinite(divergence):
            raise QuantizationError(
                "the divergence of a quantized model is not finite; the base model is damaged or overflows"
            )
        write_file(file, json.dumps({"divergence": divergence}).encode())
        return divergence

    def of_tables(self, emit: Emit) -> dict[str, dict[str, float]]:
        """The divergence that each quantized choice of each table makes alone, by path and word."""
        tables = {path: layer for path, layer in self.layers.items() if layer.outside}
        pairs = [(path, str(one)) for path, layer in tables.items() for one in layer.choices if one.treatment]
        found: dict[str, dict[str, float]] = {path: {} for path in tables}
        emit(StageStarted(STAGE, len(pairs), "table"))
        for number, (path, word) in enumerate(pairs, 1):
            found[path][word] = self.of({path: word})
            emit(Advanced(STAGE, number, f"KL {found[path][word]:.4f} of {word}"))
        return found

    def _matrix(self, path: str, word: str) -> Matrix:
        kept = self.state.kept(file_name(path, word))
        if kept is None:  # its block is finished: without its inputs it cannot be made again
            directory = self.state.directory
            file = directory / f"{file_name(path, word)}.safetensors"
            raise ArtifactError(f"{file} is missing; remove {directory} to start again")
        return kept.matrix


def _kept(file: Path) -> float | None:
    """The divergence of a mix that was measured before; None where it was not, or the file is damaged."""
    try:
        kept = json.loads(file.read_bytes())["divergence"]
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
    return kept if isinstance(kept, float) and math.isfinite(kept) else None
