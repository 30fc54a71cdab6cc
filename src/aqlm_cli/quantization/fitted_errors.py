"""The errors of the layers of a block after it was fitted.

Their Hessians lie on the disk while the block is fitted, which needs the memory for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.runs.files import read_tensor, save_tensors, storage_errors
from aqlm_kernels import QuantizedLayer


@dataclass(frozen=True)
class StoredStatistics:
    """Statistics of the layers of a block in one file; `stored` has the name of its tensor and the tokens by path."""

    file: Path
    stored: Mapping[str, tuple[str, int]]

    @classmethod
    def save(cls, file: Path, statistics: Mapping[str, LayerStatistics]) -> StoredStatistics:
        """Write each H once, also where layers share it."""
        first: dict[int, str] = {}
        names = {path: first.setdefault(id(one), path) for path, one in statistics.items()}
        save_tensors(file, {name: statistics[name].second_moment.cpu() for name in first.values()})
        return cls(file, {path: (name, statistics[path].tokens) for path, name in names.items()})

    def read(self, path: str) -> LayerStatistics:
        name, tokens = self.stored[path]
        return LayerStatistics(read_tensor(self.file, name), tokens)

    def errors(self, base: nn.Module, quantized: nn.Module) -> dict[str, float]:
        """The relative error of each layer of the quantized block, by its path in the block."""
        found: dict[str, float] = {}
        for path in self.stored:
            found[path] = self.read(path).relative_error(_weight(base, path), _weight(quantized, path))
        return found

    def remove(self) -> None:
        with storage_errors(self.file):
            self.file.unlink(missing_ok=True)


def _weight(block: nn.Module, path: str) -> Tensor:
    layer = block.get_submodule(path)
    weight = layer.matrix().dequantize() if isinstance(layer, QuantizedLayer) else block.get_parameter(f"{path}.weight")
    return weight.detach().float().cpu()
