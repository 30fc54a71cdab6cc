"""The files of `quantized/` and `finetuned/`, one a block: written, read, and put back into the block of a network.

block-007.safetensors     of every compressed matrix its tensors under the path of its layer, fitted; and every norm
                          and bias of the block. Its metadata says of which kind each matrix is.
tables.safetensors        the same of the matrices outside the blocks, embeddings and head, where any is quantized.
outside.safetensors       what else has learnt outside the blocks, by name, where anything has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from aqlm_cli.errors import ArtifactError, UsageError
from aqlm_cli.models.blocks import replace_module, unfuse
from aqlm_cli.models.plain_linear import is_plain
from aqlm_cli.models.tables import put_table
from aqlm_cli.quantization.training.block import tuned_parameters
from aqlm_cli.runs.artifact import Artifact, rebuild_command
from aqlm_cli.runs.files import load_tensors, read_metadata, save_tensors
from aqlm_cli.spec.plan import Plan
from aqlm_kernels import MATRIX_KINDS, Matrix, QuantizedLayer

OUTSIDE = "outside.safetensors"
TABLES = "tables.safetensors"


def block_file(index: int) -> str:
    return f"block-{index:03d}.safetensors"


def matrix_files(quantized: Artifact) -> list[str]:
    """The names of all files that hold matrices."""
    return [name for name in sorted(quantized.manifest.files) if name.startswith("block-") or name == TABLES]


def plan_of(quantized: Artifact) -> Plan:
    """The plan by which the model was quantized. ArtifactError where the manifest holds none."""
    stored = quantized.result("plan")
    try:
        return Plan.from_json(stored)
    except (UsageError, LookupError, TypeError, ValueError) as error:
        way_out = rebuild_command(quantized.directory, quantized.manifest.kind)
        raise ArtifactError(f"{quantized.directory} is damaged (its manifest holds no plan); {way_out}") from error


def matrix_kinds(quantized: Artifact, name: str) -> dict[str, str]:
    """The kind of every matrix in the file, by the path of its layer."""
    with quantized.reading(name) as file:
        kinds: dict[str, str] = json.loads(read_metadata(file)["kinds"])
        return kinds


def read_matrix(quantized: Artifact, name: str, path: str, kind: str) -> Matrix:
    """Read the matrix of the layer at `path`."""
    with quantized.reading(name) as file:
        return MATRIX_KINDS[kind].from_tensors(load_tensors(file, prefix=f"{path}."))


def outside_tensors(quantized: Artifact) -> dict[str, Tensor]:
    """Trained parameters outside the blocks, by name."""
    if OUTSIDE not in quantized.manifest.files:
        return {}
    with quantized.reading(OUTSIDE) as file:
        return load_tensors(file)


def save_block(file: Path, prefix: str, block: nn.Module, matrices: Mapping[str, Matrix]) -> None:
    """Write the block at `prefix`, in which the matrices by path may have been fitted since."""
    tensors: dict[str, Tensor] = {}
    for name, stored in matrices.items():
        module = block.get_submodule(name.removeprefix(prefix + "."))
        matrix = module.matrix() if isinstance(module, QuantizedLayer) else stored
        tensors.update({f"{name}.{key}": tensor.contiguous() for key, tensor in matrix.tensors().items()})
    vectors = {name: values.detach() for name, values in tuned_parameters(block, prefix).items() if name not in tensors}
    kinds = {name: matrix.kind for name, matrix in sorted(matrices.items())}
    save_tensors(file, {**tensors, **vectors}, {"kinds": json.dumps(kinds)})


def restore_block(quantized: Artifact, index: int, prefix: str, block: nn.Module) -> None:
    """Turn the block of the base model at `prefix` into the quantized one, where its file exists.

    Its experts are single ones, as they were while it was quantized.
    """
    name = block_file(index)
    if name not in quantized.manifest.files:
        return
    unfuse(block)
    for path, kind in matrix_kinds(quantized, name).items():
        put_matrix(block, path.removeprefix(prefix + "."), read_matrix(quantized, name, path, kind))
    with quantized.reading(name) as file:
        stored = load_tensors(file)
    for path, parameter in tuned_parameters(block, prefix).items():
        if path in stored:
            parameter.data.copy_(stored[path])


def save_tables(file: Path, matrices: Mapping[str, Matrix]) -> None:
    """Write the matrices outside the blocks, by path."""
    tensors = {f"{path}.{key}": one.contiguous() for path, m in matrices.items() for key, one in m.tensors().items()}
    save_tensors(file, tensors, {"kinds": json.dumps({path: one.kind for path, one in sorted(matrices.items())})})


def restore_tables(quantized: Artifact, network: nn.Module) -> dict[str, nn.Module]:
    """Put the quantized embeddings and head, where there are any, into the network of the base model.

    Returns their modules by path.
    """
    kinds = matrix_kinds(quantized, TABLES) if TABLES in quantized.manifest.files else {}
    for path, kind in kinds.items():
        put_table(network, path, read_matrix(quantized, TABLES, path, kind))
    return {path: network.get_submodule(path) for path in kinds}


def put_matrix(block: nn.Module, path: str, matrix: Matrix) -> None:
    """Replace the linear layer at `path` in the block by the quantized layer of the matrix."""
    layer = block.get_submodule(path)
    assert is_plain(layer)
    device = layer.weight.device  # a matrix that was read comes on the CPU
    own = next(iter(matrix.tensors().values())).device
    bias = None if layer.bias is None else layer.bias.detach().to(own)
    replace_module(block, path, matrix.module(bias).requires_grad_(False).to(device))
