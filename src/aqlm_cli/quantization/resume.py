"""Files of an interrupted quantization, from which the same command resumes.

In `quantized.partial/work/`, beside the files of the finished blocks:

    hidden-007.activations    what enters block 7. That this file exists means that blocks 0 to 6 are finished
    handed-007/               what the blocks before it hand on beside hidden states, in families where they do
    targets.activations       the output of the base model's block; worthless after an interruption
    block-006.json            what was measured of a finished block
    <path>.safetensors        a finished matrix of the present block, before the block is fitted
    statistics.safetensors    Hessians of the present block while it is fitted; worthless after an interruption
    tables/<path>.safetensors a finished matrix outside the blocks

Each is renamed to its name when it is whole and on the disk, so that a file that exists can be trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqlm_cli.errors import ArtifactError
from aqlm_cli.quantization.parallel import Compressed
from aqlm_cli.runs.files import load_tensors, read_metadata, save_tensors, storage_errors, write_file
from aqlm_kernels import MATRIX_KINDS, KernelError


@dataclass(frozen=True)
class ResumeState:
    """A running quantization in `directory`."""

    directory: Path

    @property
    def blocks(self) -> int:
        """The number of finished blocks."""
        with storage_errors(self.directory):
            states = list(self.directory.glob("hidden-*.activations"))
        return max((int(path.stem.removeprefix("hidden-")) for path in states), default=0)

    @property
    def blocks_of_weights(self) -> int:
        """The same of a quantization without text, in which no states enter a block: it is finished when recorded."""
        with storage_errors(self.directory):
            records = list(self.directory.glob("block-*.json"))
        return max((int(path.stem.removeprefix("block-")) + 1 for path in records), default=0)

    def hidden(self, block: int) -> Path:
        """The states that enter a block."""
        return self.directory / f"hidden-{block:03d}.activations"

    def handed(self, block: int) -> Path:
        """The path of the tensors that enter a block beside the states."""
        return self.directory / f"handed-{block:03d}"

    @property
    def handing(self) -> Path:
        """The same of the next block, while it is made."""
        return self.directory / "handed.partial"

    @property
    def targets(self) -> Path:
        return self.directory / "targets.activations"

    @property
    def statistics(self) -> Path:
        return self.directory / "statistics.safetensors"

    def record(self, block: int, measured: Mapping[str, Any]) -> None:
        """Write what was measured of a block that is about to be finished."""
        write_file(self.directory / f"block-{block:03d}.json", json.dumps(measured).encode())

    def recorded(self, block: int) -> dict[str, Any]:
        path = self.directory / f"block-{block:03d}.json"
        try:
            measured: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}); remove {self.directory} to start again") from error
        return measured

    def keep_table(self, compressed: Compressed) -> None:
        """Keep a matrix outside the blocks until all is finished."""
        with storage_errors(self._tables.directory):
            self._tables.directory.mkdir(exist_ok=True)
        self._tables.keep(compressed)

    def kept_table(self, path: str) -> Compressed | None:
        """The matrix outside the blocks at `path`, if it was finished."""
        return self._tables.kept(path)

    @property
    def _tables(self) -> ResumeState:
        return ResumeState(self.directory / "tables")

    def keep(self, compressed: Compressed) -> None:
        """A matrix of the present block."""
        about = {
            "kind": compressed.matrix.kind,
            "weights": str(compressed.weights),
            "relative_error": repr(compressed.relative_error),
            "seconds": repr(compressed.seconds),
        }
        save_tensors(self.directory / f"{compressed.path}.safetensors", compressed.matrix.tensors(), about)

    def kept(self, path: str) -> Compressed | None:
        """The matrix of the layer at `path`, if it was finished."""
        file = self.directory / f"{path}.safetensors"
        if not file.exists():
            return None
        try:
            about = read_metadata(file)
            return Compressed(
                path,
                int(about["weights"]),
                MATRIX_KINDS[about["kind"]].from_tensors(load_tensors(file)),
                float(about["relative_error"]),
                float(about["seconds"]),
            )
        except (ArtifactError, KernelError, LookupError, ValueError) as error:
            raise ArtifactError(f"{file} is damaged ({error.__cause__ or error}); remove it and rerun") from error

    def forget_matrices(self) -> None:
        """Remove the matrices of a block that is finished."""
        with storage_errors(self.directory):
            for file in self.directory.glob("*.safetensors"):
                file.unlink()
