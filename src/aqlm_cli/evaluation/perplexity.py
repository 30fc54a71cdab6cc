"""Perplexity of a model on a text, beside its base model's, and its divergence from that (estimates.py).

The divergence is KL(base || model) in nats, of the predictions at every scored token. The model may compute in formats
of activations and cache (formats.py); its base model never does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from aqlm_cli.arguments import check_fields
from aqlm_cli.data.sequences import opening_tokens
from aqlm_cli.errors import DataError, ModelError, UsageError
from aqlm_cli.evaluation.estimates import Divergence, Perplexity, divergence_of, estimate
from aqlm_cli.evaluation.evaluation import Remember, compute_again
from aqlm_cli.evaluation.formats import applied
from aqlm_cli.evaluation.model import EvaluatedModel
from aqlm_cli.evaluation.passport import Passport, passport_of
from aqlm_cli.evaluation.protocols import PROTOCOLS, TOKEN, Cut, gptq
from aqlm_cli.evaluation.scoring import Reader, Scored, score
from aqlm_cli.events import Advanced, Emit, Noted, StageStarted
from aqlm_cli.formatting import facts, file_word, text_name
from aqlm_cli.records import Record
from aqlm_cli.spec.formats import AS_COMPUTED, Formats

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class PerplexitySettings:
    """`data` is a source of `data.documents`. `protocol` is a name of PROTOCOLS, None: GPTQ's at `sequence_length`.

    `sequences`: only the first so many sequences, or documents; None: all. `bos` None: as the tokenizer starts a text.
    Weights and matmuls are in `dtype`, the log-softmax in float32. `divergence`: also that from the base model.
    `formats` are those of the model, not of its base model.
    """

    data: str
    sequence_length: int = 2048
    sequences: int | None = None
    bos: bool | None = None
    dtype: str = "float32"
    protocol: str | None = None
    divergence: bool = True
    formats: Formats = AS_COMPUTED

    def __post_init__(self) -> None:
        check_fields(self)
        if self.sequences is not None and self.sequences < 1:
            raise UsageError(f"{self.sequences} sequences are none; give at least 2, or leave --sequences out for all")
        if self.sequence_length < 2:
            raise UsageError(f"sequences of {self.sequence_length} tokens score none; raise --sequence-length")
        if self.dtype not in DTYPES:
            raise UsageError(f"there is no type {self.dtype!r} to compute in; choose {', '.join(DTYPES)}")
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            raise UsageError(f"there is no protocol {self.protocol!r}; choose {', '.join(PROTOCOLS)}")


@dataclass(frozen=True)
class PerplexityReport(Record):
    """Perplexity of `model` on `data`; `ratio` is to the base model's on the same sequences, where there is one.

    `others` are perplexities by another count than that of the protocol: `bits_per_byte` among them. `bos`: each
    sequence begins with the BOS token. `losses` has the sum of every unit in nats, `counts` what it is divided by.
    """

    model: str
    data: str
    protocol: str
    perplexity: float
    stderr: float
    sequences: int
    sequence_length: int
    dtype: str
    base_model: Perplexity | None
    ratio: float | None
    ratio_stderr: float | None
    divergence: Divergence | None
    others: dict[str, float]
    bos: bool
    passport: Passport
    losses: tuple[float, ...] = field(repr=False)
    counts: tuple[float, ...] = field(repr=False)
    formats: Formats = AS_COMPUTED
    version: int = 2

    def table(self) -> Group:
        columns = ("model", "data", "sequences x tokens", "type", "perplexity", "ratio")
        table = Table(*columns, title="perplexity", title_justify="left")
        ratio = "" if self.ratio is None else f"{self.ratio:.4f} ± {self.ratio_stderr:.4f}"
        formats = str(self.formats)
        rows = [(self.model, Perplexity(self.perplexity, self.stderr), ratio)]
        if self.base_model is not None:
            rows.insert(0, ("base", self.base_model, "1"))
        for name, measured, ratio in rows:
            table.add_row(
                Text(name),
                Text(text_name(self.data)),
                f"{self.sequences} x {self.sequence_length}" + (", bos" if self.bos else ""),
                self.dtype + (f", {formats}" if formats and measured is not self.base_model else ""),
                f"{measured.perplexity:.3f} ± {measured.stderr:.3f}",
                ratio,
            )
        about = [
            ("protocol", self.protocol),
            *((name.replace("_", " "), f"{v:.4f}") for name, v in self.others.items()),
        ]
        return Group(
            table, facts("", about) if self.others else Text(f"protocol: {self.protocol}"), *self._divergence()
        )

    def _divergence(self) -> list[Table]:
        found = self.divergence
        if found is None:
            return []
        rows = [
            ("mean", f"{found.mean:.4f} ± {found.stderr:.4f} nats a token"),
            ("median, 99 %, maximum", f"{found.median:.4f}, {found.percentile_99:.3f}, {found.maximum:.2f}"),
            ("same likeliest token", f"{found.agreement:.2%}"),
        ]
        return [facts("divergence from the base model", rows)]


class PerplexityEvaluation:
    beside_base = True

    def run(
        self,
        model: EvaluatedModel,
        base: EvaluatedModel | None,
        settings: PerplexitySettings,
        emit: Emit,
        remember: Remember = compute_again,
    ) -> PerplexityReport:
        protocol, cut, bos = cut_for(model, settings, emit)
        passport = passport_of(protocol, cut, model, settings.dtype, str(settings.formats))
        main = PROTOCOLS[protocol].main if protocol in PROTOCOLS else TOKEN
        counts = cut.counts[main]
        base_losses, divergence = None, None
        if base is not None and settings.divergence:
            (base_losses, losses), scores = _measure([base, model], cut, settings.dtype, emit, settings.formats)
            divergence = divergence_of(scores)
        else:
            (losses,), _ = _measure([model], cut, settings.dtype, emit, settings.formats)
            if base is not None:
                base_losses = _of_base(base, cut, replace(passport, formats=""), emit, remember)
        measured = estimate(losses, counts)
        base_model = None if base_losses is None else estimate(base_losses, counts)
        paired = None if base_losses is None else estimate(losses - base_losses, counts)
        return PerplexityReport(
            model=model.name,
            data=settings.data,
            protocol=protocol,
            perplexity=measured.perplexity,
            stderr=measured.stderr,
            sequences=cut.units,
            sequence_length=cut.longest,
            dtype=settings.dtype,
            base_model=base_model,
            ratio=None if base_model is None else measured.perplexity / base_model.perplexity,
            ratio_stderr=None if paired is None else paired.stderr,
            divergence=divergence,
            others=_others(losses, cut, main),
            bos=bos,
            passport=passport,
            losses=tuple(losses.tolist()),
            counts=tuple(counts.tolist()),
            formats=settings.formats,
        )

    def files(self, report: PerplexityReport) -> Mapping[str, Mapping[str, Any] | bytes]:
        """eval-ppl-wikitext2-148x2048-float32.json, with -bos where sequences begin so; of a path only its name. The
        name of a protocol takes the place of the length where one was asked for. Formats come last."""
        text = file_word(text_name(report.data))
        plain = report.protocol.startswith("gptq-")
        size = f"{report.sequences}x" + (str(report.sequence_length) if plain else report.protocol.replace("/", "-"))
        ending = ("-bos" if report.bos else "") + report.formats.suffix
        return {f"eval-ppl-{text}-{size}-{report.dtype}{ending}.json": report.as_json()}


def _of_base(base: EvaluatedModel, cut: Cut, passport: Passport, emit: Emit, remember: Remember) -> Tensor:
    """The losses `[units]` of the base model, which may have been kept."""

    def compute() -> dict[str, Any]:
        (losses,), _ = _measure([base], cut, passport.dtype, emit)
        return {"losses": losses.tolist()}

    kept = remember({"column": list(passport.column), "model": base.identity}, compute)
    return torch.tensor(kept["losses"], dtype=torch.float64)


def _measure(
    models: Sequence[EvaluatedModel], cut: Cut, dtype: str, emit: Emit, formats: Formats = AS_COMPUTED
) -> tuple[list[Tensor], list[Scored]]:
    """The losses `[units]` of each of one or two models in nats, and what was told of every sequence; the last of them
    computes in `formats`."""
    model = models[-1]
    stage = f"eval-ppl {model.short_name}" + (" beside its base" if len(models) > 1 else "")
    networks = [one.network(DTYPES[dtype]) for one in models]
    device = next(networks[-1].parameters()).device
    emit(StageStarted(stage, len(cut.sequences), "sequence"))
    losses = [torch.zeros(cut.units, dtype=torch.float64) for _ in models]
    scores: list[Scored] = []
    counted = 0.0
    with applied(networks[-1], formats, cut.sequences[0].ids.to(device), emit):
        with torch.inference_mode():
            readers = [Reader(network) for network in networks]
        found = score(readers, cut.sequences, device)
        for number, (sequence, scored) in enumerate(zip(cut.sequences, found, strict=True), 1):
            for one, total, loss in zip(models, losses, scored.losses, strict=True):
                if not bool(loss.isfinite().all()):
                    raise ModelError(
                        f"{one.name}: the loss on sequence {number - 1} is not finite in {dtype}; the weights hold "
                        f"NaN, or activations overflow{'' if dtype == 'float32' else ': try --dtype float32'}"
                    )
                total[sequence.unit] += sequence.weight * loss.mean()
            counted += sequence.weight
            scores.append(scored)
            emit(Advanced(stage, number, f"perplexity {float((losses[-1].sum() / counted).exp()):.2f}"))
    return losses, scores


def _others(losses: Tensor, cut: Cut, main: str) -> dict[str, float]:
    found = {f"{name}_perplexity": estimate(losses, count).perplexity for name, count in cut.counts.items()}
    if "byte" in cut.counts:
        found["bits_per_byte"] = math.log2(found["byte_perplexity"])
    found.pop(f"{main}_perplexity")
    return found


_FLAGS = {False: "--sequence-length", True: "the length that --protocol names"}
"""Flags that a user lowers where sequences are too long for a model."""


def cut_for(model: EvaluatedModel, settings: PerplexitySettings, emit: Emit) -> tuple[str, Cut, bool]:
    """The name of the protocol, the sequences, and whether each begins with an opening of its own."""
    tokenizer, data = model.tokenizer(), settings.data
    opening: tuple[int, ...] = ()
    protocol = None if settings.protocol is None else PROTOCOLS[settings.protocol]
    if protocol is None:
        opening = opening_tokens(tokenizer, settings.bos)
        if opening and settings.bos is None:
            emit(Noted("every sequence begins as the tokenizer begins a text; published figures mostly need --no-bos"))
        protocol = gptq(settings.sequence_length, bool(opening))
    model.refuse_length(protocol.length, _FLAGS[settings.protocol is not None], stated=True)
    cut = protocol.cut(data, tokenizer, emit).first(settings.sequences)
    if cut.units < 2:
        way_out = "lower --sequence-length" if settings.protocol is None else f"{settings.protocol} needs more text"
        way_out = "raise --sequences" if settings.sequences == 1 else way_out
        raise DataError(f"one sequence or document of {data} gives no standard error; {way_out}")
    model.refuse_tokens(torch.cat([sequence.ids for sequence in cut.sequences]))
    return protocol.name + ("-bos" if opening else ""), cut, bool(opening)
