"""The student of a distillation: a quantized network in training, its teacher, and the files that it becomes.

finetuned/
    block-007.safetensors   as in quantized/ (block_files.py)
    tables.safetensors      likewise
    outside.safetensors     trained parameters outside the blocks, by name: the last norm; with --embeddings those, too
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aqlm_cli.errors import ModelError, QuantizationError, UsageError
from aqlm_cli.models import ModelSource, Network, attend_blockwise, halves_of, load_network, stored_parameters
from aqlm_cli.models.blocks import find_blocks, replace_module
from aqlm_cli.models.hidden_states import compute_dtype
from aqlm_cli.quantization.block_files import (
    OUTSIDE,
    TABLES,
    block_file,
    matrix_kinds,
    outside_tensors,
    read_matrix,
    restore_block,
    restore_tables,
    save_block,
    save_tables,
)
from aqlm_cli.quantization.training.block import round_block, round_to_16_bits, tuned_parameters
from aqlm_cli.quantization.training.dense_head import DenseHead
from aqlm_cli.quantization.training.distill import Distillation, Training, begin
from aqlm_cli.quantization.training.distributed import World
from aqlm_cli.runs.artifact import Artifact
from aqlm_cli.runs.files import save_tensors
from aqlm_cli.spec.finetune import FinetuneConfig
from aqlm_kernels import AdditiveLinear, coded_layers


@dataclass(frozen=True, eq=False)
class Text:
    """Token ids `[sequences, L]` to train on, and those of the validation set."""

    training: Tensor
    held_out: Tensor


@dataclass(frozen=True, eq=False)
class Student:
    """The network in training, by its blocks and its other trained parameters."""

    start: Artifact
    blocks: Mapping[str, tuple[str, nn.Module]]  # path and module of each block with a quantized layer, by its file
    tables: Mapping[str, Any]  # quantized embeddings and head, by path
    outside: Mapping[str, nn.Parameter]  # other trained parameters outside the blocks, by name
    names: Mapping[str, list[str]]  # names of every parameter in the files of the base model
    data: Distillation

    def begin(self, settings: FinetuneConfig) -> Training:
        parameters = {**self.outside, **trained_tables(self.tables)}
        layers: dict[str, AdditiveLinear] = {}
        for prefix, block in self.blocks.values():
            parameters |= tuned_parameters(block, prefix)
            layers |= coded_layers(block, prefix)
        if settings.codes.share and not layers:
            raise UsageError("--codes: no layer of this run has codes")
        if not parameters:
            raise QuantizationError("the model has no codebooks, norms or biases to be trained")
        return begin(self.data, parameters, layers, settings)

    def round(self) -> None:
        """Round everything trained to the 16 bits in which it is stored."""
        for prefix, block in self.blocks.values():
            round_block(block, prefix)
        for table in self.tables.values():
            round_block(table)
        round_to_16_bits(self.outside)

    def save(self, directory: Path) -> None:
        """Write the files of `finetuned/`."""
        for name, (prefix, block) in self.blocks.items():
            kinds = matrix_kinds(self.start, name)
            matrices = {path: read_matrix(self.start, name, path, kind) for path, kind in kinds.items()}
            save_block(directory / name, prefix, block, matrices)
        if self.tables:
            save_tables(directory / TABLES, {path: table.matrix() for path, table in self.tables.items()})
        moved = {stored: self.outside[name].detach() for name in self.outside for stored in self.names[name]}
        trained = outside_tensors(self.start) | moved
        if trained:
            save_tensors(directory / OUTSIDE, trained, {})


def load_student(
    source: ModelSource, start: Artifact, settings: FinetuneConfig, text: Text, device: torch.device, world: World
) -> Student:
    """Load the base model twice, as teacher and as student, and make of the student what `start` holds."""
    student = load_network(source, torch.float32, device)
    teacher = load_network(source, compute_dtype(device), device)
    for network in (student, teacher):
        attend_blockwise(network)
    names = names_in_files(student, stored_parameters(student, source))
    tables = restore_tables(start, student)
    outside = _trained_outside(student, tables, settings.embeddings)
    if nameless := [name for name in outside if not names[name]]:
        raise ModelError(f"the model's files have no tensor for {nameless[0]}; save the model with save_pretrained")
    changed = outside_tensors(start)
    for name, values in changed.items():
        student.get_parameter(name).data.copy_(values)
    blocks = _restore_blocks(student, start, settings.gradient_checkpointing)
    coded_head = _unfolded_head(student, tables)
    head = tuple(student.get_output_embeddings().parameters())
    halves, teacher_halves = halves_of(student), halves_of(teacher)
    # The teacher's weights are in the compute dtype already; the student's would be converted for every chunk.
    own_head = coded_head or settings.embeddings
    own_head = own_head or any(student.get_parameter(name) is one for name in changed for one in head)
    learning_head = head if settings.embeddings else ()
    data = Distillation(
        student=halves.states,
        teacher=teacher_halves.states,
        student_head=halves.logits if own_head else teacher_halves.logits,
        teacher_head=teacher_halves.logits,
        trained_head=(lambda: learning_head) if coded_head is None else coded_head.unfold,
        training=text.training,
        held_out=text.held_out,
        dtype=compute_dtype(device),
        device=device,
        world=world,
    )
    return Student(start, blocks, tables, outside, names, data)


def _restore_blocks(
    student: Network, start: Artifact, gradient_checkpointing: bool
) -> dict[str, tuple[str, nn.Module]]:
    """Put the quantized blocks into the network; return path and module of each by its file."""
    blocks, quantized = find_blocks(student), {}
    for index, (prefix, block) in enumerate(zip(blocks.paths, blocks.modules, strict=True)):
        if block_file(index) in start.manifest.files:
            restore_block(start, index, prefix, block)
            quantized[block_file(index)] = (prefix, block)
        if gradient_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return quantized


def _unfolded_head(student: Network, tables: Mapping[str, Any]) -> DenseHead | None:
    """Put the quantized head, if the network has one, into a DenseHead, which is returned."""
    head = student.get_output_embeddings()
    if all(head is not table and head is not getattr(table, "table", None) for table in tables.values()):
        return None
    places = [path for path, module in student.named_modules(remove_duplicate=False) if module is head]
    path = next(path for path in places if not path.endswith(".table"))  # where the tied embeddings hold it
    dense = DenseHead(head)
    replace_module(student, path, dense)
    return dense


def trained_tables(tables: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """The codebooks, scales and biases of quantized embeddings and heads, by path and name."""
    return {
        f"{path}.{name}": parameter for path, table in tables.items() for name, parameter in table.trainable().items()
    }


def _trained_outside(student: Network, tables: Mapping[str, Any], embeddings: bool) -> dict[str, nn.Parameter]:
    """Parameters outside the blocks that are trained and in no table: vectors, but not the head's.

    With `embeddings` all of them.
    """
    coded = {id(parameter) for parameter in trained_tables(tables).values()}
    outside = {name: one for name, one in outside_blocks(student).items() if id(one) not in coded}
    if embeddings:
        return outside
    head = {id(parameter) for parameter in student.get_output_embeddings().parameters()}
    return {name: one for name, one in outside.items() if one.ndim == 1 and id(one) not in head}


def names_in_files(network: nn.Module, stored: Collection[str]) -> dict[str, list[str]]:
    """All names of each parameter that are `stored`, by its first name: two for a tied head in some files."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).extend([name] if name in stored else [])
    return {name: names[id(parameter)] for name, parameter in network.named_parameters()}


def outside_blocks(network: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters outside the blocks by name; a head tied to the embeddings comes once."""
    inside = {id(parameter) for block in find_blocks(network).modules for parameter in block.parameters()}
    return {name: parameter for name, parameter in network.named_parameters() if id(parameter) not in inside}
