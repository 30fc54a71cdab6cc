"""Bytes that the Triton kernels move, counted under the interpreter: `TRITON_INTERPRET=1 python traffic.py`.

A GPU reads and writes memory in sectors of 32 bytes. What a program touches twice comes from its own cache the second
time. So two numbers bound what is moved: the sectors touched by anyone (each comes from memory once, if the second
level of cache holds them), and the sum over the programs of what each touches (which that cache has to deliver).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

from aqlm_kernels import AdditiveMatrix, PackedMatrix
from aqlm_kernels.gpu import matmul

SECTOR = 32  # bytes
OUT, IN = 1024, 1024
SCHEMES = {"1x8g8": (1, 256, 8), "2x8g8": (2, 256, 8), "3x8g8": (3, 256, 8), "1x16g8": (1, 65536, 8)}
PRODUCTS = {"y, 1 row": 1, "y, 16 rows": 16, "y, 512 rows": 512, "dx, 512 rows": 512, "dC and ds, 512 rows": 512}


@dataclass
class Traffic:
    """Sectors touched, by program of every launch."""

    programs: dict[tuple[int, ...], list[np.ndarray]] = field(default_factory=dict)
    launches: int = 0

    def add(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        place = interpreter_builder.grid_idx
        self.launches += place == (0, 0, 0) and (self.launches, *place) not in self.programs
        sectors = np.unique(addresses[mask].astype(np.int64) // SECTOR)
        self.programs.setdefault((self.launches, *place), []).append(sectors)

    def by_program(self) -> int:
        return SECTOR * sum(len(np.unique(np.concatenate(found))) for found in self.programs.values())

    def by_anyone(self) -> int:
        return SECTOR * len(np.unique(np.concatenate([part for found in self.programs.values() for part in found])))


@contextmanager
def counted() -> Iterator[Traffic]:
    """What kernels move inside."""
    traffic = Traffic()
    own = {name: getattr(InterpreterBuilder, name) for name in ("create_masked_load", "create_masked_store")}
    atomic = InterpreterBuilder.create_atomic_rmw

    def load(self: Any, places: Any, mask: Any, *rest: Any) -> Any:
        traffic.add(places.data, mask.data)
        return own["create_masked_load"](self, places, mask, *rest)

    def store(self: Any, places: Any, values: Any, mask: Any, *rest: Any) -> Any:
        traffic.add(places.data, mask.data)
        return own["create_masked_store"](self, places, values, mask, *rest)

    def add(self: Any, kind: Any, places: Any, values: Any, mask: Any, *rest: Any) -> Any:
        traffic.add(places.data, mask.data)
        return atomic(self, kind, places, values, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
    InterpreterBuilder.create_atomic_rmw = add
    try:
        yield traffic
    finally:
        for name, method in own.items():
            setattr(InterpreterBuilder, name, method)
        InterpreterBuilder.create_atomic_rmw = atomic


def measured(product: str, scheme: str) -> list[str]:
    """A line of the table: kB at least, touched by anyone, delivered to all programs."""
    codebooks = SCHEMES[scheme]
    num_codebooks, codebook_size, group_size = codebooks
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, codebook_size, (OUT, IN // group_size, num_codebooks), generator=draw)
    matrix = AdditiveMatrix(codes, torch.randn(codebooks, generator=draw), torch.ones(OUT))
    packed, rows = PackedMatrix(matrix), PRODUCTS[product]
    parts = matrix.codes, matrix.codebooks, matrix.scales
    x, dy = torch.randn(rows, IN).half(), torch.randn(rows, OUT).half()
    used = sum(len(codes[..., m].unique()) for m in range(num_codebooks)) * group_size * 4  # bytes of codebooks
    least = packed.tiled.nbytes + used + matrix.scales.nbytes + x.nbytes + dy.nbytes  # y and dx are as large as these
    with counted() as traffic:
        if product.startswith("dC"):
            matmul.weight_gradients(dy, x, *parts)
            least += used + matrix.scales.nbytes
        elif product.startswith("dx"):
            matmul.input_gradient(dy, *parts)
        elif rows > 64:
            matmul.gemm(x, *parts)
        else:
            matmul.multiply(x, packed)
    anyone, programs = traffic.by_anyone(), traffic.by_program()
    sizes = [f"{least / 1e3:.0f}", f"{anyone / 1e3:.0f}", f"{anyone / least:.2f}", f"{programs / 1e3:.0f}"]
    return [product, scheme, *sizes]


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    header = ["product", "scheme", "at least, kB", "from memory, kB", "ratio", "to programs, kB"]
    print(line(header), line(["---"] * len(header)), sep="\n")
    for scheme in SCHEMES:
        for product in PRODUCTS:
            print(line(measured(product, scheme)), flush=True)
