"""The kinds of matrix by name.

A new kind is one file here with the members of `Matrix` (matrix.py), one row in `MATRIX_KINDS`, and a family of schemes
that says what it costs.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from aqlm_kernels.embedding import CompressedEmbedding
from aqlm_kernels.matrices.additive import AdditiveMatrix
from aqlm_kernels.matrices.blockfloat import BlockFloatMatrix
from aqlm_kernels.matrices.level import LevelMatrix
from aqlm_kernels.matrices.matrix import Matrix, QuantizedLayer
from aqlm_kernels.matrices.refined import RefinedMatrix
from aqlm_kernels.matrices.uniform import UniformMatrix
from aqlm_kernels.refined import RefinedLinear

MATRIX_KINDS: Mapping[str, type[Matrix]] = {
    "additive": AdditiveMatrix,
    "uniform": UniformMatrix,
    "level": LevelMatrix,
    "blockfloat": BlockFloatMatrix,
    "refined": RefinedMatrix,
}


def quantized_layers(network: nn.Module, prefix: str = "") -> dict[str, QuantizedLayer]:
    """Every quantized layer of a network, by path.

    A CompressedEmbedding stands for the layer of its table, which is not listed again: neither inside it nor, in a tied
    model, as the lm_head. A RefinedLinear stands for its two.
    """
    layers = {
        path: module for path, module in network.named_modules(prefix=prefix) if isinstance(module, QuantizedLayer)
    }
    tables = {id(module.table) for module in layers.values() if isinstance(module, CompressedEmbedding)}
    parts = {id(part) for layer in layers.values() if isinstance(layer, RefinedLinear) for part in layer.children()}
    return {path: layer for path, layer in layers.items() if id(layer) not in tables | parts}
