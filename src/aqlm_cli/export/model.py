"""The model to export: the base model, the matrices in place of its weights, and the other changed parameters.

Everything is read when it is asked for, so that a model larger than memory can be exported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from aqlm_cli.errors import ArtifactError, ModelError
from aqlm_cli.models import ModelSource, Network, load_skeleton
from aqlm_cli.models.experts import expert_place
from aqlm_cli.quantization.block_files import OUTSIDE, matrix_files, matrix_kinds, plan_of, read_matrix
from aqlm_cli.runs.artifact import Artifact, rebuild_command
from aqlm_cli.runs.files import read_tensor, tensor_names
from aqlm_cli.spec.schemes import Scheme
from aqlm_kernels import Matrix


@dataclass(frozen=True, eq=False)
class ExportedLayer:
    """The matrix of one linear layer: `[out, in]`, its stored bits in all, and a way to read it, as often as needed."""

    shape: tuple[int, int]
    scheme: Scheme | None  # None where the matrix was not made by one
    label: str  # the scheme, or the kind of matrix, for people
    bits: int
    read: Callable[[], Matrix]


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A base model and all that differs from it.

    `changed` are parameters by their names in the network that are no quantized weight: norms, biases, embeddings.
    `digest` is that of the artifact it was read from; None for a model made in memory.
    """

    base: ModelSource
    network: Network  # of the base model, without values
    layers: Mapping[str, ExportedLayer]  # by path
    changed: Mapping[str, Callable[[], Tensor]]
    digest: str | None = None

    @property
    def scheme(self) -> str:
        """The schemes of all layers, for people."""
        return ", ".join(sorted({layer.label for layer in self.layers.values()}))

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())

    @property
    def stored_bits(self) -> float:
        """Stored bits per quantized weight, as the schemes count them."""
        return sum(layer.bits for layer in self.layers.values()) / self.weights


def read_model(base: ModelSource, quantized: Artifact) -> QuantizedModel:
    """The model that lies in a `quantized/` or `finetuned/` directory; only headers are read.

    Raises ArtifactError where its files hold other layers than its plan, and ModelError where they hold a parameter
    that is not in the network of the base model.
    """
    plan = plan_of(quantized)
    files = {
        path: (name, kind) for name in matrix_files(quantized) for path, kind in matrix_kinds(quantized, name).items()
    }
    if files.keys() != {target.path for target in plan.quantized}:
        fix = rebuild_command(quantized.directory, "quantized")
        raise ArtifactError(f"{quantized.directory} is damaged (its files hold other layers than its plan); {fix}")
    schemes, shapes = plan.schemes, {target.path: (target.out_features, target.in_features) for target in plan.targets}
    layers = {
        path: ExportedLayer(
            shapes[path],
            schemes[path],
            str(schemes[path]),
            schemes[path].stored_bits(*shapes[path]),
            partial(read_matrix, quantized, name, path, kind),
        )
        for path, (name, kind) in files.items()
    }
    network = load_skeleton(base)
    changed = _changed_parameters(network, quantized, layers)
    return QuantizedModel(base, network, layers, changed, quantized.digest)


def _changed_parameters(
    network: Network, quantized: Artifact, paths: Collection[str]
) -> dict[str, Callable[[], Tensor]]:
    """Norms, biases and whatever else was trained with the quantized matrices, by name."""
    parameters = network.state_dict().keys()
    changed: dict[str, Callable[[], Tensor]] = {}
    biases: dict[str, dict[int, Callable[[], Tensor]]] = {}  # of experts: by the parameter of all, and by number
    outside = [OUTSIDE] if OUTSIDE in quantized.manifest.files else []
    for file in map(quantized.path, [*matrix_files(quantized), *outside]):
        for name in tensor_names(file):
            place = expert_place(network, name) if name.endswith(".bias") else None
            if name in parameters:
                changed[name] = partial(read_tensor, file, name)
            elif place is not None:
                biases.setdefault(place.parameter, {})[place.number] = partial(read_tensor, file, name)
            elif name.rpartition(".")[0] not in paths:
                raise ModelError(f"{file} holds {name}, which is not in the base model's network; quantize again")
    return changed | {name: partial(_stacked, parts) for name, parts in biases.items()}


def _stacked(parts: Mapping[int, Callable[[], Tensor]]) -> Tensor:
    """The parameter of all experts, from those of each; a block's file has all of them or none."""
    return torch.stack([parts[number]() for number in sorted(parts)])
