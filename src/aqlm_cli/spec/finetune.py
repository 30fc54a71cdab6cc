"""The settings of finetuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from aqlm_cli.spec.section import LARGEST, Beam, Count, Positive, Rate, Section, understood
from aqlm_cli.spec.units import parse_duration


class CodesConfig(Section):
    """Codes that learn, by the V steps of PV-Tuning (arXiv 2405.14852).

    At each step at most `share` of a matrix's groups get new codes (0: codes stay), after weights that run ahead of
    them at `learning_rate`, the furthest first until the matrix has changed by `trust_ratio` of its norm; None: no
    such bound. `beam` as in `quantize.aqlm`. `state` is the type of the weights ahead, their gradients and moments:
    12 bytes a weight in float32, 6 in bfloat16.
    """

    share: Annotated[float, Field(strict=False, ge=0, le=1)] = 0.0
    learning_rate: Rate = 3e-3
    trust_ratio: Rate | None = 0.01
    beam: Beam = 8
    state: Literal["float32", "bfloat16"] = "float32"


class FinetuneConfig(Section):
    """Distillation of the base model: `steps` of `batch` sequences of `sequence_length` tokens.

    `data`, `sequences` and `bos` are as in `calibrate`, with `self` for text sampled from the base model; None: its
    text, and `bos` as there. A `time_budget`, such as 2h, is turned into `steps` when a run begins. `micro_batch`
    sequences go through the model together: fewer need less memory; `gradient_checkpointing` recomputes each block in
    the backward pass, which needs less still. With `optimizer` adam, `learning_rate` is in units of the root mean
    square that each tensor has at first, with lamb in units of its present norm; it falls as half a cosine to
    `min_lr_ratio` of itself. `embeddings` trains them, and the head, too. `held_out` sequences are the validation
    set, evaluated every `evaluate_every` steps; training ends after `patience` evaluations without gain. The training
    state is written to the disk every `save_every` steps.
    """

    data: str | None = None
    sequences: Positive | None = None
    sequence_length: Annotated[int, Field(ge=2, le=LARGEST)] = 512
    bos: bool | None = None
    steps: Positive = 400
    time_budget: str | None = None
    batch: Positive = 4
    micro_batch: Positive = 4
    gradient_checkpointing: bool = False
    embeddings: bool = False
    optimizer: Literal["adam", "lamb"] = "adam"
    learning_rate: Rate = 2e-3
    warmup_steps: Count = 5
    min_lr_ratio: Annotated[float, Field(strict=False, gt=0, le=1)] = 0.05
    held_out: Positive = 16
    evaluate_every: Positive = 50
    patience: Positive | None = None
    save_every: Positive = 25
    codes: CodesConfig = CodesConfig()

    @field_validator("time_budget")
    @classmethod
    def _is_duration(cls, text: str | None) -> str | None:
        return text if text is None else understood(parse_duration, text)
