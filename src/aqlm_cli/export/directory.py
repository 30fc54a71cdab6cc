"""Writing a quantized model into a directory, in any format."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from aqlm_cli.errors import ArtifactError, ModelError, UsageError, shortened
from aqlm_cli.export.exporter import Exporter
from aqlm_cli.export.layout import Layout
from aqlm_cli.export.model import ExportedLayer, QuantizedModel
from aqlm_cli.export.model_card import CardFacts, ExportFacts, Origin
from aqlm_cli.export.tensors import narrowing_losses
from aqlm_cli.export.transformers import TransformersExporter
from aqlm_cli.export.writer import write_checkpoint
from aqlm_cli.models import ModelSource, load_skeleton, save_support_files, tensor_index, untie_stored
from aqlm_cli.models.experts import expert_place
from aqlm_cli.runs.files import storage_errors, write_file
from aqlm_cli.spec.schemes import Scheme, parse_scheme
from aqlm_kernels import Matrix


@dataclass(frozen=True, eq=False)
class Export:
    """A model in one format, planned and not yet written."""

    model: QuantizedModel
    exporter: Exporter
    layout: Layout

    def warnings(self) -> list[str]:
        """Losses of this model in this format, for the user."""
        losses = narrowing_losses(self.model, self.layout)
        if not losses:
            return []
        path, loss = max(losses.items(), key=lambda item: item[1])
        return [
            f"{path} has rows so small that float16 loses {loss:.2g} of one's energy, beside the error of its codes"
            f" ({len(losses)} such layers); use a bfloat16 copy of the model"
        ]

    def facts(self) -> ExportFacts:
        return ExportFacts(
            format="dense" if self.layout.quantization is None else self.exporter.name,
            scheme=self.model.scheme,
            nominal_bits=self.model.stored_bits,
            stored_bits=8 * self.layout.bytes_of(self.model.layers) / self.model.weights,
            bytes=sum(layout.bytes for layout in self.layout.tensors.values()),
            layers=len(self.model.layers),
        )

    def write(self, directory: Path, origin: Origin) -> None:
        """Fill an empty directory. ArtifactError where what was written does not read or load as it should."""
        model, base = self.model, self.model.base
        config = self.exporter.config(model, self.layout)
        write_checkpoint(directory, self.exporter.tensors(model, self.layout))
        save_support_files(base, directory)
        write_file(directory / "config.json", json.dumps(config, indent=2, sort_keys=True).encode())
        self.exporter.verify(base, self.layout, directory)
        facts = CardFacts(base.short_name, base.base_model, base.licence, self.facts(), origin)
        write_file(directory / "README.md", self.exporter.card(facts, self.layout).encode())


def plan_export(model: QuantizedModel, exporter: Exporter) -> Export:
    """Plan every tensor. Raises PlanError where the format cannot hold the model."""
    stored = {name: tensor.layout for name, tensor in tensor_index(model.base.directory).items()}
    untie_stored(model.network, stored)
    schemes = {path: layer.scheme for path, layer in model.layers.items()}
    return Export(model, exporter, exporter.layouts(model.network, stored, schemes, model.changed.keys()))


def export(
    base: ModelSource,
    matrices: Mapping[str, Matrix],
    changed: Mapping[str, Tensor],
    directory: Path | str,
    exporter: Exporter = TransformersExporter(),  # noqa: B008 - it has no state
) -> ExportFacts:
    """Write the model at `base` with these matrices, by path of the layer, in place of its weights.

    `changed` are other parameters that differ, by name. Raises ModelError where the network has no such layer or
    parameter, PlanError where the format cannot hold the model, and ArtifactError where `directory` is not empty, or
    what was written does not load; then it is empty again.
    """
    if not isinstance(base, ModelSource):
        raise UsageError(f"export: `base` takes a ModelSource, not {shortened(repr(base))}; `models.resolve` finds one")
    if not matrices:
        raise ModelError(f"export: no matrix is given, so {base.name} would stay as it is; give at least one")
    for path, matrix in matrices.items():
        if not hasattr(matrix, "out_features"):
            raise UsageError(f"export: `matrices` takes a Matrix for {path}, not {type(matrix).__name__}")
    for name, tensor in changed.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise UsageError(f"export: `changed` takes a tensor of floating-point numbers for {name}")
        if name.removesuffix(".weight") in matrices:
            raise UsageError(f"export: {name} is changed, and its layer has a matrix; give one of them")
    network = load_skeleton(base)
    for path, matrix in matrices.items():
        shape, asked = _layer_shape(network, path), (matrix.out_features, matrix.in_features)
        if shape != asked:
            raise ModelError(
                f"{base.name}: {path} is {shape or 'no linear layer'}, and its matrix {asked}; give one that fits"
            )
    parameters = network.state_dict()
    for name, tensor in changed.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ModelError(f"{base.name} has no parameter {name} of the shape {list(tensor.shape)}; leave it out")
    layers = {path: _layer(matrix) for path, matrix in matrices.items()}
    readers = {name: partial(Tensor.detach, tensor) for name, tensor in changed.items()}
    planned = plan_export(QuantizedModel(base, network, layers, readers), exporter)
    with _filling(Path(directory)):
        planned.write(Path(directory), Origin())
    return planned.facts()


@contextlib.contextmanager
def _filling(directory: Path) -> Iterator[None]:
    """An empty directory that is made where it is missing, and empty again where it could not be filled."""
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise ArtifactError(f"{directory} is not empty; choose another directory")
    try:
        yield
    except BaseException:
        for entry in directory.iterdir():
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
        raise


def _layer_shape(network: nn.Module, path: str) -> tuple[int, int] | None:
    """`(out, in)` of the linear layer, the embedding or the expert's matrix at `path`; None where none is."""
    layer, place = dict(network.named_modules()).get(path), expert_place(network, path)
    if place is not None:
        rows, columns = network.get_parameter(place.parameter).shape[1:]
        return (columns, rows) if place.transposed else (rows, columns)
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else None


def _layer(matrix: Matrix) -> ExportedLayer:
    scheme: Scheme | None = None
    with contextlib.suppress(UsageError):  # a matrix may be made by hand, and of no scheme that exists
        scheme = parse_scheme(matrix.scheme)
    label = matrix.kind if scheme is None else str(scheme)
    return ExportedLayer((matrix.out_features, matrix.in_features), scheme, label, matrix.bits(), lambda: matrix)
