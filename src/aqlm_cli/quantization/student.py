"""The student of a distillation: a quantized network in training, its teacher, and the files that it becomes.

finetuned/
    block-007.safetensors   as in quantized/ (block_files.py)
    outside.safetensors     trained parameters outside the blocks, by name: the last norm; with --embeddings those, too
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aqlm_cli.errors import ModelError, QuantizationError, UsageError
from aqlm_cli.models import ModelSource, Network, attend_blockwise, halves_of, load_network, stored_parameters
from aqlm_cli.models.blocks import find_blocks
from aqlm_cli.models.hidden_states import compute_dtype
from aqlm_cli.quantization.block_files import (
    OUTSIDE,
    block_file,
    matrix_kinds,
    outside_tensors,
    read_matrix,
    restore_block,
    save_block,
)
from aqlm_cli.quantization.training.block import round_block, round_to_16_bits, tuned_parameters
from aqlm_cli.quantization.training.distill import Distillation, Training, begin
from aqlm_cli.quantization.training.distributed import World
from aqlm_cli.runs.artifact import Artifact
from aqlm_cli.runs.files import save_tensors
from aqlm_cli.spec.config import FinetuneConfig
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
    outside: Mapping[str, nn.Parameter]  # trained parameters outside the blocks, by name
    names: Mapping[str, list[str]]  # names of every parameter in the files of the base model
    data: Distillation

    def begin(self, settings: FinetuneConfig) -> Training:
        parameters = dict(self.outside)
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
        round_to_16_bits(self.outside)

    def save(self, directory: Path) -> None:
        """Write the files of `finetuned/`."""
        for name, (prefix, block) in self.blocks.items():
            kinds = matrix_kinds(self.start, name)
            matrices = {path: read_matrix(self.start, name, path, kind) for path, kind in kinds.items()}
            save_block(directory / name, prefix, block, matrices)
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
    outside = _trained_outside(student, settings.embeddings)
    if nameless := [name for name in outside if not names[name]]:
        raise ModelError(f"the model's files have no tensor for {nameless[0]}; save the model with save_pretrained")
    changed = outside_tensors(start)
    for name, values in changed.items():
        student.get_parameter(name).data.copy_(values)
    blocks = _restore_blocks(student, start, settings.gradient_checkpointing)
    head = tuple(student.get_output_embeddings().parameters())
    halves, teacher_halves = halves_of(student), halves_of(teacher)
    # The teacher's weights are in the compute dtype already; the student's would be converted for every chunk.
    own_head = settings.embeddings or any(student.get_parameter(name) is one for name in changed for one in head)
    data = Distillation(
        student=halves.states,
        teacher=teacher_halves.states,
        student_head=halves.logits if own_head else teacher_halves.logits,
        teacher_head=teacher_halves.logits,
        trained_head=head if settings.embeddings else (),
        training=text.training,
        held_out=text.held_out,
        dtype=compute_dtype(device),
        device=device,
        world=world,
    )
    return Student(start, blocks, outside, names, data)


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


def _trained_outside(student: Network, embeddings: bool) -> dict[str, nn.Parameter]:
    """Parameters outside the blocks that are trained: vectors, but not the head's; with `embeddings` all of them."""
    outside = outside_blocks(student)
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
