"""Quantization without text: the weights alone, block by block, and no block is run.

For methods that look at nothing else, such as round to nearest. The errors that are told are those of the weights: the
Hessian of every layer is the identity, as if all its inputs were alike and independent.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from aqlm_cli.events import Advanced
from aqlm_cli.memory import give_back_memory
from aqlm_cli.models import BlockLoader
from aqlm_cli.models.blocks import find_blocks, unfuse
from aqlm_cli.pipeline.block_work import BlockWork, compress_block, figures_of
from aqlm_cli.pipeline.job import Job
from aqlm_cli.pipeline.preflight import planned_work
from aqlm_cli.quantization.block_files import block_file, save_block
from aqlm_cli.quantization.resume import ResumeState
from aqlm_cli.quantization.solvers.hessian import LayerStatistics
from aqlm_cli.quantization.training.block import round_block
from aqlm_cli.runs.artifact import Stage
from aqlm_cli.runs.stages import QUANTIZE


def quantize_weights(job: Job, stage: Stage) -> list[dict[str, Any]]:
    """Write the file of every block that has something to quantize, and return what was measured of each block.

    Finished blocks are on the disk: after an interruption the same command resumes behind them, to the same bytes.
    """
    config, preflight = job.config, job.preflight
    workers = planned_work(config, preflight.shape).workers
    work = BlockWork(config, preflight.plan.treatments, workers, stage, ResumeState(stage.work), job.emit)
    load = BlockLoader(job.source, torch.float32, config.device)
    paths = find_blocks(preflight.facts.network).paths
    blocks = max(n + 1 for n, path in enumerate(paths) if any(one.startswith(f"{path}.") for one in work.treatments))
    done = work.resume_state.blocks_of_weights
    work.begin(done, blocks)
    started = time.monotonic()
    for index in range(done, blocks):
        block = unfuse(load(index))
        compressed, _ = compress_block(work, paths[index], block, without_text)
        if compressed:
            round_block(block, paths[index])
            matrices = {path: one.matrix for path, one in compressed.items()}
            save_block(stage.directory / block_file(index), paths[index], block, matrices)
        started += work.record(index, {"layers": figures_of(compressed)}, started)
        work.resume_state.forget_matrices()
        give_back_memory()
        job.emit(Advanced(QUANTIZE.name, index + 1))
    return [work.resume_state.recorded(index) for index in range(blocks)]


def without_text(chosen: Mapping[str, nn.Linear]) -> dict[str, LayerStatistics]:
    """Statistics of layers whose inputs nothing is known of, by path; layers of one width share them."""
    widths = {layer.weight.shape[1]: layer.weight.device for layer in chosen.values()}
    shared = {width: LayerStatistics(torch.eye(width, device=device), 0) for width, device in widths.items()}
    return {path: shared[layer.weight.shape[1]] for path, layer in chosen.items()}
