"""Probe: perplexity and divergence of a model whose weights are perturbed, over kinds and strengths (perturb.py).

Perplexity is GPTQ's (protocols.py), on a few sequences. Its ratio to that of the unperturbed model and the divergence
KL(unperturbed || perturbed) are of the same tokens, and have errors of their own (estimates.py). Not covered: another
draw of the noise gives other figures; give another seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from aqlm_cli.errors import ModelError, UsageError
from aqlm_cli.evaluation.estimates import Divergence, Perplexity, divergence_of, estimate
from aqlm_cli.evaluation.evaluation import Remember, compute_again
from aqlm_cli.evaluation.model import EvaluatedModel
from aqlm_cli.evaluation.passport import Passport, passport_of
from aqlm_cli.evaluation.perplexity import DTYPES, PerplexitySettings, cut_for
from aqlm_cli.evaluation.perturb import Clipping, Noise, Perturbation, Perturbed
from aqlm_cli.evaluation.protocols import TOKEN, Cut
from aqlm_cli.evaluation.scoring import KeptReader, Reader, Scored, score
from aqlm_cli.events import Advanced, Emit, StageStarted
from aqlm_cli.formatting import file_word, text_name
from aqlm_cli.records import Record
from aqlm_cli.spec.probe import ProbeConfig


@dataclass(frozen=True)
class ProbeSettings:
    """`section` of the run file; `seed` is that of the noise."""

    section: ProbeConfig
    seed: int = 0

    @property
    def perturbations(self) -> tuple[Perturbation, ...]:
        """Every one to measure, in order. UsageError where there is none."""
        section = self.section
        noise = [
            Noise(name, correlate, strength)
            for name in section.noise
            for correlate in section.correlate
            for strength in section.strength
        ]
        found: tuple[Perturbation, ...] = (*noise, *map(Clipping, section.clip))
        if not found:
            raise UsageError("there is nothing to probe; give --noise, --correlate and --strength, or --clip")
        return found


@dataclass(frozen=True)
class ProbeRow:
    """One perturbation. `size` is its strength, or the share that is clipped; `change` is ||Delta||_F / ||W||_F of all
    weights together, after rounding to their type. `ratio` is to the perplexity of the unperturbed model."""

    noise: str
    correlate: str
    size: float
    change: float
    perplexity: Perplexity
    ratio: Perplexity
    divergence: Divergence


@dataclass(frozen=True)
class ProbeReport(Record):
    """`unperturbed` and the `rows` are of the same sequences; `layers` is the number of matrices that are perturbed."""

    model: str
    data: str
    sequences: int
    sequence_length: int
    dtype: str
    seed: int
    layers: int
    unperturbed: Perplexity
    rows: tuple[ProbeRow, ...]
    passport: Passport
    version: int = 1

    def table(self) -> Group:
        about = f"{self.model}, {text_name(self.data)}, {self.sequences} x {self.sequence_length}, {self.dtype}"
        tables = []
        for title, (header, *rows) in self._grids().items():
            table = Table(*header, title=Text(title), title_justify="left")
            for row in rows:
                table.add_row(*map(Text, row))
            tables.append(table)
        words = f"probe of {about}: {self.layers} matrices, unperturbed perplexity {_with_error(self.unperturbed, 3)}"
        return Group(Text(words), *tables)

    def as_markdown(self) -> str:
        """The tables of the console, each below its title."""
        parts = []
        for title, (header, *rows) in self._grids().items():
            lines = [header, ["---"] * len(header), *rows]
            parts.append("\n".join([f"{title}\n", *("| " + " | ".join(line) + " |" for line in lines)]))
        return "\n\n".join(parts)

    def _grids(self) -> dict[str, list[list[str]]]:
        """Perplexity and divergence over noise and strength, and what clipping does; the first row is the header."""
        noise = [row for row in self.rows if row.correlate]
        clipped = [row for row in self.rows if not row.correlate]
        grids = {}
        if noise:
            grids["perplexity under noise"] = _grid(noise, lambda row: _with_error(row.perplexity, 2))
            grids["divergence from the unperturbed model, nats a token"] = _grid(noise, _divergence)
        if clipped:
            header = ["clipped", "change", "perplexity", "ratio", "divergence"]
            rows = [
                [
                    f"{row.size:.2%}",
                    f"{row.change:.4f}",
                    _with_error(row.perplexity, 2),
                    _with_error(row.ratio, 4),
                    _divergence(row),
                ]
                for row in clipped
            ]
            grids["clipping of the largest weights"] = [header, *rows]
        return grids


class ProbeEvaluation:
    beside_base = False

    def run(
        self,
        model: EvaluatedModel,
        base: EvaluatedModel | None,
        settings: ProbeSettings,
        emit: Emit,
        remember: Remember = compute_again,
    ) -> ProbeReport:
        section, perturbations = settings.section, settings.perturbations
        text = section.data, section.sequence_length, section.sequences
        wanted = PerplexitySettings(*text, bos=section.bos, dtype=section.dtype)
        protocol, cut, _ = cut_for(model, wanted, emit)
        unperturbed, rows, layers = _measure(model, cut, settings, perturbations, emit)
        return ProbeReport(
            model=model.name,
            data=section.data,
            sequences=cut.units,
            sequence_length=cut.longest,
            dtype=section.dtype,
            seed=settings.seed,
            layers=layers,
            unperturbed=unperturbed,
            rows=rows,
            passport=passport_of(protocol, cut, model, section.dtype),
        )

    def files(self, report: ProbeReport) -> Mapping[str, Mapping[str, Any] | bytes]:
        """probe-wikitext2-8x512-float32.json; of a path only its name."""
        text = file_word(text_name(report.data))
        return {f"probe-{text}-{report.sequences}x{report.sequence_length}-{report.dtype}.json": report.as_json()}


def _measure(
    model: EvaluatedModel, cut: Cut, settings: ProbeSettings, perturbations: Sequence[Perturbation], emit: Emit
) -> tuple[Perplexity, tuple[ProbeRow, ...], int]:
    """The unperturbed perplexity, a row for each perturbation, and the number of matrices that are perturbed."""
    stage, count = f"probe {model.short_name}", len(cut.sequences)
    dtype = DTYPES[settings.section.dtype]
    network = model.network(dtype)
    probed = Perturbed(network, dtype)
    if not len(probed):
        raise ModelError(f"{model.name} has no linear layers in its blocks; there is nothing to perturb")
    device = next(network.parameters()).device
    with torch.inference_mode():
        reader = Reader(network)
    unperturbed = KeptReader(reader)
    emit(StageStarted(stage, (1 + len(perturbations)) * count, "sequence"))
    for done, sequence in enumerate(cut.sequences, 1):
        unperturbed.keep(sequence.ids.to(device))
        emit(Advanced(stage, done, "unperturbed"))
    figures = None
    rows: list[ProbeRow] = []
    for number, perturbation in enumerate(perturbations, 1):
        change = probed.change(partial(perturbation.perturbed, seed=settings.seed))
        scores: list[Scored] = []
        for scored in score([unperturbed, reader], cut.sequences, device):
            scores.append(scored)
            emit(Advanced(stage, number * count + len(scores), _name(perturbation)))
        figures, row = _row(perturbation, change, scores, cut, model.name)
        rows.append(row)
    assert figures is not None  # there is a perturbation
    return figures, tuple(rows), len(probed)


def _row(
    perturbation: Perturbation, change: float, scores: Sequence[Scored], cut: Cut, model: str
) -> tuple[Perplexity, ProbeRow]:
    """The unperturbed perplexity, and what it becomes."""
    losses = torch.zeros(2, cut.units, dtype=torch.float64)
    for sequence, scored in zip(cut.sequences, scores, strict=True):
        for total, loss in zip(losses, scored.losses, strict=True):
            total[sequence.unit] += sequence.weight * loss.mean()
    for name, total in zip(("unperturbed", _name(perturbation)), losses, strict=True):
        if not bool(total.isfinite().all()):
            raise ModelError(f"{model}: the loss is not finite ({name}); try --dtype float32, or less noise")
    counts = cut.counts[TOKEN]
    kind, correlate = perturbation.words
    row = ProbeRow(
        noise=kind,
        correlate=correlate,
        size=perturbation.size,
        change=change,
        perplexity=estimate(losses[1], counts),
        ratio=estimate(losses[1] - losses[0], counts),
        divergence=divergence_of(scores),
    )
    return estimate(losses[0], counts), row


def _name(perturbation: Perturbation) -> str:
    return " ".join(filter(None, (*perturbation.words, f"{perturbation.size:g}")))


def _grid(rows: Sequence[ProbeRow], cell: Callable[[ProbeRow], str]) -> list[list[str]]:
    """Kinds of noise down, strengths across."""
    sizes = sorted({row.size for row in rows})
    cells = {(row.noise, row.correlate, row.size): cell(row) for row in rows}
    kinds = dict.fromkeys((row.noise, row.correlate) for row in rows)
    lines = [[noise, factor, *(cells[noise, factor, size] for size in sizes)] for noise, factor in kinds]
    return [["noise", "correlate", *(f"{size:g}" for size in sizes)], *lines]


def _with_error(found: Perplexity, digits: int) -> str:
    return f"{found.perplexity:.{digits}f} ± {found.stderr:.{digits}f}"


def _divergence(row: ProbeRow) -> str:
    return f"{row.divergence.mean:.4f} ± {row.divergence.stderr:.4f}"
