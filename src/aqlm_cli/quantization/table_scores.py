"""Embeddings and head in every scheme that an allocation may give them, by a fast search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from aqlm_cli.models import Network, halves_of
from aqlm_cli.models.hidden_states import autocast
from aqlm_cli.quantization.parallel import Compressed
from aqlm_cli.quantization.tables import TableMoments, TableStatistics, quantize_table
from aqlm_cli.seeds import generator
from aqlm_cli.spec.choices import OpenLayer
from aqlm_cli.spec.methods.aqlm import FAST
from aqlm_cli.spec.treatment import Treatment


def quantize_tables(
    network: Network,
    layers: Iterable[OpenLayer],
    ids: Tensor,
    dtype: torch.dtype,
    seed: int,
    workers: int,
    missing: Callable[[str, Treatment], bool],
    keep: Callable[[str, Treatment, Compressed], None],
) -> None:
    """Quantize each of these tables to all of its schemes that are `missing`, and `keep` every finished one.

    `ids` `[n, L]` are the sequences whose final hidden states price the errors of a head; `dtype` is the type of the
    matmuls.
    """
    moments: TableMoments | None = None
    for layer in layers:
        for treatment in (choice.treatment for choice in layer.choices):
            if treatment is None or not missing(layer.path, treatment):
                continue
            started = time.monotonic()
            weight = network.get_parameter(f"{layer.path}.weight").detach()
            moments = moments or _moments(network, weight, ids, dtype)
            settings = FAST if treatment.scheme.kind == "additive" else None
            rng = generator(seed, f"{layer.path}@{treatment}")
            made = quantize_table(weight, _duties(moments, layer), treatment.scheme, settings, rng, workers)
            seconds = time.monotonic() - started
            one = Compressed(layer.path, layer.weights, made.matrix, made.relative_error, seconds)
            keep(layer.path, treatment, one)


def _duties(moments: TableMoments, layer: OpenLayer) -> TableStatistics:
    return moments.statistics(head=layer.kind != "embedding", embedding=layer.kind != "head")


@torch.no_grad()
def _moments(network: Network, weight: Tensor, ids: Tensor, dtype: torch.dtype) -> TableMoments:
    """Final hidden states of the sequences, and the probabilities of their next tokens."""
    halves = halves_of(network)
    vocabulary, features = weight.shape
    moments = TableMoments(vocabulary, features, weight.device)
    with autocast(weight.device, dtype):
        for sequence in ids.to(weight.device):
            moments.add(sequence, halves.states(sequence[None])[0], halves.logits)
    return moments
