"""A model before any of its weights is read: what happens to each layer, how large everything is, what a limit allows.

Known from config.json and the headers of the files; from config.json alone where there are no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from aqlm_cli.data.spec import share_sequences
from aqlm_cli.errors import ConfigError, PlanError
from aqlm_cli.export import Layout
from aqlm_cli.export.writer import checkpoint_bytes
from aqlm_cli.formatting import readable_bytes
from aqlm_cli.models import (
    ModelSource,
    load_skeleton,
    plan_of_checkpoint,
    refuse_too_long,
    resolve,
    saved_layouts,
    tensor_index,
    untie_stored,
)
from aqlm_cli.models.blocks import count_parameters, describe_layers, find_blocks
from aqlm_cli.models.hidden_states import compute_dtype
from aqlm_cli.models.tables import describe_tables
from aqlm_cli.models.weight_files import has_weights
from aqlm_cli.pipeline.allocation import ModelFacts
from aqlm_cli.pipeline.stage_reports import PlanReport
from aqlm_cli.spec.config import RunConfig
from aqlm_cli.spec.cost import (
    BlockShape,
    ModelShape,
    Work,
    calibration_disk,
    packing_disk,
    quantization_disk,
    within_memory,
    work_of,
)
from aqlm_cli.spec.plan import OUTSIDE, Plan, Target
from aqlm_cli.spec.quantize import QuantizeConfig
from aqlm_cli.spec.schemes import Scheme
from aqlm_cli.spec.scores import Effects, Solution, expected_scores
from aqlm_cli.spec.treatment import Treatment
from aqlm_cli.spec.units import parse_bytes
from aqlm_kernels import choose, smallest


@dataclass(frozen=True, eq=False)
class Preflight:
    """All that is known of a model before any of its weights is read. `checkpoint` is where its codes come from."""

    source: ModelSource
    checkpoint: ModelSource | None
    plan: Plan
    shape: ModelShape
    layout: Layout  # of the packed checkpoint
    facts: ModelFacts
    expected: Solution | None = None  # what the plan follows, where it is forecast from priors

    def reads_text(self, config: RunConfig) -> bool:
        """Check that text is needed for a quantization with these settings: for embeddings and head it always is."""
        return _reads_text(config, self.plan.tables)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the safetensors of the packed checkpoint, header included."""
        return checkpoint_bytes(self.layout.tensors)


def preflight(
    config: RunConfig, source: ModelSource, allocated: Mapping[str, Treatment | None] | None = None
) -> Preflight:
    """`source` is the model that the settings name, `allocated` what an allocation has decided about its layers.

    Settings with a target and no allocation yet give the plan that is expected of one.

    Raises ModelError where the files do not hold what config.json asks for, ConfigError where the settings ask for
    other codes than those of the checkpoint that they name, and PlanError where what comes of them could not be packed.
    """
    from aqlm_cli.models.trial import refuse_gaps  # takes seconds to import, as a network does

    section, checkpoint = config.quantize, _checkpoint_of(config)
    if section.reads_text:
        refuse_too_long(source, config.calibrate.sequence_length, "--sequence-length")
    network = load_skeleton(source)
    there = tensor_index(source.directory) if has_weights(source.directory) else None
    untie_stored(network, there or ())
    stored = saved_layouts(network) if there is None else {name: tensor.layout for name, tensor in there.items()}
    if there is not None:
        refuse_gaps(source, network, stored)
    layers = (*describe_tables(network), *describe_layers(network))
    facts, expected = ModelFacts(network, stored, layers, count_parameters(network)), None
    if checkpoint is not None:
        plan = plan_of_checkpoint(checkpoint, source, network, layers, facts.parameters)
        _refuse_other_codes(section, plan.scheme)
    else:
        if section.target.question is not None and allocated is None:
            expected = expected_solution(config, facts)
            allocated = expected.treatments
        plan = facts.plan(config, allocated or {})
    layout = facts.layout(config, plan)
    return Preflight(source, checkpoint, plan, model_shape(network, plan), layout, facts, expected)


def expected_solution(config: RunConfig, facts: ModelFacts) -> Solution:
    """The allocation that the priors expect. PlanError where no choice keeps the target."""
    layers = facts.open_layers(config)
    return facts.solve(config, expected_scores(layers), Effects(), facts.goal(config, layers))


def _refuse_other_codes(section: QuantizeConfig, scheme: str) -> None:
    """ConfigError for settings that ask for other codes than the imported ones; the run file may repeat those."""
    decided = QuantizeConfig(scheme=scheme)
    for name in sorted(
        section.model_fields_set & {"method", "scheme", "embeddings", "head", "layers", "target", "skip", "only"}
    ):
        if getattr(section, name) != getattr(decided, name):
            line = f"quantize.{name} has no effect where the codes of {section.import_from} are imported; leave it out"
            raise ConfigError(line)


def _checkpoint_of(config: RunConfig) -> ModelSource | None:
    """The AQLM checkpoint from which the codes are imported, if any."""
    name = config.quantize.import_from
    return None if name is None else resolve(name, trust_remote_code=config.trust_remote_code)


def model_shape(network: nn.Module, plan: Plan) -> ModelShape:
    """The sizes that a cost estimate needs; the network may be without weights."""
    blocks = find_blocks(network)
    targets: dict[str, list[Target]] = {path: [] for path in blocks.paths}
    for target in plan.targets:
        if target.kind not in OUTSIDE:
            targets[next(path for path in blocks.paths if target.path.startswith(path + "."))].append(target)
    shapes = tuple(
        BlockShape(tuple(targets[path]), sum(parameter.numel() for parameter in module.parameters()))
        for path, module in zip(blocks.paths, blocks.modules, strict=True)
    )
    inside = {id(parameter) for module in blocks.modules for parameter in module.parameters()}
    matrices = [tensor for tensor in network.parameters() if tensor.ndim == 2 and id(tensor) not in inside]
    vocabulary, hidden = max((tuple(tensor.shape) for tensor in matrices), key=math.prod, default=(0, 0))
    outside = count_parameters(network) - sum(shape.parameters for shape in shapes)
    return ModelShape(shapes, outside, vocabulary, hidden, plan.tables)


def _reads_text(config: RunConfig, tables: Sequence[Target]) -> bool:
    section = config.quantize
    return section.import_from is None and (section.reads_text or bool(tables))


def planned_work(config: RunConfig, shape: ModelShape) -> Work:
    """The workload of the settings, cut down to `max_memory`; PlanError where that is impossible."""
    reads_text = _reads_text(config, shape.tables)
    text = share_sequences(config.calibrate.data, config.calibrate.sequences) if reads_text else []
    windows = sum(count for _, count in text)
    product_bytes = compute_dtype(torch.device(config.device)).itemsize
    work = work_of(config, windows, torch.get_num_threads(), product_bytes)
    return within_memory(shape, work, parse_bytes(config.max_memory) if config.max_memory else None)


def within_limits(config: RunConfig, known: Preflight) -> RunConfig:
    """The settings with the batch that `max_memory` allows: it decides the last bits, and so stands in the run file.

    Raises PlanError where `max_memory` or `max_disk` cannot be kept.
    """
    work = planned_work(config, known.shape)
    needed = max(disk_needed(known, work).values())
    if config.max_disk is not None and needed > parse_bytes(config.max_disk):
        raise PlanError(
            f"--max-disk {config.max_disk}: this run needs {readable_bytes(needed)}; use fewer sequences "
            "(--data or --sequences), or raise the limit"
        )
    return config.model_copy(update={"quantize": config.quantize.model_copy(update={"batch": work.batch})})


def disk_needed(known: Preflight, work: Work) -> dict[str, int]:
    """The most that the run has on the disk in each stage."""
    return {
        "calibrate": calibration_disk(known.shape, work),
        "quantize": quantization_disk(known.shape, work),
        "pack": packing_disk(known.shape, work, known.packed_bytes),
    }


def plan_report(config: RunConfig, known: Preflight) -> PlanReport:
    plan = known.plan
    device = torch.device(config.device)
    return PlanReport(
        model=config.model,
        method=plan.method,
        scheme=plan.scheme,
        layers=len(plan.quantized),
        code_bits=plan.code_bits,
        stored_bits=plan.stored_bits,
        bytes_before=plan.bytes_before,
        bytes_after=known.layout.total_bytes,
        kernel="; ".join(sorted({one for scheme in plan.schemes.values() if (one := _kernel(scheme, device))})) or None,
        schemes={path: str(scheme) for path, scheme in plan.schemes.items()},
        skipped=tuple((target.path, target.reason) for target in plan.targets if target.reason is not None),
    )


def _kernel(scheme: Scheme, device: torch.device) -> str | None:
    """The matmul kernel for quantized layers on this machine, and whether it is slow; None: torch."""
    if scheme.codebook_shape is None:
        return None
    backend = choose(smallest(*scheme.codebook_shape), device)
    if backend.fast:
        return backend.name
    return f"{backend.name}: no fast kernel for {scheme} on this machine; schemes of 8 bits a code have one"
