"""Embeddings and head from the statistics of the base model to their matrices.

The inputs of the head are collected by `calibrate`, the gradients of the embeddings by `quantize`, where it needs them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from aqlm_cli.errors import ArtifactError
from aqlm_cli.events import Advanced, Emit, StageStarted
from aqlm_cli.models.gradients import Watch, embedding_gradients
from aqlm_cli.models.tables import output_head
from aqlm_cli.models.walk import Walk
from aqlm_cli.quantization.tables import (
    QuantizedTable,
    TableMoments,
    TableStatistics,
    quantize_table,
    rows_to_search,
)
from aqlm_cli.runs.artifact import Artifact, rebuild_command
from aqlm_cli.runs.files import load_tensors, save_tensors, storage_errors
from aqlm_cli.seeds import generator
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.plan import Target

FILE = "table_statistics.safetensors"

METRIC_FILE, METRIC = "embedding_metric.safetensors", "metric"
"""File and tensor in which an allocation keeps the result of `embedding_metric`."""

STAGE = "gradients of the embeddings"

GRADIENT_SEQUENCES, GRADIENT_TOKENS = 8, 1024
"""Text for the gradients, at most."""


def moments_of(network: nn.Module) -> TableMoments | None:
    """Statistics, still empty, for the head of a network and for its embeddings; None where it has no head."""
    head = output_head(network)
    if head is None:
        return None
    rows, features = head.weight.shape
    embeddings = network.get_input_embeddings().weight  # type: ignore[operator]
    return TableMoments(max(rows, len(embeddings)), features, head.weight.device)


@contextmanager
def watched_head(network: nn.Module, moments: TableMoments | None, ids: Tensor) -> Iterator[None]:
    """Add the token ids `[b, L]` and the inputs of the head to the statistics, for the forward pass in this context."""
    if moments is None:
        yield
        return
    head, taken = output_head(network), list[Tensor]()
    assert head is not None
    hook = head.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].flatten(0, -2)))
    try:
        yield
    finally:
        hook.remove()
    for hidden in taken:
        with torch.autocast(hidden.device.type, enabled=False):
            moments.add(ids.flatten().to(hidden.device), hidden.float(), head)


def save_statistics(directory: Path, moments: TableMoments | None) -> None:
    """Write them into the directory of the calibration, where there are any."""
    if moments is not None:
        found = moments.statistics(head=True, embedding=True)
        assert found.head is not None and found.embedding is not None
        tensors = {"head": found.head, "embedding": found.embedding, "row_weights": found.row_weights}
        save_tensors(directory / FILE, {name: tensor.cpu() for name, tensor in tensors.items()}, {})


def read_statistics(calibration: Artifact, target: Target, gradients: Tensor | None = None) -> TableStatistics:
    """The statistics of embeddings, a head, or a table that is both; `gradients` as `embedding_metric` gives them.

    Raises ArtifactError where the calibration has none.
    """
    if FILE not in calibration.manifest.files:
        way_out = rebuild_command(calibration.directory, calibration.manifest.kind)
        raise ArtifactError(f"{calibration.directory} has no statistics of embeddings and head; {way_out}")
    with calibration.reading(FILE) as file:
        stored = load_tensors(file)
    return TableStatistics(
        head=None if target.kind == "embedding" else stored["head"],
        embedding=None if target.kind == "head" else stored["embedding"] if gradients is None else gradients,
        row_weights=stored["row_weights"][: target.out_features],
    )


def known_metric(allocation: Artifact | None) -> Tensor | None:
    """Result of `embedding_metric` that an allocation keeps, for the same sequences; None where there is none."""
    if allocation is None or METRIC_FILE not in allocation.manifest.files:
        return None
    with allocation.reading(METRIC_FILE) as file:
        return load_tensors(file)[METRIC]


def gradient_text(ids: Tensor) -> Tensor:
    """The part of the sequences `[n, L]` on which gradients are measured."""
    return ids[:GRADIENT_SEQUENCES, :GRADIENT_TOKENS]


def embedding_metric(
    walk: Walk,
    ids: Tensor,
    directory: Path,
    rng: torch.Generator,
    emit: Emit,
    watch: Watch = lambda path, block: nullcontext(),
) -> Tensor:
    """The price of errors of the embeddings `[d, d]`, by the gradients of the base model's loss on some sequences.

    `ids` are all sequences `[n, L]`, of which `gradient_text` is used; `directory` is for states, and is empty
    afterwards. `watch` sees the passes through every block.
    """
    chosen = gradient_text(ids)
    emit(StageStarted(STAGE, 2 * len(walk.paths), "block"))
    with storage_errors(directory):
        shutil.rmtree(directory, ignore_errors=True)  # what an interruption left
        directory.mkdir(parents=True)
    found = embedding_gradients(walk, chosen, directory, rng, lambda passed: emit(Advanced(STAGE, passed)), watch)
    moments = TableMoments(1, found.shape[-1], torch.device("cpu"))
    for one in torch.arange(len(chosen)).split(1):
        moments.add_gradients(found[one].flatten(0, -2))
    shutil.rmtree(directory, ignore_errors=True)
    metric = moments.statistics(head=False, embedding=True).embedding
    assert metric is not None
    return metric


def table_of(
    target: Target,
    walk: Walk,
    ids: Tensor,
    calibration: Artifact,
    config: RunConfig,
    work: Path,
    emit: Emit,
    gradients: Tensor | None = None,
) -> QuantizedTable:
    """Quantize embeddings or a head of the walk's network, which are still those of the base model.

    `ids` are the sequences `[n, L]` of the calibration. The result depends on nothing else: not on threads, nor on
    what else is quantized. `gradients` are what `embedding_metric` gives for them, if that is known.
    """
    treatment, seed = target.treatment, config.seed
    assert treatment is not None
    if target.kind != "head" and gradients is None:
        gradients = embedding_metric(walk, ids, work / "gradients", generator(seed, STAGE), emit)
    statistics = read_statistics(calibration, target, gradients)
    weight = walk.network.get_submodule(target.path).weight
    assert isinstance(weight, Tensor)
    settings, rng = config.quantize.settings_of(treatment.method), generator(seed, target.path)
    stage = f"{target.path} to {treatment.scheme}"
    emit(StageStarted(stage, rows_to_search(weight, treatment.scheme), "row"))
    return quantize_table(
        weight.detach(),
        statistics,
        treatment.scheme,
        settings,
        rng,
        torch.get_num_threads(),
        done=lambda rows: emit(Advanced(stage, rows)),
    )
