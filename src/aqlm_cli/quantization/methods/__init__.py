"""The methods: weight matrix and statistics of its inputs in, compressed matrix out.

A new method is one file here, one row in `METHODS`, and its settings and row in spec/methods. Where its matrices are of
a new kind, that is one file in aqlm_kernels/matrices and one in spec/schemes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from aqlm_cli.quantization.methods import aqlm, blockfloat, gptq, information, rtn
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_kernels import Matrix

# W [out, in], statistics of its inputs, a scheme of the method's families, draws, the method's settings (or None).
Method: TypeAlias = Callable[[Tensor, LayerStatistics, Any, torch.Generator, Any], Matrix]

METHODS: Mapping[str, Method] = {
    "aqlm": aqlm.quantize,
    "rtn": rtn.quantize,
    "gptq": gptq.quantize,
    "blockfloat": blockfloat.quantize,
    "information": information.quantize,
}
