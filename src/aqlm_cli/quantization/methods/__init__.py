"""The methods: a weight matrix and what is known of its inputs go in, a compressed matrix comes out.

A compressed matrix is a frozen record with the members `kind`, `tensors()`, `from_tensors()`, `dequantize()`,
`stored()` and `bits()`. A new method is one file, one row in `METHODS`, and, where its matrices are of a new kind, one
row in `MATRIX_KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from aqlm_cli.quantization.methods import aqlm, rtn
from aqlm_cli.quantization.methods.rtn import UniformMatrix
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.spec.config import SearchConfig
from aqlm_cli.spec.schemes import Scheme
from aqlm_kernels import AdditiveMatrix

CompressedMatrix: TypeAlias = AdditiveMatrix | UniformMatrix
Method: TypeAlias = Callable[[Tensor, LayerStatistics, Scheme, torch.Generator, SearchConfig], CompressedMatrix]

METHODS: Mapping[str, Method] = {"aqlm": aqlm.quantize, "rtn": rtn.quantize}
MATRIX_KINDS: Mapping[str, type[CompressedMatrix]] = {"additive": AdditiveMatrix, "uniform": UniformMatrix}
