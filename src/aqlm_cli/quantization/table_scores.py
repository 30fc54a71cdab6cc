"""Embeddings and head in every scheme that an allocation may give them, by a fast search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from aqlm_cli.events import Advanced, Emit, StageStarted
from aqlm_cli.models import Network
from aqlm_cli.quantization.parallel import Compressed
from aqlm_cli.quantization.tables import TableStatistics, quantize_table, rows_to_search
from aqlm_cli.seeds import generator
from aqlm_cli.spec.choices import OpenLayer
from aqlm_cli.spec.methods.aqlm import FAST
from aqlm_cli.spec.treatment import Treatment
from aqlm_kernels import Matrix


def quantize_tables(
    network: Network,
    layers: Iterable[OpenLayer],
    statistics: Callable[[OpenLayer], TableStatistics],
    seed: int,
    workers: int,
    kept: Callable[[str, Treatment], Matrix | None],
    keep: Callable[[str, Treatment, Compressed], None],
    emit: Emit,
) -> None:
    """Quantize each of these tables to all of its schemes that are not `kept`, and `keep` every finished one.

    A refined scheme takes its base from those before it.
    """
    for layer in layers:
        weight = network.get_parameter(f"{layer.path}.weight").detach()
        for treatment in (choice.treatment for choice in layer.choices):
            if treatment is None or kept(layer.path, treatment) is not None:
                continue
            started = time.monotonic()
            settings = {"aqlm": FAST}.get(treatment.method)
            rng = generator(seed, f"{layer.path}@{treatment}")
            base = None if treatment.base is None else kept(layer.path, treatment.base)
            stage = f"{layer.path} to {treatment.scheme}"
            emit(StageStarted(stage, rows_to_search(weight, treatment.scheme, base), "row"))
            made = quantize_table(
                weight,
                statistics(layer),
                treatment.scheme,
                settings,
                rng,
                workers,
                base,
                done=lambda rows, stage=stage: emit(Advanced(stage, rows)),  # type: ignore[misc]
            )
            seconds = time.monotonic() - started
            one = Compressed(layer.path, layer.weights, made.matrix.stored(), made.relative_error, seconds)
            keep(layer.path, treatment, one)
