"""All matrices of one block, side by side: one thread each, so that a result does not depend on how many there are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import numba
import torch
from numba.np.ufunc.parallel import threading_layer
from torch import Tensor

from aqlm_cli.errors import QuantizationError
from aqlm_cli.quantization.methods import METHODS, Method
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.seeds import generator
from aqlm_cli.spec.section import Section
from aqlm_cli.spec.treatment import Treatment
from aqlm_kernels import Matrix


@dataclass(frozen=True, eq=False)
class Task:
    """One matrix to compress; `path` names it in errors and seeds its randomness."""

    path: str
    weight: Tensor  # [out, in] float32
    statistics: LayerStatistics
    treatment: Treatment


@dataclass(frozen=True, eq=False)
class Compressed:
    path: str
    weights: int  # how many the matrix stands for
    matrix: Matrix  # in float32, for the block may be fitted before it is rounded
    relative_error: float  # of the matrix rounded to the 16 bits of a checkpoint
    seconds: float


def compress_all(
    tasks: list[Task],
    settings_of: Callable[[str], Section | None],
    seed: int,
    workers: int,
    done: Callable[[Compressed], None],
    methods: Mapping[str, Method] = METHODS,
) -> Mapping[str, Compressed]:
    """Every task's result by path, `workers` of them at a time; `done` is called in this thread as each one finishes.

    `settings_of` gives the settings of a method by its name.

    Raises QuantizationError with the path of the layer that cannot be compressed.
    """

    def compress(task: Task) -> Compressed:
        started = time.monotonic()
        weight = task.weight.contiguous()  # some families store their experts transposed
        try:
            name, scheme = task.treatment.method, task.treatment.scheme.bound(weight.shape[1])
            rng, settings = generator(seed, task.path), settings_of(name)
            matrix = methods[name](weight, task.statistics, scheme, rng, settings)
        except QuantizationError as error:
            raise QuantizationError(f"{task.path}: {error}") from error
        relative_error = task.statistics.relative_error(weight, _stored(matrix, task.path).dequantize())
        if not math.isfinite(relative_error):
            raise QuantizationError(f"{task.path}: its error is {relative_error}; another seed or scheme may help")
        return Compressed(task.path, task.weight.numel(), matrix, relative_error, time.monotonic() - started)

    for task in tasks:  # before any other layer is blamed for what this one does to its inputs
        if not bool(task.weight.isfinite().all()):
            raise QuantizationError(f"{task.path}: the weight holds NaN or infinite values; the model is damaged")
    # The most expensive first: the last ones to finish are then short.
    order = sorted(tasks, key=lambda task: -task.weight.numel() * task.weight.shape[1])
    results: dict[str, Compressed] = {}
    with single_threaded_pool(workers) as pool:
        waiting = [pool.submit(compress, task) for task in order]
        try:
            for finished in as_completed(waiting):
                results[finished.result().path] = finished.result()
                done(finished.result())
        finally:
            pool.shutdown(cancel_futures=True)
    return results


def _stored(matrix: Matrix, path: str) -> Matrix:
    """The matrix in the 16 bits of a checkpoint. Raises QuantizationError where they cannot hold it."""
    stored = matrix.stored()
    if not all(bool(tensor.isfinite().all()) for tensor in stored.tensors().values()):
        raise QuantizationError(
            f"{path}: its weights are too large for codebooks or scales in float16; leave it out with --skip"
        )
    return stored


@contextmanager
def single_threaded_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `workers` threads whose products use one core each: then a result does not depend on their number."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(_safely_parallel(workers), initializer=_single_threaded) as pool:
        yield pool
    torch.set_num_threads(threads)  # where torch is built without OpenMP it keeps one number for all Python threads


def _safely_parallel(workers: int) -> int:
    """One thread where Numba has neither OpenMP nor TBB: its own `workqueue` must not be entered by two at once."""
    numba.set_num_threads(numba.get_num_threads())  # the layer is chosen at the first use
    return 1 if threading_layer() == "workqueue" else workers


def _single_threaded() -> None:
    torch.set_num_threads(1)
    numba.set_num_threads(1)
