"""The run file as frozen records, one section a stage. Defaults are written beside each section; run_file.py reads
and merges."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from aqlm_cli.spec.evaluate import BenchConfig, EvalConfig, EvaluateConfig
from aqlm_cli.spec.finetune import FinetuneConfig
from aqlm_cli.spec.probe import ProbeConfig
from aqlm_cli.spec.quantize import QuantizeConfig
from aqlm_cli.spec.section import LARGEST, Count, Positive, Section, understood
from aqlm_cli.spec.units import parse_bytes

DEFAULT_SEQUENCES = 192
"""Calibration sequences where neither `calibrate.sequences` nor any source of `calibrate.data` has a count."""


class CalibrateConfig(Section):
    """The calibration set, cut into sequences of `sequence_length` tokens.

    `sequences` in all; None: the sum of the sources' own counts, or DEFAULT_SEQUENCES where none has one.
    `statistics_sequences` of them measure the diagonal of every layer's Hessian. `bos`: each sequence begins with
    the beginning-of-text token; None: where the tokenizer puts it before a text by itself.
    """

    data: str = "c4"
    sequences: Positive | None = None
    sequence_length: Annotated[int, Field(ge=2, le=LARGEST)] = 1024
    bos: bool | None = None
    statistics_sequences: Positive = 16


PackFormat: TypeAlias = Literal["auto", "transformers", "native", "dense"]
"""Names of the exporters, which lie where torch may be imported: `export.EXPORTERS`."""


class PackConfig(Section):
    """`format` auto: transformers where that holds every matrix at the bits of its scheme, else native."""

    format: PackFormat = "auto"


class RunConfig(Section):
    """A complete run file. `threads` None: as many as the machine has. `max_memory` and `max_disk`, such as 8GiB, bound
    what a quantization takes; None: nothing does."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    seed: Count = 0
    threads: Positive | None = None
    device: str = "cpu"
    max_memory: str | None = None
    max_disk: str | None = None
    calibrate: CalibrateConfig = CalibrateConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    pack: PackConfig = PackConfig()
    eval_ppl: EvalConfig = EvalConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    probe: ProbeConfig = ProbeConfig()
    bench: BenchConfig = BenchConfig()

    @field_validator("max_memory", "max_disk")
    @classmethod
    def _is_size(cls, text: str | None) -> str | None:
        return text if text is None else understood(parse_bytes, text)

    @field_validator("device")
    @classmethod
    def _is_device(cls, name: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", name):  # torch takes cuda:128 for cuda:-128
            raise ValueError(f"there is no device {name!r}; choose cpu, cuda or cuda:NUMBER")
        return name
