"""Embeddings and head in every scheme that an allocation may give them, by a fast search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from aqlm_cli.models import Network
from aqlm_cli.quantization.parallel import Compressed
from aqlm_cli.quantization.tables import TableStatistics, quantize_table
from aqlm_cli.seeds import generator
from aqlm_cli.spec.choices import OpenLayer
from aqlm_cli.spec.methods.aqlm import FAST
from aqlm_cli.spec.treatment import Treatment


def quantize_tables(
    network: Network,
    layers: Iterable[OpenLayer],
    statistics: Callable[[OpenLayer], TableStatistics],
    seed: int,
    workers: int,
    missing: Callable[[str, Treatment], bool],
    keep: Callable[[str, Treatment, Compressed], None],
) -> None:
    """Quantize each of these tables to all of its schemes that are `missing`, and `keep` every finished one."""
    for layer in layers:
        weight = network.get_parameter(f"{layer.path}.weight").detach()
        for treatment in (choice.treatment for choice in layer.choices):
            if treatment is None or not missing(layer.path, treatment):
                continue
            started = time.monotonic()
            settings = {"aqlm": FAST}.get(treatment.method)
            rng = generator(seed, f"{layer.path}@{treatment}")
            made = quantize_table(weight, statistics(layer), treatment.scheme, settings, rng, workers)
            seconds = time.monotonic() - started
            one = Compressed(layer.path, layer.weights, made.matrix.stored(), made.relative_error, seconds)
            keep(layer.path, treatment, one)
