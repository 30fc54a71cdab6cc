"""A quantized model on its way through `finetune`: the network that learns, its teacher, and what becomes of it.

finetuned/
    block-007.safetensors   as in quantized/ (quantized.py)
    outside.safetensors     what learnt outside the blocks, by name: the last norm, and embeddings and head if asked
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
from aqlm_cli.models import ModelSource, attend_blockwise, halves_of, load_network, stored_parameters
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
class Student:
    start: Artifact
    blocks: Mapping[str, tuple[str, nn.Module]]  # those in which anything is quantized, by the file of each
    outside: Mapping[str, nn.Parameter]  # what learns beside them, by name
    names: Mapping[str, list[str]]  # of each of these, those for which the original's files have it
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
        """To the 16 bits in which all of it will be stored."""
        for prefix, block in self.blocks.values():
            round_block(block, prefix)
        round_to_16_bits(self.outside)

    def save(self, directory: Path) -> None:
        for name, (prefix, block) in self.blocks.items():
            kinds = matrix_kinds(self.start, name)
            matrices = {path: read_matrix(self.start, name, path, kind) for path, kind in kinds.items()}
            save_block(directory / name, prefix, block, matrices)
        moved = {stored: self.outside[name].detach() for name in self.outside for stored in self.names[name]}
        learnt = outside_tensors(self.start) | moved
        if learnt:
            save_tensors(directory / OUTSIDE, learnt, {})


def load_student(
    source: ModelSource,
    start: Artifact,
    settings: FinetuneConfig,
    text: Tensor,
    held_out: Tensor,
    device: torch.device,
    world: World,
) -> Student:
    """From the original and what was made of it in `start`; `text` and `held_out` are token ids `[windows, L]`."""
    dtype = compute_dtype(device)
    student, teacher = load_network(source, torch.float32, device), load_network(source, dtype, device)
    for network in (student, teacher):
        attend_blockwise(network)
    found, blocks = find_blocks(student), {}
    learnt = outside_tensors(start)
    for name, values in learnt.items():
        student.get_parameter(name).data.copy_(values)
    head = list(student.get_output_embeddings().parameters())
    outside = outside_blocks(student)
    if not settings.embeddings:
        still = {id(parameter) for parameter in head}
        outside = {name: one for name, one in outside.items() if one.ndim == 1 and id(one) not in still}
    names = names_in_files(student, stored_parameters(student, source))
    if nameless := [name for name in outside if not names[name]]:
        raise ModelError(f"the model's files have no tensor for {nameless[0]}; save the model with save_pretrained")
    for index, (prefix, block) in enumerate(zip(found.paths, found.modules, strict=True)):
        if block_file(index) in start.manifest.files:
            restore_block(start, index, prefix, block)
            blocks[block_file(index)] = (prefix, block)
        if settings.gradient_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    student_halves, original = halves_of(student), halves_of(teacher)
    # The teacher's weights are in the compute dtype already; the student's would be converted for every chunk.
    own_head = settings.embeddings or any(student.get_parameter(name) is one for name in learnt for one in head)
    data = Distillation(
        student=student_halves.states,
        teacher=original.states,
        student_head=student_halves.logits if own_head else original.logits,
        teacher_head=original.logits,
        trained_head=tuple(head) if settings.embeddings else (),
        training=text,
        held_out=held_out,
        dtype=dtype,
        device=device,
        world=world,
    )
    return Student(start, blocks, outside, names, data)


def names_in_files(network: nn.Module, stored: Collection[str]) -> dict[str, list[str]]:
    """For each parameter by its first name all of its names that are `stored`: two for a tied head in some files."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).extend([name] if name in stored else [])
    return {name: names[id(parameter)] for name, parameter in network.named_parameters()}


def outside_blocks(network: nn.Module) -> dict[str, nn.Parameter]:
    """By name; a head tied to the embeddings comes once."""
    inside = {id(parameter) for block in find_blocks(network).modules for parameter in block.parameters()}
    return {name: parameter for name, parameter in network.named_parameters() if id(parameter) not in inside}
