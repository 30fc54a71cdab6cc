"""The same bits for any number of threads; in a process of its own, since Numba's pool cannot grow later."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import aqlm_kernels

DIGESTS = """
import hashlib, sys
import numba, torch
from aqlm_kernels import AdditiveMatrix, ByteRows, matmul_dense, PackedMatrix
from aqlm_kernels import Decoder, DecoderBlock, UniformMatrix
from aqlm_kernels.cpu import gather
from aqlm_kernels.cpu import lut
from aqlm_kernels.cpu.dequantize import dequantize, gradients
from aqlm_kernels.cpu.uniform import PackedUniform

def product(multiply, codebook_size):
    matrix = random_matrix(codebook_size)
    x = torch.randn(3, matrix.in_features)
    return lambda: [multiply(x, PackedMatrix(matrix))]

def weights(codebook_size):
    matrix = random_matrix(codebook_size)
    parts = matrix.codes, matrix.codebooks, matrix.scales
    dw = torch.randn(matrix.out_features, matrix.in_features)
    types = torch.float32, torch.bfloat16
    return lambda: [*(dequantize(*parts, dtype).float() for dtype in types), *gradients(dw, *parts)]

def head():
    x, weight = torch.randn(2, 576), torch.randn(333, 576)
    forms = weight, weight.bfloat16(), weight.half(), ByteRows.of(weight)
    return lambda: [matmul_dense(x, form) for form in forms]

def grids(bits):
    levels, zeros = torch.randint(1 << bits, (333, 576)), torch.randint(1 << bits, (333, 9))
    scales, x = torch.rand(333, 9), torch.randn(3, 576)
    packed = PackedUniform.of(levels.byte(), zeros.byte(), scales, torch.tensor(bits), torch.tensor(0))
    return lambda: [packed.matmul(x)]

def decoder():
    # a block of every kind of layer, and one table for embeddings and head
    d, f = 72, 200
    gates = [uniform(f, d, 4), dense(f, d, torch.float16)]
    inputs = [additive(72, d, 2), dense(24, d, torch.bfloat16), uniform(24, d, 8)]
    block = DecoderBlock(torch.ones(d), inputs, additive(d, 72, 3), torch.ones(d), gates, additive(d, f, 1))
    table, angles = additive(333, d, 4), torch.randn(8, 24)
    decoders = [
        Decoder([block] * 2, table.matrix(), torch.ones(d), table, (angles, angles), 1, 1e-5, lut_bytes)
        for lut_bytes in (0, 1, 2)
    ]
    return lambda: [part for one in decoders for part in (one.prefill(torch.arange(3)), one.step(5))]

def additive(rows, columns, codebooks):
    codes = torch.randint(256, (rows, columns // 8, codebooks))
    return AdditiveMatrix(codes, torch.randn(codebooks, 256, 8), torch.rand(rows)).module().requires_grad_(False)

def uniform(rows, columns, bits):
    levels, zeros = torch.randint(1 << bits, (rows, columns)).byte(), torch.randint(1 << bits, (rows, 9)).byte()
    return UniformMatrix(levels, zeros, torch.rand(rows, 9), torch.tensor(bits), torch.tensor(0)).module()

def dense(rows, columns, dtype):
    return torch.nn.Linear(columns, rows, bias=False, dtype=dtype)

def random_matrix(codebook_size):
    codes = torch.randint(0, codebook_size, (333, 72, 2))
    return AdditiveMatrix(codes, torch.randn(2, codebook_size, 8), torch.rand(333))

torch.manual_seed(0)
TABLES = lut.by_lookup, lut.by_byte_lookup, lut.by_float_lookup
RUNS = [product(multiply, 256) for multiply in TABLES]
RUNS += [product(gather.by_gather, 4096), weights(256), weights(4096), head(), grids(3), grids(8), decoder()]
for threads in 1, 2, 3, 4:
    numba.set_num_threads(threads)
    for attempt in range(5):
        digest = hashlib.sha256()
        for run in RUNS:
            for tensor in run():
                digest.update(tensor.numpy().tobytes())
        print(threads, digest.hexdigest())
"""


@pytest.fixture(scope="module")
def digests() -> list[tuple[str, str]]:
    environment = {
        **os.environ,
        "NUMBA_NUM_THREADS": "4",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(Path(aqlm_kernels.__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, "-c", DIGESTS], env=environment, capture_output=True, text=True, check=True)
    return [(threads, digest) for threads, digest in (line.split() for line in done.stdout.splitlines())]


def test_results_have_the_same_bits_for_any_number_of_threads(digests):
    assert {threads for threads, _ in digests} == {"1", "2", "3", "4"}
    assert len({digest for _, digest in digests}) == 1
