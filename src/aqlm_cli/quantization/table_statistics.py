"""The statistics of embeddings and head in `calibration/`: collected from the base model there, read by `quantize`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from aqlm_cli.errors import ArtifactError
from aqlm_cli.models.tables import output_head
from aqlm_cli.quantization.tables import TableMoments, TableStatistics
from aqlm_cli.runs.artifact import Artifact, rebuild_command
from aqlm_cli.runs.files import load_tensors, save_tensors

FILE = "table_statistics.safetensors"


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


def read_statistics(calibration: Artifact, kind: str, rows: int) -> TableStatistics:
    """The statistics of a matrix of `rows` rows and of this kind: embedding, head, or table for both in one.

    Raises ArtifactError where the calibration has none.
    """
    if FILE not in calibration.manifest.files:
        way_out = rebuild_command(calibration.directory, calibration.manifest.kind)
        raise ArtifactError(f"{calibration.directory} has no statistics of embeddings and head; {way_out}")
    with calibration.reading(FILE) as file:
        stored = load_tensors(file)
    return TableStatistics(
        head=None if kind == "embedding" else stored["head"],
        embedding=None if kind == "head" else stored["embedding"],
        row_weights=stored["row_weights"][:rows],
    )
